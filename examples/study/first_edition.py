"""The study's first edition: pairs of trainings that differ in nothing else, D at the rate of the rest.

    python examples/study/first_edition.py --jobs 2 --resume docs/data/study.jsonl

A cell is one training: data x net x arm x seed. All arms of a seed start as the same function (a conversion starts
exactly), see the same batches in the same order and use the same optimizer. The arms: `plain` convolutions; `K` and
`2K` for DO-Conv with D_mul = K and 2K. One thread a cell: a cell run again gives the same numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from data import DATA, EPOCHS
from nets import NETS
from torch import Tensor, nn
from torch.nn import functional as F

from doconv_convert import to_doconv

ARMS = ("plain", "K", "2K")
BATCH = 64
LEARNING_RATE = 0.05
Cell = tuple[str, str, str, int]


def build(net: str, arm: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = NETS[net]()
    return model if arm == "plain" else to_doconv(model, d_mul=arm, seed=seed)


def batches(count: int, epochs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from (order[start : start + BATCH] for start in range(0, count - BATCH + 1, BATCH))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(500)])
    return float((found == labels).double().mean())


def run(cell: Cell, epochs: int | None = None) -> dict[str, Any]:
    """A cell's loss at each step, its test accuracy, and the seconds of processor time that the steps took."""
    return train(cell, epochs)[1]


def train(cell: Cell, epochs: int | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Train one cell: the model in eval mode, and `run`'s row."""
    data, net, arm, seed = cell
    torch.set_num_threads(1)
    (images, labels), test = DATA[data]()
    model = build(net, arm, seed).train()
    order = list(batches(len(labels), epochs or EPOCHS[data], seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(order))
    losses, start = [], time.process_time()
    for chosen in order:
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    seconds = time.process_time() - start
    rounded = [float(f"{loss:.6g}") for loss in losses]
    row = {"cell": list(cell), "losses": rounded, "accuracy": accuracy(model, *test), "seconds": round(seconds, 1)}
    return model, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--epochs", type=int, help="instead of the study's own, for a try")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--resume", type=Path, default=Path("docs/data/study.jsonl"), help="results; what is there stays"
    )
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.resume.read_text().splitlines()] if options.resume.exists() else []
    done = {tuple(row["cell"]) for row in rows}
    # seeds outermost: a study that is cut short has whole pairs
    cells = [(d, n, a, s) for s, d, n, a in product(range(options.seeds), options.data, options.nets, ARMS)]
    todo = [cell for cell in cells if cell not in done]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool, options.resume.open("a") as file:
        for number, future in enumerate(as_completed([pool.submit(run, c, options.epochs) for c in todo]), 1):
            row = future.result()
            print(json.dumps(row), file=file, flush=True)
            name = " ".join(map(str, row["cell"]))
            print(f"[{number}/{len(todo)}] {name}: accuracy {row['accuracy']:.4f}, {row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
