"""`verify` and `flops`: an ONNX file against a checkpoint, a source or another file; damage is exit code 3."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support import build_model, randomize_and_calibrate, sample_source, varied_images
from support_cli import ConfinedHere, ExportsHere, run_cli, run_python, trained_sample, write_sample

from doconv_convert import fold
from doconv_convert.artifacts.export import child_process
from doconv_convert.artifacts.export.exporter import export_onnx
from doconv_convert.check import confined

# Its forward asks for the batch, so that the exporter fixes it.
STATIC = """
import torch
from torch import nn

INPUT_SHAPE = (1, 2, 4, 4)


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x):
        return self.conv(x) * (1.0 if x.shape[0] == 2 else 2.0)


def make():
    return Fixed()
"""

LEAN = """
import importlib, sys
from doconv_convert.check import confined
from doconv_convert.cli.app import app

class Here:
    def call(self, function, file, *arguments, limits=None):
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(f"doconv_convert.{module}"), name)(str(file), *arguments)
    def close(self):
        pass

if "there" not in sys.argv:
    confined.Confined = Here
sys.argv = [text for text in sys.argv if text != "there"]
try:
    app(sys.argv[1:])
except SystemExit as end:
    print("code", end.code)
print("loaded", *sorted({"torch", "torchvision", "onnx", "onnxruntime", "onnxscript", "numpy"} & sys.modules.keys()))
"""


@pytest.fixture(autouse=True)
def all_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "Child", ExportsHere)
    monkeypatch.setattr(confined, "Confined", ConfinedHere)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained checkpoint, its faithful export, and damaged or unfolded ones."""
    folder = tmp_path_factory.mktemp("verify")
    write_sample(folder / "a.pth", "residual")
    trained, x = trained_sample("residual"), varied_images(2, 3, 32, 32)
    export_onnx(fold(trained), (x,), folder / "good.onnx")
    export_onnx(trained, (x,), folder / "unfolded.onnx")
    again = randomize_and_calibrate(build_model("residual"), varied_images(8, 3, 32, 32), seed=7)
    export_onnx(again, (x,), folder / "other.onnx")
    export_onnx(build_model("grouped"), (x,), folder / "grouped.onnx")
    model = onnx.load(folder / "good.onnx")
    name = [node for node in model.graph.node if node.op_type == "Conv"][2].input[1]
    tensor = next(one for one in model.graph.initializer if one.name == name)
    noise = 1 + 1e-3 * np.random.default_rng(0).standard_normal(tuple(tensor.dims))
    tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * noise).astype(np.float32), name))
    onnx.save(model, folder / "jiggled.onnx")
    return folder


def against_checkpoint(files: Path) -> list[str]:
    return ["--against", str(files / "a.pth"), "--model", sample_source("residual")]


@pytest.mark.parametrize(
    ("candidate", "failed"),
    [
        ("good", set()),
        ("jiggled", {"graph", "outputs"}),
        ("unfolded", {"graph"}),
        ("other", {"graph", "outputs"}),
    ],
)
def test_against_the_checkpoint(files: Path, candidate: str, failed: set[str]) -> None:
    result = run_cli("verify", files / f"{candidate}.onnx", *against_checkpoint(files), "--json")
    assert result.exit_code == (3 if failed else 0), result.stderr
    said = json.loads(result.stdout)
    assert said["proven"] is not bool(failed)
    assert {status["name"] for status in said["statuses"] if status["state"] == "failed"} >= failed


def test_against_a_source_without_weights_nothing_is_proven(files: Path) -> None:
    against = ["--against", sample_source("residual")]
    for options, code in (([], 3), (["--graph-only"], 0)):
        result = run_cli("verify", files / "good.onnx", *against, *options)
        assert result.exit_code == code
        assert "proven: false" in result.stdout
        assert "not checked" in result.stdout
    assert run_cli("verify", files / "unfolded.onnx", *against, "--graph-only").exit_code == 3


def test_other_weights_with_equal_outputs_are_equivalent_and_not_proven(files: Path, tmp_path: Path) -> None:
    model = onnx.load(files / "good.onnx")
    tensor = model.graph.initializer[0]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = np.nextafter(values.flat[0], np.float32(1))
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "other.onnx")
    for options, code in (([], 3), (["--equivalent"], 0)):
        result = run_cli("verify", tmp_path / "other.onnx", "--against", files / "good.onnx", "--json", *options)
        assert result.exit_code == code
        said = json.loads(result.stdout)
        assert (said["proven"], said["equivalent"], said["failed"]) == (False, True, False)
        (weights,) = (status for status in said["statuses"] if status["name"] == "weights")
        assert weights["state"] == "equivalent"
        assert tensor.name in weights["findings"][0]
    result = run_cli("verify", tmp_path / "other.onnx", "--against", files / "good.onnx")
    assert "proven: false, equivalent on these inputs" in result.stdout
    result = run_cli("verify", files / "jiggled.onnx", "--against", files / "good.onnx", "--equivalent")
    assert result.exit_code == 3


@pytest.mark.zoo
def test_against_a_source_with_the_trained_weights(files: Path) -> None:
    options = ["--against", sample_source("residual"), "--weights", str(files / "a.pth")]
    result = run_cli("verify", files / "good.onnx", *options)
    assert result.exit_code == 0
    assert "proven: true" in result.stdout
    assert run_cli("verify", files / "jiggled.onnx", *options).exit_code == 3


