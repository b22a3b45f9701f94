"""`verify` of files that are not what they are held against, and a certificate of bytes that were not proven."""

import hashlib
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
from adversarial.harness import fold_command, source_of, trained
from onnx import numpy_helper
from support_cli import run_cli
from torch import nn

from doconv_convert import fold

NET = "hidden.Gated"
BLIND = "bright"  # its kernel shows in no output: a ReLU stays closed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.pth, folded to a.onnx with its certificate; b.pth, the same net trained on; plain.pth, without a D."""
    folder = tmp_path_factory.mktemp("wrong")
    live = trained(NET)
    torch.save(live.state_dict(), folder / "a.pth")
    seen = fold_command(folder / "a.pth", source_of(NET), folder / "a.onnx")
    assert seen.proven, seen.words
    torch.save(fold(live).state_dict(), folder / "folded.pth")
    with torch.no_grad():
        live.get_submodule(BLIND).D.add_(0.01)
    torch.save(live.state_dict(), folder / "b.pth")
    for name, parameter in live.named_parameters():
        if name.endswith("D"):
            nn.init.zeros_(parameter)
    torch.save(live.state_dict(), folder / "untrained.pth")
    return folder


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Path:
    for path in made.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


def edit(path: Path, change: Callable[[Any], Any], kernel: tuple[int, ...] = (8, 3, 3, 3), which: int = 1) -> None:
    """Change the `which`-th initializer of that shape: 1 is the blind kernel."""
    model = onnx.load(path)
    found = [tensor for tensor in model.graph.initializer if tuple(tensor.dims) == kernel]
    array = numpy_helper.to_array(found[which])
    found[which].CopyFrom(numpy_helper.from_array(change(array).astype(array.dtype), found[which].name))
    onnx.save(model, path)


def one_bit(array: Any) -> Any:
    changed = array.copy()
    changed.view(np.int32).flat[0] ^= 1
    return changed


def half(array: Any) -> Any:
    return array.astype(np.float16)


def negated(array: Any) -> Any:
    return -array


def against(candidate: Path, checkpoint: Path, source: str = source_of(NET)) -> Any:
    return run_cli("verify", candidate, "--against", checkpoint, "--model", source, "--json")


def by_certificate(candidate: Path, certificate: Path) -> Any:
    return run_cli("verify", candidate, "--certificate", certificate, "--json")


def require_refusal(result: Any) -> None:
    """Not proven, an exit code of ours, a sentence, and no crash."""
    assert result.exit_code in (1, 3), result.stdout + result.stderr
    assert isinstance(result.exception, SystemExit)
    assert "please report" not in result.stderr
    said = json.loads(result.stdout)
    assert said.get("proven", False) is False
    assert said.get("error") or any(status["state"] == "failed" for status in said["statuses"])


def test_the_right_file_is_proven_by_both(files: Path) -> None:
    """What the others spoil is what they are refused for; and the blind kernel is named."""
    result = against(files / "a.onnx", files / "a.pth")
    said = json.loads(result.stdout)
    assert (result.exit_code, said["proven"]) == (0, True), result.stderr
    assert any(f"'{BLIND}'" in finding for status in said["statuses"] for finding in status["findings"])
    result = by_certificate(files / "a.onnx", files / "a.certificate.json")
    assert (result.exit_code, json.loads(result.stdout)["proven"]) == (0, True), result.stderr


@pytest.mark.parametrize("change", [one_bit, half, negated], ids=lambda change: change.__name__)
def test_an_edited_blind_kernel_is_neither_the_checkpoints_nor_the_certificates(files: Path, change: Any) -> None:
    edit(files / "a.onnx", change)
    require_refusal(against(files / "a.onnx", files / "a.pth"))
    require_refusal(by_certificate(files / "a.onnx", files / "a.certificate.json"))


@pytest.mark.parametrize("checkpoint", ["b.pth", "untrained.pth"])
def test_another_training_is_refused(files: Path, checkpoint: str) -> None:
    """b.pth differs in the blind kernel alone."""
    require_refusal(against(files / "a.onnx", files / checkpoint))


def test_the_folded_checkpoint_is_right_too(files: Path) -> None:
    result = against(files / "a.onnx", files / "folded.pth")
    assert (result.exit_code, json.loads(result.stdout)["proven"]) == (0, True), result.stdout + result.stderr


