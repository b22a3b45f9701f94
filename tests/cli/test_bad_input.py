"""Bad input: one message that names the thing, what was got, what was expected and the fix; nothing is lost."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support_cli import TINY, names, run_cli, tiny, trained_tiny, write_model
from torch import nn

from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.workflows import exports

OLD = b"an older output"


@dataclass
class Desk:
    """A folder with a user's files, and one with nothing but older outputs."""

    source: str
    files: Path
    out: Path

    @property
    def plain(self) -> Path:
        return self.out / "plain.safetensors"

    @property
    def onnx(self) -> Path:
        return self.out / "out.onnx"


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    files, out = tmp_path / "files", tmp_path / "out"
    files.mkdir()
    out.mkdir()
    (files / "net.py").write_text(TINY)
    found = Desk(f"{files}/net.py", files, out)
    model = trained_tiny(files)
    for name in ("a.safetensors", "a.pth"):
        write_model(model, files / name, "torchvision:resnet18")
    for target in (found.plain, found.onnx):
        target.write_bytes(OLD)
    return found


Arguments = Callable[[Desk], list[Any]]


def convert(*options: str, factory: str = "tiny", out: bool = True) -> Arguments:
    return lambda d: ["to-doconv", f"{d.source}:{factory}", *options, *(["-o", d.plain] if out else [])]


def convert_source(source: str) -> Arguments:
    return lambda d: ["to-doconv", source, "-o", d.plain]


def fold(checkpoint: str, *options: str, factory: str = "tiny") -> Arguments:
    return lambda d: [
        *("fold", d.files / checkpoint, "--model", f"{d.source}:{factory}", "-o", d.plain, "--onnx", d.onnx),
        *(option.format(files=d.files) for option in options),
    ]


def fold_as(source: str) -> Arguments:
    return lambda d: ["fold", d.files / "a.pth", "--model", source, "-o", d.plain]


def write_truncated(files: Path) -> None:
    (files / "bad.safetensors").write_bytes((files / "a.safetensors").read_bytes()[:-1])


def write_nan(files: Path) -> None:
    state = torch.load(files / "a.pth", weights_only=True)
    state["grouped.D"][0, 0, 0] = float("nan")
    torch.save(state, files / "bad.pth")


def write_lost(files: Path) -> None:
    state = torch.load(files / "a.pth", weights_only=True)
    del state["grouped.D"]
    torch.save(state, files / "bad.pth")


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def write_code(files: Path) -> None:
    torch.save({"a": torch.ones(1), "b": Runs(files / "ran")}, files / "bad.pth")


def write_other(files: Path) -> None:
    torch.save(nn.Conv2d(3, 3, 3).state_dict(), files / "bad.pth")


def write_samples(files: Path) -> None:
    np.save(files / "three.npy", np.zeros((1, 3, 6, 6), np.float32))
    np.savez(files / "two.npz", image=np.zeros((1, 2, 6, 6)), more=np.zeros((1, 2)))
    (files / "text.npy").write_text("no array")


@dataclass(frozen=True)
class Case:
    code: int
    arguments: Arguments
    words: list[str]
    prepare: Callable[[Path], None] = lambda files: None


