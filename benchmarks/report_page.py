"""The report of a really trained ResNet-18, and its pictures as docs/report.md shows them.

    python benchmarks/report_page.py [--epochs 6] [--folder docs/data/report]

Trains torchvision's ResNet-18 with DO-Conv layers on 1,437 real handwritten digits (8x8, enlarged to 32x32), folds,
exports and proves it with `fold --report`, and takes screenshots with Chromium. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate
from torchvision.models import resnet18

from doconv_convert import save, to_doconv
from doconv_convert.artifacts.sources import parse_source

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support_browser import browser  # noqa: E402

from sample_models.digits import jitter, load_digits, split  # noqa: E402

BATCH, PEAK_RATE, DECAY, CLASSES = 64, 2e-3, 0.05, 10
# Of the page: the checks on a phone, the pictures on a desk, in both themes.
SHOTS = (("phone-light", 390, False, None), ("desk-dark", 1440, True, "#pictures"))
SHOT_HEIGHT = {390: 844, 1440: 1020}


def enlarged(images: Tensor) -> Tensor:
    """(N, 1, 8, 8) -> (N, 3, 32, 32)."""
    return interpolate(images, size=(32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1).contiguous()


def train(epochs: int, seed: int = 0) -> tuple[torch.nn.Module, float]:
    """The trained model in eval mode, and its accuracy on the held-out digits."""
    torch.manual_seed(seed)
    (images, labels), (held, truth) = split(*load_digits())
    model = to_doconv(resnet18(num_classes=CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=DECAY)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        start = time.perf_counter()
        for chosen in torch.split(torch.randperm(len(images)), BATCH):
            loss = cross_entropy(model(enlarged(jitter(images[chosen]))), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {float(loss.detach()):.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval()
    with torch.no_grad():
        return model, float((model(enlarged(held)).argmax(1) == truth).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "data" / "report")
    options = parser.parse_args()
    model, accuracy = train(options.epochs)
    print(f"{accuracy:.1%} of the held-out digits")
    options.folder.mkdir(parents=True, exist_ok=True)
    page = options.folder.resolve() / "resnet18.html"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(
            model, folder / "trained.safetensors", source=parse_source("torchvision:resnet18", {"num_classes": CLASSES})
        )
        np.save(folder / "digits.npy", enlarged(split(*load_digits())[1][0][:3]).numpy())
        command = ["fold", "trained.safetensors", "--onnx", "resnet18.onnx", "--input", "digits.npy", "--report"]
        subprocess.run([sys.executable, "-m", "doconv_convert", *command, str(page)], cwd=folder, check=True)
        with browser(folder / "profile") as tab:
            for shot, width, dark, place in SHOTS:
                tab.open(page, width=width, height=SHOT_HEIGHT[width], dark=dark)
                if place is not None:
                    tab.evaluate(f"document.querySelector('{place}').scrollIntoView()")
                tab.screenshot(options.folder / f"{shot}.png")


if __name__ == "__main__":
    main()
