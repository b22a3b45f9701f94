"""Nothing is reported to anybody, and what is written for others does not say where it was made."""

import getpass
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import support_sockets
from onnx import TensorProto, helper, numpy_helper
from support_cli import ROOT, read_file, run_cli, run_python, tiny_file, trained_tiny, write_model

from doconv_convert.artifacts.export.onnx_file import strip
from doconv_convert.artifacts.sources.source import Source
from doconv_convert.cli.privacy import Folders

USER = "a_users_name"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every command writes, each file named by its absolute path, in a folder of the user's name."""
    folder = tmp_path_factory.mktemp(USER)
    net, trained = f"{tiny_file(folder)}:tiny", folder / "trained.pth"
    write_model(trained_tiny(folder), trained)
    commands: list[tuple[Any, ...]] = [
        ("to-doconv", net, "-o", folder / "start.safetensors", "--report", folder / "start.html"),
        ("fold", trained, "--model", net, "--onnx", folder / "m.onnx", "-o", folder / "plain.safetensors"),
        ("verify", folder / "m.onnx", "--certificate", folder / "m.certificate.json"),
        ("flops", folder / "m.onnx", "--against", folder / "m.onnx"),
        ("verify", folder / "m.onnx", "--against", folder / "m.onnx", "--report", folder / "same.html"),
        ("rehearse", net, "--no-export", "--report", folder / "rehearsed.html"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
        for command in commands:
            form = ("--format", "github") if command[0] in ("fold", "verify", "flops") else ()
            report = (
                ("--report", folder / f"{command[0]}.html") if "--certificate" in command or "fold" in command else ()
            )
            result = run_cli(*command, *form, *report)
            assert result.exit_code == 0, result.output
    return folder


def test_what_is_written_for_others_names_no_folder_and_no_user(released: Path) -> None:
    written = [
        path for path in released.iterdir() if path.suffix not in (".py", ".pth", ".imported") and path.is_file()
    ]
    assert {path.suffix for path in written} == {".safetensors", ".html", ".onnx", ".json", ".npz", ".md"}
    assert len(written) == 11
    for path in written:
        content = path.read_bytes()
        for text in (USER, str(released), str(ROOT), str(Path.home()), f"{os.sep}{getpass.getuser()}{os.sep}"):
            assert text.encode() not in content, path.name
    assert read_file(released / "start.safetensors")[1]["source"]["source"] == "net.py:tiny"
    certificate = json.loads((released / "m.certificate.json").read_text())
    assert certificate["source"]["source"] == "net.py:tiny"
    assert "m.onnx: proven: true" in (released / "summary.md").read_text().replace("&#95;", "_")
    assert "m.certificate.json" in (released / "fold.html").read_text()


def test_a_source_without_its_folders() -> None:
    def told(text: str, **arguments: Any) -> tuple[str, Any]:
        source = Source(text, arguments).without_folders()
        return source.text, dict(source.args)

    assert told("/home/me/net.py:f") == ("net.py:f", {})
    assert told("../me/net.py:f") == ("net.py:f", {})
    assert told("nets/net.py:f") == ("nets/net.py:f", {})
    assert told("/home/me/m.pt2") == ("m.pt2", {})
    assert told("torchvision:resnet18@DEFAULT", n=3) == ("torchvision:resnet18@DEFAULT", {"n": 3})
    assert told("a.b:f", config="/home/me/c.yaml", all=[{"x": "/home/me/d"}], ratio="1/2") == (
        "a.b:f",
        {"config": "c.yaml", "all": [{"x": "d"}], "ratio": "1/2"},
    )


def test_names_of_nodes_are_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = Folders.of(["/model/out.onnx", "/home/me/nets/net.py:f", None, "last.pth", "../up/x.npy", "/"])
    assert folders.left_out("/model/conv/Conv of /model/out.onnx") == "/model/conv/Conv of out.onnx"
    assert folders.left_out(["/home/me/nets/out.certificate.json", {"/home/me/nets/net.py:f": 3}]) == [
        "out.certificate.json",
        {"net.py:f": 3},
    ]
    assert folders.left_out(f"../up/x.npy {tmp_path}/last.pth /a/b") == "x.npy last.pth /a/b"


def test_an_exported_file_has_no_documentation() -> None:
    """Every place of a file that holds text of an exporter's own; what the graph means stays."""
    place = f"/home/{USER}/net.py"
    kernel = numpy_helper.from_array(np.ones((1, 3, 3, 3), np.float32), "w")
    constant = numpy_helper.from_array(np.ones(1, np.float32), "c")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv", doc_string=place),
        helper.make_node("Constant", [], ["b"], value=constant),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None, doc_string=place) for name in "xya"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:2], [kernel], place, values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], doc_string=place)
    documented = [*model.graph.node[1].attribute, model.graph.node[1].attribute[0].t, *model.graph.initializer]
    for part in documented:
        part.doc_string = place
    parts = [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer]
    for part in (*parts, *model.graph.value_info):
        part.metadata_props.add(key="namespace", value=place)
    assert model.SerializeToString().count(USER.encode()) == 18
    stripped = ir.from_proto(model)
    strip(stripped)
    left = ir.to_proto(stripped)
    assert USER.encode() not in left.SerializeToString()
    assert [node.op_type for node in left.graph.node] == ["Conv", "Constant", "Add"]
    assert numpy_helper.to_array(left.graph.initializer[0]).sum() == 27


