"""No output over an input of the same command: every output against every input, by every way to name a file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from support_cli import names, run_cli, tiny_file

from doconv_convert.errors import UsageError
from doconv_convert.workflows import overwrites
from doconv_convert.workflows.overwrites import refuse_overwrites


def small_onnx(path: Path) -> None:
    """With external data."""
    weight = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.weights", size_threshold=0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every kind that some command reads. None is valid beyond what refusing needs."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_file(folder)
    for name in (
        "last.pth",
        "weights.safetensors",
        "samples.npy",
        "exported.pt2",
        "results.jsonl",
        "side.reference.npz",
    ):
        (folder / name).write_bytes(name.encode())
    (folder / "package").mkdir()
    (folder / "package" / "nets.py").write_text("def net():\n    raise SystemExit('imported')\n")
    (folder / "package" / "__init__.py").write_text("raise SystemExit('imported')\n")
    small_onnx(folder / "model.onnx")
    small_onnx(folder / "other.onnx")
    certificate = {"outputs": {"reference": {"name": "side.reference.npz"}}}
    (folder / "model.certificate.json").write_text(json.dumps(certificate))
    for name in ("shards", "single", "distributed"):
        (folder / name).mkdir()
    save_file({"a": torch.ones(1)}, folder / "shards" / "one.safetensors")
    save_file({"a": torch.ones(1)}, folder / "single" / "model.safetensors")
    index = {"weight_map": {"a": "one.safetensors"}}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in (".metadata", "__0_0.distcp"):
        (folder / "distributed" / name).write_bytes(b"x")
    return folder


FOLD = "fold last.pth --model net.py:tiny --input samples.npy"
AGAINST = "verify model.onnx --against"
# What is written takes the place of {}, in turn, for every file that is read: (the command, the files).
MATRIX: list[tuple[str, str]] = [
    (f"{FOLD} --onnx {{}}", "last.pth net.py samples.npy"),
    (f"{FOLD} --onnx o.onnx --report {{}}", "last.pth net.py samples.npy"),
    (f"{FOLD} -o {{}}", "last.pth net.py samples.npy"),
    ("fold weights.safetensors --model net.py:tiny -o {}", "weights.safetensors net.py"),
    ("fold last.pth --model exported.pt2 --onnx {}", "exported.pt2"),
    ("fold last.pth --model package.nets:net --onnx {}", "package/nets.py"),
    ("fold last.pth --model package:net --onnx o.onnx --report {}", "package/__init__.py"),
    ("fold shards --model net.py:tiny -o {}", "shards/one.safetensors shards/model.safetensors.index.json"),
    ("fold shards/model.safetensors.index.json --model net.py:tiny --onnx {}", "shards/one.safetensors"),
    ("fold single --model net.py:tiny -o {}", "single/model.safetensors"),
    ("fold distributed --model net.py:tiny --onnx {}", "distributed/.metadata distributed/__0_0.distcp"),
    ("to-doconv net.py:tiny --weights last.pth --input samples.npy -o {}", "net.py last.pth samples.npy"),
    ("to-doconv net.py:tiny --weights single -o {}", "single/model.safetensors"),
    ("to-doconv weights.safetensors -o {}", "weights.safetensors"),
    ("to-doconv net.py:tiny --dry-run --report {}", "net.py"),
    (f"{AGAINST} other.onnx --input samples.npy --report {{}}", "model.onnx model.onnx.weights other.onnx samples.npy"),
    (f"{AGAINST} other.onnx --report {{}}", "other.onnx.weights"),
    ("verify model.onnx --certificate model.certificate.json --report {}", "model.certificate.json side.reference.npz"),
    ("verify model.onnx --certificate model.certificate.json --attest {}", "model.onnx model.certificate.json"),
    (f"{AGAINST} last.pth --model net.py:tiny --report {{}}", "last.pth net.py"),
    (f"{AGAINST} net.py:tiny --weights last.pth --report {{}}", "last.pth net.py"),
    ("rehearse net.py:tiny exported.pt2 --resume {}", "net.py exported.pt2"),
    ("rehearse net.py:tiny exported.pt2 --report {}", "net.py exported.pt2"),
]


def by_relative_path(read: Path, links: Path) -> Path:
    return Path(os.path.relpath(read.parent / ".." / read.parent.name / read.name))


def by_symbolic_link(read: Path, links: Path) -> Path:
    link = links / read.name
    link.symlink_to(read)
    return link


def by_linked_folder(read: Path, links: Path) -> Path:
    (links / "folder").symlink_to(read.parent, target_is_directory=True)
    return links / "folder" / read.name


def by_hard_link(read: Path, links: Path) -> Path:
    """Also what another case of the name is, where the file system does not tell them apart: the same inode."""
    link = links / read.name.swapcase()
    os.link(read, link)
    return link


WAYS: list[Callable[[Path, Path], Path]] = [
    lambda read, links: read,
    by_relative_path,
    by_symbolic_link,
    by_linked_folder,
    by_hard_link,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_output_is_held_against_every_input(
    tmp_path: Path, inputs: Path, way: Callable[[Path, Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, links = tmp_path / "inputs", tmp_path / "links"
    shutil.copytree(inputs, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for command, files in MATRIX:
        for read in files.split():
            links.mkdir()
            output = str(way(folder / read, links))
            result = run_cli(*(output if part == "{}" else part for part in command.split()))
            said = (command, read, result.stderr)
            assert result.exit_code == 2, said
            assert "which this command reads" in result.stderr, said
            assert output in result.stderr, said
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before, said
            shutil.rmtree(links)


BESIDE = ["out.certificate.json", "out.reference.npz", "out.onnx.data", "out.onnx.0123456789abcdef.data"]


@pytest.mark.parametrize("beside", BESIDE)
def test_what_comes_with_an_output_is_held_against_inputs_too(tmp_path: Path, inputs: Path, beside: str) -> None:
    read = tmp_path / beside
    read.write_bytes(b"samples")
    command = ["fold", inputs / "last.pth", "--model", f"{inputs}/net.py:tiny", "--onnx", tmp_path / "out.onnx"]
    result = run_cli(*command, "--input", read)
    assert result.exit_code == 2
    assert f"--onnx names '{tmp_path}/out.onnx' (with '{beside}'), which this command reads (--input)" in result.stderr
    assert read.read_bytes() == b"samples"
    result = run_cli(*command, "--report", read)
    assert result.exit_code == 2
    assert f"--onnx and --report both name '{read}'; expected two files" in result.stderr


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".onnx", ".safetensor", ""])
def test_safetensors_go_into_safetensors_only(tmp_path: Path, inputs: Path, suffix: str) -> None:
    out = tmp_path / f"out{suffix}"
    for command in (
        ["fold", inputs / "last.pth", "--model", f"{inputs}/net.py:tiny"],
        ["to-doconv", f"{inputs}/net.py:tiny"],
    ):
        result = run_cli(*command, "-o", out)
        assert result.exit_code == 2
        assert f"-o names '{out}', expected a name that ends in .safetensors" in result.stderr
        assert "'out.safetensors'" in result.stderr
        assert names(tmp_path) == []


def test_the_step_summary_is_an_output(tmp_path: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (inputs / "model.onnx").read_bytes()
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(inputs / "model.onnx"))
    result = run_cli("flops", inputs / "model.onnx", "--format", "github")
    assert result.exit_code == 2
    assert "$GITHUB_STEP_SUMMARY names" in result.stderr
    assert (inputs / "model.onnx").read_bytes() == before


def test_the_demo_does_not_write_over_what_it_comes_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from doconv_convert.artifacts.sources.source import sample_models_folder
    from doconv_convert.workflows import demo

    folder = tmp_path / "sample_models"
    shutil.copytree(sample_models_folder(), folder)
    monkeypatch.setattr(demo, "sample_models_folder", lambda: folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    result = run_cli("demo", folder, "--epochs", "1")
    assert result.exit_code == 2
    assert "which this command reads (the demo's digits.py)" in result.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_two_outputs_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that differ in case are one file where the file system says so, and only there."""
    a, b = tmp_path / "out.html", tmp_path / "OUT.html"
    refuse_overwrites({}, {"`onnx`": a, "`report`": b})
    assert not overwrites._folds_names(tmp_path)
    monkeypatch.setattr(overwrites, "_folds_names", lambda folder: folder == tmp_path)
    with pytest.raises(UsageError, match="both name"):
        refuse_overwrites({}, {"`onnx`": a, "`report`": b})
    for other in (a, tmp_path / "." / "out.html", tmp_path / ".." / tmp_path.name / "out.html"):
        with pytest.raises(UsageError, match=r"`onnx` and `report` both name '.*out\.html'; expected two files"):
            refuse_overwrites({}, {"`onnx`": a, "`report`": other})


def test_outputs_that_replace_nothing_read_are_allowed(tmp_path: Path, inputs: Path) -> None:
    """An older output, also in the checkpoint's own folder."""
    folder = tmp_path / "run"
    shutil.copytree(inputs / "single", folder)
    for name in ("plain.safetensors", "out.onnx", "out.certificate.json", "out.reference.npz"):
        (folder / name).write_bytes(b"old")
    (folder / "plain.safetensors").rename(tmp_path / "plain.safetensors")
    reads: dict[str, Any] = {"the checkpoint": folder, "`model`": f"{inputs}/net.py:tiny"}
    refuse_overwrites(reads, {"`plain`": tmp_path / "plain.safetensors", "`onnx`": folder / "out.onnx"})