CASES: dict[str, Case] = {
    "unknown torchvision model": Case(
        2, convert_source("torchvision:resnet81"), ["resnet81", "did you mean 'resnet18'"]
    ),
    "unknown timm model": Case(2, convert_source("timm:resnet81"), ["resnet81", "did you mean"]),
    "no source": Case(2, convert_source("resnet18"), ["'resnet18' names no model", "expected", "torchvision:NAME"]),
    "no such file": Case(1, convert_source("absent.py:make"), ["absent.py", "No such file"]),
    "no such module": Case(1, convert_source("absent_package.nets:make"), ["no module 'absent_package'", "PYTHONPATH"]),
    "no such factory": Case(1, convert(factory="tini"), ["'tini'", "did you mean 'tiny'"]),
    "a factory that raises": Case(1, convert(factory="raises"), ["net.py:raises", "RuntimeError: out of luck"]),
    "a factory of something else": Case(1, convert(factory="number"), ["returned a int", "torch.nn.Module"]),
    "a factory's wrong argument": Case(1, convert("--model-args", '{"depth": 3}'), ["tiny", "depth"]),
    "no convolution": Case(
        1, convert("--input-shape", "1,2", factory="nothing"), ["nothing to convert", "no convolution"]
    ),
    "no eligible convolution": Case(
        1, convert("--input-shape", "1,2,6,6", factory="transposed"), ["nothing to convert", "1 transposed"]
    ),
    "NaN in the original": Case(1, convert(factory="diverged"), ["Tiny", "NaN", "expected finite"]),
    "D_mul below K": Case(2, convert("--d-mul", "9"), ["'depthwise'", "at least 25", "5x5 kernel", "got 9", "exclude"]),
    "D_mul that is none": Case(2, convert("--d-mul", "K*2"), ["'K*2'", "expected", "'K+3'"]),
    "a glob without a match": Case(2, convert("--exclude", "absent*"), ["exclude 'absent*'", "'first'"]),
    "the wrong input": Case(2, convert("--input-shape", "1,3,6,6"), ["(2, 3, 6, 6)", "Tiny", "--input-shape"]),
    "no input shape": Case(2, convert("--input-shape", "1,2,x,6"), ["'1,2,x,6'", "expected"]),
    "bad JSON": Case(2, convert("--model-args", "{width: 8}"), ["--model-args", "{width: 8}", "expected JSON"]),
    "JSON of another kind": Case(2, convert("--model-args", "[8]"), ["--model-args", "got a list", "object"]),
    "no output named": Case(2, convert(out=False), ["-o FILE", "--dry-run"]),
    "weights that are no weights": Case(
        1,
        lambda d: ["to-doconv", f"{d.source}:tiny", "-o", d.plain, "--weights", d.files / "bad.pth"],
        ["bad.pth", "does not fit Tiny", "missing"],
        write_other,
    ),
    "weights with NaN": Case(
        1,
        lambda d: ["to-doconv", f"{d.source}:tiny", "-o", d.plain, "--weights", d.files / "bad.pth"],
        ["bad.pth", "'grouped.D' (1 of "],
        write_nan,
    ),
    "unknown weights": Case(
        2,
        lambda d: ["to-doconv", "torchvision:resnet18", "-o", d.plain, "--weights", "BEST"],
        ["no weights 'BEST'", "IMAGENET1K_V1"],
    ),
    "no checkpoint": Case(1, fold("absent.pth"), ["absent.pth", "is no file", "expected a checkpoint"]),
    "another architecture": Case(
        1,
        fold_as("torchvision:squeezenet1_0"),
        ["a.pth", "does not fit SqueezeNet", "missing: 'features.0.weight'", "unexpected: 'first.weight'", "--model"],
    ),
    "the recipe's architecture is another": Case(
        1, lambda d: ["fold", d.files / "a.safetensors", "-o", d.plain], ["does not fit ResNet", "missing"]
    ),
    "no model named": Case(2, lambda d: ["fold", d.files / "a.pth", "-o", d.plain], ["a.pth", "--model SOURCE"]),
    "a truncated file": Case(1, fold("bad.safetensors"), ["bad.safetensors", "damaged, incomplete"], write_truncated),
    "a pickle with code": Case(1, fold("bad.pth"), ["bad.pth", "builtins.getattr", "model.state_dict()"], write_code),
    "NaN weights": Case(1, fold("bad.pth"), ["'grouped.D' (1 of ", "expected none", "earlier checkpoint"], write_nan),
    "lost D": Case(1, fold("bad.pth"), ["'grouped'", "--exclude 'grouped'"], write_lost),
    "the wrong input to fold": Case(2, fold("a.pth", "--input-shape", "1,3,6,6"), ["(2, 3, 6, 6)", "--input"]),
    "samples of the wrong shape": Case(
        2, fold("a.pth", "--input", "{files}/three.npy"), ["(2, 3, 6, 6)", "--input"], write_samples
    ),
    "too many samples": Case(
        2, fold("a.pth", "--input", "{files}/two.npz"), ["got 2 inputs", "expected 1 (image)"], write_samples
    ),
    "no samples": Case(1, fold("a.pth", "--input", "{files}/text.npy"), ["text.npy", "numpy.save"], write_samples),
    "the wrong input to flops": Case(
        2,
        lambda d: ["flops", f"{d.source}:tiny", "--input-shape", "1,3,6,6"],
        ["(3, 3, 6, 6)", "Tiny", "--input-shape"],
    ),
    "bad dynamic": Case(2, fold("a.pth", "--dynamic", "image:height"), ["--dynamic", "image:height", "NAME:AXIS=DIM"]),
    "no output of fold named": Case(
        2, lambda d: ["fold", d.files / "a.pth", "--model", f"{d.source}:tiny"], ["-o", "--onnx"]
    ),
    "one place for two outputs": Case(2, fold("a.pth", "-o", "m.onnx", "--onnx", "m.onnx"), ["'m.onnx'", "two files"]),
    "no candidate": Case(
        1, lambda d: ["verify", d.out / "absent.onnx", "--against", d.onnx], ["absent.onnx", "expected an ONNX"]
    ),
    "a candidate that is no ONNX": Case(
        1, lambda d: ["verify", d.onnx, "--against", d.onnx], ["out.onnx", "cannot be read as an ONNX file"]
    ),
    "a count of no ONNX": Case(1, lambda d: ["flops", d.onnx], ["out.onnx", "cannot be read as an ONNX file"]),
}