@pytest.mark.parametrize(("candidate", "code"), [("good", 0), ("other", 3)])
def test_two_onnx_files_need_no_torch(files: Path, candidate: str, code: int) -> None:
    said = run_python(LEAN, "verify", files / f"{candidate}.onnx", "--against", files / "good.onnx")
    assert f"code {code}\n" in said
    assert f"proven: {str(code == 0).lower()}" in said
    assert said.endswith("loaded numpy onnx onnxruntime\n")


def test_two_counts_need_no_torch(files: Path) -> None:
    said = run_python(LEAN, "flops", files / "good.onnx", "--against", files / "other.onnx")
    assert "code 0\n" in said
    assert "node by node" in said
    assert said.endswith("loaded numpy onnx\n")
    said = run_python(LEAN, "flops", files / "good.onnx", "--against", files / "grouped.onnx")
    assert "code 3\n" in said
    assert said.endswith("loaded numpy onnx\n")


def test_files_of_unknown_origin_are_not_read_in_the_commands_own_process(files: Path) -> None:
    for command in (["flops", files / "good.onnx"], ["verify", files / "good.onnx"]):
        said = run_python(LEAN, *command, "--against", files / "good.onnx", "there")
        assert "code 0\n" in said
        assert said.endswith(("loaded numpy\n", "loaded\n"))


def test_help_and_the_package_load_nothing_heavy() -> None:
    for arguments in (["--help"], *([command, "--help"] for command in ("to-doconv", "fold", "verify", "flops"))):
        assert run_python(LEAN, *arguments).endswith("code 0\nloaded\n")
    heavy = '{"torch", "onnx", "onnxruntime", "numpy", "typer", "rich"}'
    code = f"import sys, doconv_convert; dir(doconv_convert); print({heavy} & sys.modules.keys())"
    assert run_python(code) == "set()\n"


def test_every_public_name_can_be_had() -> None:
    import doconv_convert

    for name in doconv_convert.__all__:
        assert getattr(doconv_convert, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = doconv_convert.absent


def test_the_count_of_resnet18_is_the_published_one() -> None:
    result = run_cli("flops", "torchvision:resnet18")
    assert result.exit_code == 0
    assert "torchvision:resnet18: 1.814 GMACs (1,814,073,344 MACs; FLOPs = 2 x MACs)" in result.stdout


def test_a_source_that_exports_statically_is_counted_for_one_sample(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(STATIC)
    result = run_cli("flops", f"{tmp_path}/net.py:make", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["total"] == 2 * 3 * 9 * 4


def test_counts_that_differ_are_exit_code_3(files: Path) -> None:
    assert run_cli("flops", files / "good.onnx", "--against", sample_source("residual")).exit_code == 0
    result = run_cli("flops", files / "good.onnx", "--against", sample_source("grouped"), "--json")
    assert result.exit_code == 3
    said = json.loads(result.stdout)
    assert said["equal"] is False
    assert said["differences"]
    assert said["unit"] == "MACs"


def test_json_is_one_document_and_the_rest_goes_to_stderr(files: Path, tmp_path: Path) -> None:
    commands = {
        "to-doconv": ["to-doconv", sample_source("residual"), "-o", tmp_path / "a.safetensors"],
        "to-doconv --dry-run": ["to-doconv", sample_source("residual"), "--dry-run"],
        "fold": ["fold", files / "a.pth", "--model", sample_source("residual"), "-o", tmp_path / "b.safetensors"],
        "verify": ["verify", files / "good.onnx", "--against", files / "good.onnx"],
        "verify, failed": ["verify", files / "good.onnx", "--against", files / "other.onnx"],
        "flops": ["flops", files / "good.onnx"],
        "flops, failed": ["flops", files / "good.onnx", "--against", files / "grouped.onnx"],
    }
    for name, command in commands.items():
        text, document = run_cli(*command), run_cli(*command, "--json")
        assert text.exit_code == document.exit_code == (3 if "failed" in name else 0), name
        assert isinstance(json.loads(document.stdout), dict), name
        assert document.stderr.strip(), name
        assert text.stdout.strip(), name
        assert text.stderr == "", name
        for options in (["--quiet"], ["--quiet", "--json"]):
            quiet = run_cli(*command, *options)
            assert quiet.exit_code == text.exit_code, name
            assert quiet.stderr == "", name
            assert quiet.stdout == (document.stdout if "--json" in options else ""), name


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (0, ["good.onnx", "--against", "good.onnx"]),
        (1, ["absent.onnx", "--against", "good.onnx"]),
        (2, ["good.onnx"]),
        (3, ["jiggled.onnx", "--against", "other.onnx"]),
    ],
)
def test_exit_codes(files: Path, code: int, arguments: list[str]) -> None:
    result = run_cli("verify", *(files / word if word.endswith(".onnx") else word for word in arguments))
    assert result.exit_code == code
    if code in (1, 2):
        assert result.stdout == ""
        assert result.stderr


def test_an_error_is_one_json_document_too(files: Path) -> None:
    result = run_cli("verify", files / "absent.onnx", "--against", files / "good.onnx", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == document["exit_code"] == 1
    assert "absent.onnx" in document["error"]
    assert document["error"] in result.stderr