@pytest.mark.parametrize("net", ["hidden.ClosedRelu", "hidden.Plain"])
def test_another_architecture_is_refused(files: Path, net: str) -> None:
    """ClosedRelu has the same keys and shapes, and constrains the blind kernel."""
    require_refusal(against(files / "a.onnx", files / "a.pth", source_of(net)))


@pytest.mark.parametrize(
    "content", [b"", b"<html></html>", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 99]
)
def test_what_is_no_model_is_refused(files: Path, content: bytes) -> None:
    for wrong in ("a.onnx", "a.certificate.json", "a.pth"):
        kept = (files / wrong).read_bytes()
        (files / wrong).write_bytes(content)
        if wrong != "a.certificate.json":
            require_refusal(against(files / "a.onnx", files / "a.pth"))
        if wrong != "a.pth":
            require_refusal(by_certificate(files / "a.onnx", files / "a.certificate.json"))
        (files / wrong).write_bytes(kept)


def test_folders_and_missing_files_are_refused(files: Path) -> None:
    for place in (files, files / "missing.onnx"):
        require_refusal(by_certificate(place, files / "a.certificate.json"))
        require_refusal(by_certificate(files / "a.onnx", place))
        require_refusal(against(place, files / "a.pth"))


@pytest.mark.parametrize("figure", ["sha256", "plain_error", "norm"])
def test_a_forged_certificate_of_an_edited_file_fails_on_what_is_run(files: Path, figure: str) -> None:
    """The hash and the digest fit, as a forger makes them; the outputs are run anew."""
    edit(files / "a.onnx", negated, which=0)  # a kernel that shows
    content = json.loads((files / "a.certificate.json").read_text())
    content["onnx"]["sha256"] = hashlib.sha256((files / "a.onnx").read_bytes()).hexdigest()
    if figure == "norm":
        content["outputs"]["tensors"][0]["norm"] *= 1e9
    if figure == "plain_error":
        content["outputs"]["tensors"][0]["plain_error"] = 1.0
    del content["digest"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["digest"] = f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"
    (files / "a.certificate.json").write_text(json.dumps(content, indent=1) + "\n")
    require_refusal(by_certificate(files / "a.onnx", files / "a.certificate.json"))


@pytest.fixture
def second_writer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, bytes], list[bytes]]:
    """Another process that replaces a file as soon as it is in place."""

    def watch(target: Path, intruder: bytes) -> list[bytes]:
        """From now on `target` holds `intruder` after every rename to it; the list has what was there."""
        seen: list[bytes] = []
        for name in ("replace", "rename", "link"):
            monkeypatch.setattr(os, name, _followed(getattr(os, name), target, intruder, seen))
        return seen

    return watch


def _followed(move: Callable[..., None], target: Path, intruder: bytes, seen: list[bytes]) -> Callable[..., None]:
    def moved(source: Any, destination: Any, **options: Any) -> None:
        move(source, destination, **options)
        if Path(destination) == target:
            seen.append(target.read_bytes())
            target.write_bytes(intruder)

    return moved


def test_a_certificate_is_of_the_bytes_that_were_proven(
    files: Path, tmp_path: Path, second_writer: Callable[[Path, bytes], list[bytes]]
) -> None:
    """A second writer replaces the file between its installation and whatever comes next. It brings a file of equal
    outputs, so that nothing but the hash can tell."""
    edit(files / "a.onnx", negated)
    intruder = (files / "a.onnx").read_bytes()
    target = tmp_path / "out.onnx"
    proven = second_writer(target, intruder)
    fold_command(files / "a.pth", source_of(NET), target)
    assert proven, "the second writer never came"
    assert target.read_bytes() == intruder != proven[-1]
    certificate = tmp_path / "out.certificate.json"
    if certificate.exists():
        certified = json.loads(certificate.read_text())["onnx"]["sha256"]
        assert certified == hashlib.sha256(proven[-1]).hexdigest()
        require_refusal(by_certificate(target, certificate))


def test_a_side_file_of_another_writer_is_noticed(
    files: Path, tmp_path: Path, second_writer: Callable[[Path, bytes], list[bytes]]
) -> None:
    proven = second_writer(tmp_path / "out.reference.npz", (files / "a.reference.npz").read_bytes() + b" ")
    fold_command(files / "a.pth", source_of(NET), tmp_path / "out.onnx")
    assert proven, "the second writer never came"
    if (tmp_path / "out.certificate.json").exists():
        require_refusal(by_certificate(tmp_path / "out.onnx", tmp_path / "out.certificate.json"))
