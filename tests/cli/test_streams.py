"""A full disk behind stdout, a reader that went away, a summary that cannot be written: the exit code stays."""

import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support_cli import ROOT

from doconv_convert.cli import app as app_module

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")


def write(path: Path, name: str = "conv") -> Path:
    """One convolution."""
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name=name)],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 10, 10])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def broken_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def closed_file() -> int:
    return os.open(os.devnull, os.O_RDONLY)  # of which every write fails


STREAMS: dict[str, Callable[[], int]] = {
    "a reader that went away": broken_pipe,
    "not open for writing": closed_file,
    "full": lambda: os.open(FULL, os.O_WRONLY),
}


def run(monkeypatch: pytest.MonkeyPatch, out: Any, err: Any, *arguments: Any) -> Any:
    """The exit code of the whole program with these streams."""
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["doconv-convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app_module.main()
    for stream in (sys.stdout, sys.stderr):
        if stream.name == os.devnull:  # in the place of a closed one
            stream.close()
    return ended.value.code


@pytest.mark.parametrize("form", ["text", "json", "github"])
@pytest.mark.parametrize("stream", STREAMS)
def test_the_gate_says_what_it_would(stream: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if stream == "full" and not FULL.exists():
        pytest.skip("no device that is always full")
    path = write(tmp_path / "m.onnx")
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    for budget, code in (("1G", 0), ("1", 3), ("x", 2)):
        with open(STREAMS[stream](), "wb", closefd=True, buffering=0) as raw, (tmp_path / "err").open("w+") as err:
            out = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8")
            assert run(monkeypatch, out, err, "flops", path, "--max", budget, "--format", form) == code
            out.detach().detach()
            said = (tmp_path / "err").read_text()
        assert "Traceback" not in said
        assert ("No space left on device" in said) is (stream == "full" and not (code == 2 and form == "text"))
    assert summary.exists() is (form == "github")


def test_streams_that_are_closed_or_know_few_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.onnx", "漢é")
    assert run(monkeypatch, None, None, "flops", path, "--max", "1") == 3
    assert run(monkeypatch, None, None, "flops", path, "--max", "1", "--json") == 3
    with (tmp_path / "out").open("w+", encoding="latin-1") as out, (tmp_path / "err").open("w") as err:
        assert run(monkeypatch, out, err, "flops", path) == 0
    assert "\\u6f22\xe9" in (tmp_path / "out").read_text(encoding="latin-1")


def test_a_traceback_is_printable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = tmp_path / "\x1b[2J\n::error::x.onnx"
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        assert run(monkeypatch, out, err, "flops", absent, "--debug") == 1
    said = (tmp_path / "err").read_text()
    assert "Traceback" in said
    assert "\\x1b[2J\n\\x3a:error::x.onnx' does not exist; expected an ONNX file" in said
    assert "\x1b" not in said
    assert "\n::error" not in said


def test_what_libraries_warn_of_and_log_is_printable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: object) -> None:
        sys.stderr.write(warnings.formatwarning("a\x1b[2J\n::error::b", UserWarning, "lib.py", 1, ""))
        logging.getLogger("another.library").warning("c\x1b[2J\n::error::d")
        raise SystemExit(0)

    monkeypatch.setattr(app_module, "app", warn)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(logging.lastResort, "formatter", None)
    monkeypatch.setattr(logging.getLogger("another.library"), "propagate", False)  # pytest listens at the root
    with (tmp_path / "err").open("w") as err:
        assert run(monkeypatch, err, err) == 0
    said = (tmp_path / "err").read_text()
    assert "a\\x1b[2J\n\\x3a:error::b" in said
    assert "c\\x1b[2J\\n::error::d\n" in said
    assert "\n::error" not in said


@pytest.mark.parametrize("place", ["absent/summary.md", ".", "a pipe", FULL])
def test_a_summary_that_cannot_be_written(place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == FULL and not FULL.exists():
        pytest.skip("no device that is always full")
    if place == "a pipe":
        os.mkfifo(tmp_path / place)  # which nobody reads
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / place))
    path = write(tmp_path / "m.onnx")
    for budget, code in (("1G", 0), ("1", 3)):
        with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
            assert run(monkeypatch, out, err, "flops", path, "--max", budget, "--format", "github") == code
        said = (tmp_path / "err").read_text()
        assert said.startswith("warning: the step's summary cannot be written: ")
        assert said.count("\n") == 1
        assert "over budget" in (tmp_path / "out").read_text() or code == 0


@needs_full
def test_the_interpreter_ends_with_the_commands_code(tmp_path: Path) -> None:
    """Python itself writes what is left in stdout when it ends, and has an exit code of its own where it cannot."""
    command = f"'{sys.executable}' -m doconv_convert flops '{write(tmp_path / 'm.onnx')}' --max 1"
    script = f"{command} > /dev/full; echo $?; {command} | true; echo ${{PIPESTATUS[0]}};"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.split() == ["3", "3"]
    assert done.stderr == "warning: not all of the output could be written: [Errno 28] No space left on device\n"