def no_export(*_: object, **__: object) -> None:
    raise AssertionError("an export began before the error was found")


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_told_in_words_and_nothing_is_lost(desk: Desk, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "export_in_child", no_export)
    wanted = CASES[case]
    wanted.prepare(desk.files)
    before = names(desk.files), names(desk.out)
    result = run_cli(*wanted.arguments(desk))
    assert result.exit_code == wanted.code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output
    assert "please report it" not in result.stderr
    for word in wanted.words:
        assert word in result.stderr
    assert names(desk.out) == before[1]
    assert set(names(desk.files)) <= {*before[0], "net.imported", "__pycache__"}
    assert desk.plain.read_bytes() == desk.onnx.read_bytes() == OLD


@pytest.mark.parametrize("case", ["unknown torchvision model", "a factory that raises", "NaN weights"])
def test_debug_raises_the_exception(desk: Desk, case: str) -> None:
    wanted = CASES[case]
    wanted.prepare(desk.files)
    result = run_cli(*wanted.arguments(desk), "--debug")
    assert result.exit_code == 1
    assert type(result.exception) is (UsageError if wanted.code == 2 else DoconvError)
    assert wanted.words[0] in str(result.exception)


PLACES = {
    "absent/out.safetensors": "does not exist",
    "folder.safetensors": "it is a folder",
    "file/out.safetensors": "is not a folder",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["to-doconv", "fold", "fold --onnx"])
def test_a_place_that_cannot_be_written(desk: Desk, place: str, command: str) -> None:
    (desk.out / "folder.safetensors").mkdir()
    (desk.out / "file").write_bytes(OLD)
    before = names(desk.out)
    target = desk.out / place
    arguments: dict[str, list[Any]] = {
        "to-doconv": ["to-doconv", f"{desk.source}:tiny", "-o", target],
        "fold": ["fold", desk.files / "a.pth", "--model", f"{desk.source}:tiny", "-o", target],
        # the other output is not written either
        "fold --onnx": [
            *("fold", desk.files / "a.pth", "--model", f"{desk.source}:tiny", "--onnx", target, "-o", desk.plain)
        ],
    }
    result = run_cli(*arguments[command])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: cannot write '{target}'")
    assert PLACES[place] in result.stderr
    assert names(desk.out) == before
    assert names(desk.out / "folder.safetensors") == []
    assert desk.plain.read_bytes() == OLD


@pytest.mark.parametrize(
    "arguments", [["to-doconv"], ["fold", "a", "--opset", "x"], ["verify", "a.onnx"], ["absent"], ["fold", "--absent"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = run_cli(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


def test_a_file_that_names_code_does_not_run_it(desk: Desk) -> None:
    write_model(tiny(desk.files), desk.files / "b.safetensors", f"{desk.source}:tiny")
    (desk.files / "net.imported").unlink()
    (desk.files / "net.py").write_text(TINY + "\n")
    for arguments in (
        ["fold", desk.files / "b.safetensors", "-o", desk.plain],
        ["to-doconv", desk.files / "b.safetensors", "-o", desk.plain],
        ["flops", desk.files / "b.safetensors"],
    ):
        result = run_cli(*arguments)
        assert result.exit_code == 1
        assert "its code is only run if you name it: --model net.py:tiny" in result.stderr
        assert not (desk.files / "net.imported").exists()
    named = run_cli("fold", desk.files / "b.safetensors", "--model", f"{desk.source}:tiny", "-o", desk.plain)
    assert named.exit_code == 0
    assert (desk.files / "net.imported").exists()
