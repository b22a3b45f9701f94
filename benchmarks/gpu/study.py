"""The study's nets on Fashion-MNIST, on the card: pairs of trainings that differ in nothing but the conversion.

As in examples/study, with as many seeds as the time allows. $FASHION_MNIST is a folder with the data set's four files;
where it is not there, nothing is trained and the JSON says so. A dry run draws images.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import data
import torch
from nets import NETS
from on_device import Run, quartiles
from torch import Tensor
from torch.nn import functional as F

from doconv_convert import to_doconv

BATCH, LEARNING_RATE, EPOCHS = 64, 0.05, 3
ROOT = Path(__file__).resolve().parents[2]


def images(run: Run) -> tuple[data.Split, data.Split]:
    if run.dry:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(256, 1, 28, 28, generator=generator), torch.randint(10, (256,), generator=generator)
        return drawn, drawn
    folder = Path(os.environ.get("FASHION_MNIST", ROOT / "shared/fashion-mnist"))
    if not folder.is_dir() and not data.DEBIAN.is_dir():
        run.write(reason=f"Fashion-MNIST is not there: $FASHION_MNIST names no folder ({folder.name}).")
        print("skipped: Fashion-MNIST is not there")
        sys.exit(0)
    if folder.is_dir():
        data.DEBIAN = folder
    train, test = ((x.to(run.device), y.to(run.device)) for x, y in data.fashion())
    return train, test


def train(run: Run, net: str, arm: str, seed: int, split: tuple[data.Split, data.Split]) -> dict[str, Any]:
    (x, labels), test = split
    torch.manual_seed(seed)
    model = NETS[net]()
    model = (model if arm == "plain" else to_doconv(model, seed=seed)).to(run.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    count, generator = len(labels), torch.Generator().manual_seed(seed)
    steps = EPOCHS * (count // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for _ in range(EPOCHS):
        order = torch.randperm(count, generator=generator).to(run.device)
        for chosen in order.split(BATCH)[: count // BATCH]:
            loss = F.cross_entropy(model(x[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    run.wait()
    seconds = time.perf_counter() - start
    return {
        "cell": [net, arm, seed],
        "loss": float(loss.detach()),
        "accuracy": accuracy(model.eval(), *test),
        "seconds": round(seconds, 2),
    }


@torch.no_grad()
def accuracy(model: torch.nn.Module, x: Tensor, labels: Tensor) -> float:
    found = torch.cat([model(part).argmax(1) for part in x.split(2000)])
    return float((found == labels).double().mean())


def main() -> None:
    run = Run(__doc__)
    split = images(run)
    rows: list[dict[str, Any]] = []
    longest = 0.0
    for seed in range(1 if run.dry else 20):
        for net in NETS:
            if run.left < 2 * longest + 2 and not run.dry:
                return  # whole pairs alone
            for arm in ("plain", "K"):
                start = time.monotonic()
                rows.append(train(run, net, arm, seed, split))
                longest = max(longest, time.monotonic() - start)
                print(rows[-1], flush=True)
            gains = [b["accuracy"] - a["accuracy"] for a, b in zip(rows[::2], rows[1::2], strict=True)]
            run.write(epochs=EPOCHS, batch=BATCH, rows=rows, gain=quartiles(gains))


if __name__ == "__main__":
    main()
