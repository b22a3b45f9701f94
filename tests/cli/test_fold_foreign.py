"""Foreign checkpoints from the file to the proven ONNX by one command: by keys, by a class at hand, by the zoo."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from support import build_model, difference, randomize_and_calibrate, run, varied_images
from support_cli import names, run_cli, tiny, tiny_file
from support_foreign import Authors, rebuild, wrapped
from torch import Tensor, nn

from doconv_convert.artifacts.sources.source import build, parse_source

# Two fp32 implementations of one of these nets against float64; the proof's own bounds are up to 7e-5 (resnext50).
SAME = 1e-4
# Of the output's scale: so far does D move it, or almost any wrong fold would pass.
MOVED = 0.1


def outputs_of(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(got)


def randomized(model: nn.Module, x: Tensor, d_mul: int | None = None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rebuild(model, d_mul=d_mul)
    return randomize_and_calibrate(model, x, seed=0)


def without_d(model: nn.Module) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Authors) and hasattr(module, "D"):
                module.D.zero_()


def fold_and_compare(folder: Path, foreign: nn.Module, source: str, x: Tensor, *options: Any) -> dict[str, Any]:
    """`fold --onnx` of the foreign net's checkpoint: proven, and the outputs are the foreign net's own."""
    out = folder / "out"
    out.mkdir()
    targets = ["--onnx", out / "m.onnx", "-o", out / "plain.safetensors"]
    result = run_cli("fold", folder / "a.pth", "--model", source, *targets, *options, "--json")
    assert result.exit_code == 0, result.stderr
    said: dict[str, Any] = json.loads(result.stdout)
    assert said["proven"] is True
    assert names(out) == ["m.certificate.json", "m.onnx", "m.reference.npz", "plain.safetensors"]
    expected = run(foreign.double(), x.double())
    assert difference(outputs_of(out / "m.onnx", x), expected) < SAME
    plain = build(parse_source(source)).eval()
    if plain.state_dict().keys() == load_file(out / "plain.safetensors").keys():
        plain.load_state_dict(load_file(out / "plain.safetensors"), strict=True)
        assert difference(run(plain, x), expected) < SAME
    without_d(foreign)
    assert difference(run(foreign, x.double()), expected) > MOVED
    return said


def test_a_foreign_checkpoint_becomes_a_proven_file(tmp_path: Path) -> None:
    x = varied_images(4, 2, 6, 6)
    foreign = randomized(tiny(tmp_path), x, d_mul=28)
    torch.save(wrapped(foreign), tmp_path / "a.pth")
    said = fold_and_compare(tmp_path, foreign, f"{tiny_file(tmp_path)}:tiny", x)
    assert said["folded"] == ["first", "grouped", "depthwise"]
    assert set(said["proof"]["sensitivity"]) == set(said["folded"])
    assert "3 kernels; kernel and feature composition agree" in said["proof"]["statuses"][0]["detail"]
    assert any("the authors' formula is assumed" in note for note in said["notes"])


CLASSES = """
import torch
from torch import nn
from support_cli import ROOT
from support_foreign import Gated, rebuild
from torch.nn.utils.parametrizations import weight_norm

INPUT_SHAPE = (1, 2, 6, 6)


class Net(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), head

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.first(x)))).mean((2, 3))


def gated():
    return rebuild(Net(nn.Conv2d(8, 4, 3)), Gated)


def normed():
    return Net(weight_norm(nn.Conv2d(8, 4, 3)))
"""


@pytest.mark.parametrize(
    ("factory", "options", "folded"),
    [
        ("gated", [], ["first", "head"]),
        pytest.param("normed", ["--constant-kernels"], ["head"], marks=pytest.mark.zoo),
    ],
)
def test_a_class_at_hand_is_folded_by_graph(
    tmp_path: Path, factory: str, options: list[str], folded: list[str]
) -> None:
    (tmp_path / "classes.py").write_text(CLASSES)
    source, x = f"{tmp_path}/classes.py:{factory}", varied_images(4, 2, 6, 6)
    foreign = randomize_and_calibrate(build(parse_source(source)), x, seed=3)
    torch.save(foreign.state_dict(), tmp_path / "a.pth")
    out = tmp_path / "m.onnx"
    result = run_cli("fold", tmp_path / "a.pth", "--model", source, "--onnx", out, "--json", *options)
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["proven"] is True
    assert said["folded"] == folded
    assert f"{len(folded)} foreign layers folded by graph" in said["proof"]["statuses"][0]["detail"]
    assert difference(outputs_of(out, x), run(foreign.double(), x.double())) < SAME
    against = ["--against", tmp_path / "a.pth", "--model", source]
    assert run_cli("verify", out, *against, *options).exit_code == 0
    with torch.no_grad():  # the control: another checkpoint of the same net is not what was exported
        foreign.head.bias.add_(1.0)  # type: ignore[union-attr, operator]
    torch.save(foreign.float().state_dict(), tmp_path / "a.pth")
    assert run_cli("verify", out, *against, *options).exit_code == 3


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnext50_32x4d", "mobilenet_v2"])
def test_the_zoo_rebuilt_with_the_foreign_layer(tmp_path: Path, name: str) -> None:
    x = varied_images(4, 3, 64, 64)
    foreign = randomized(build_model(f"torchvision:{name}"), x)
    torch.save(wrapped(foreign), tmp_path / "a.pth")
    fold_and_compare(tmp_path, foreign, f"torchvision:{name}", x, "--input-shape", "1,3,64,64")