def left_by(folder: Path, *command: Any, **environment: str) -> list[str]:
    """Every file that a program leaves in the folders of its user."""
    inherited = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "USERPROFILE", "TEMP", "LOCALAPPDATA"), str(folder))
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=inherited | places | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_onnxruntime_reports_nothing(released: Path, tmp_path: Path) -> None:
    """Its wheels keep a database of what they will send, with the names of files and nodes, from the import on."""
    bare = "import onnxruntime; onnxruntime.InferenceSession"
    (tmp_path / "bare").mkdir()
    reported = left_by(tmp_path / "bare", "-c", bare)
    assert reported == [] or "onnxruntime.db" in reported  # some versions do, others never did
    (tmp_path / "ours").mkdir()
    verify = ("-m", "doconv_convert", "verify", released / "m.onnx", "--certificate", released / "m.certificate.json")
    assert left_by(tmp_path / "ours", *verify) == []


@pytest.mark.parametrize(("before", "after"), [("0", "0"), ("", "1")])
def test_the_users_own_choice_stays(before: str, after: str) -> None:
    code = f"""
import os
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
os.environ.update({{"ORT_DISABLE_TELEMETRY": "{before}"}} if "{before}" else {{}})
import doconv_convert
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""
    assert run_python(code).strip() == after


def test_everything_that_loads_onnxruntime_says_so_first() -> None:
    """The action, the documentation and the benchmarks: set before the import. Ours are set by the package itself."""
    action = (ROOT / "action.yml").read_text()
    assert action.count('ORT_DISABLE_TELEMETRY: "1"') == action.count("bin/doconv-convert")
    pages = [
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.py"),
        *ROOT.glob("benchmarks/**/*.py"),
        ROOT / "README.md",
    ]
    importing = [page for page in pages if "\nimport onnxruntime\n" in page.read_text(encoding="utf-8")]
    assert len(importing) >= 3
    for page in importing:
        before = page.read_text(encoding="utf-8").split("\nimport onnxruntime\n")[0]
        assert "ORT_DISABLE_TELEMETRY" in before, page.name


def test_no_test_opens_a_socket(loopback: Callable[..., Any]) -> None:
    """What the conftest forbids: this process' Python, its C++, and the processes that it starts."""
    with pytest.raises(support_sockets.SocketOpenedError):
        socket.socket(socket.AF_INET)
    with pytest.raises(support_sockets.SocketOpenedError):
        socket.getaddrinfo("localhost", 80)
    assert len(support_sockets.attempts) == 2
    support_sockets.attempts.clear()
    for end in socket.socketpair():
        end.close()
    loopback(socket.socket).close()
    assert support_sockets.attempts == []
    if sys.platform != "linux":
        return  # the header of the run says what is not watched there
    for family in ("AF_INET", "AF_INET6"):
        code = f"import ctypes, socket; ctypes.CDLL(None).socket(socket.{family}, socket.SOCK_STREAM, 0)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert done.returncode == -signal.SIGSYS
    code = "import ctypes, socket; print(ctypes.CDLL(None).socket(socket.AF_INET, socket.SOCK_DGRAM, 0))"
    assert run_python(code).strip() == "-1"
