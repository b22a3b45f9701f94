"""One training of the second edition: from a cell to its row. A cell that is run again gives the same numbers.

The row holds the mean loss of every hundredth of the steps, the median lever of the layers at every twentieth, and the
score. One thread, on the CPU.
"""

from __future__ import annotations

import copy
import math
import platform
import re
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from cells import SEEDS, Cell, Row
from tasks import WORK, Batch, Task
from torch import Tensor, nn

from doconv_convert import lever, param_groups, to_doconv
from doconv_convert.nn.overlay import stored_kernels

CURVE, LEVERS = 100, 20  # points of a row
HUGE = 1e6  # a loss above it has diverged: the first ones are below 3


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"{cpu[1].strip() if cpu else platform.processor()}, torch {torch.__version__}"


def start(cell: Cell) -> nn.Module:
    """The arm's net of this seed: the same function on every arm."""
    torch.manual_seed(cell.seed)
    model = WORK[cell.task, cell.net].build()
    return model if cell.arm == "plain" else to_doconv(model, d_mul=cell.arm, seed=cell.seed)


def backward(model: nn.Module, task: Task, batch: Batch) -> Tensor:
    loss = task.loss(model(batch[0]), batch[1])
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def median_lever(model: nn.Module) -> float:
    return statistics.median(lever(model).values())


def multiple(cell: Cell, model: nn.Module, task: Task, batch: Batch) -> float:
    """m: D's learning rate over that of the rest. Of "1/lever", from the fresh net's median lever on the first batch:
    D's part of the first step is then as large as W's."""
    if not isinstance(cell.m, str):
        return 1.0 if cell.m is None else float(cell.m)
    if cell.m != "1/lever":
        raise ValueError(f"m: got '{cell.m}', expected a number or '1/lever'.")
    probe = copy.deepcopy(model)
    backward(probe, task, batch)
    return float(f"{1 / median_lever(probe):.4g}")


def optimizer_of(cell: Cell, model: nn.Module, m: float, task: Task) -> torch.optim.Optimizer:
    decay = task.weight_decay[cell.optimizer]
    groups = param_groups(model, weight_decay=decay, lr=cell.rate, d_lr=m * cell.rate)
    if cell.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cell.rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=cell.rate)


def departure(model: nn.Module) -> float | None:
    """The median over the layers of ||D|| / ||I||: how far D^ has gone from the identity, where it starts."""
    sizes = []
    for module in model.modules():
        for kernel in stored_kernels(module):
            d = getattr(module, kernel.d_name)
            sizes.append(float(d.detach().norm()) / (d.shape[0] * d.shape[1]) ** 0.5)
    return statistics.median(sizes) if sizes else None


def run(cell: Cell, steps: int | None = None, device: str = "cpu") -> Row:
    """Train a cell (for `steps` steps, where a try shall be short).

    Returns:
        A row: "cell"; "m", the multiple that D's rate was; "curve", the mean loss of each hundredth of the run;
        "levers"; "departure"; "loss", the mean of the last tenth (None if diverged); "score"; "diverged";
        "seconds" of processor time (on a GPU of the clock); "machine".
    """
    torch.set_num_threads(1)
    place, work = torch.device(device), WORK[cell.task, cell.net]
    task, count = work.task, steps or work.steps * cell.length
    clock = time.process_time if device == "cpu" else time.perf_counter
    model = start(cell).to(place).train()
    generator = torch.Generator().manual_seed(cell.seed)

    def batch() -> Batch:
        inputs, targets = task.batch(generator)
        return inputs.to(place), targets.to(place)

    begun, next_batch = clock(), batch()
    m = multiple(cell, model, task, next_batch)
    optimizer = optimizer_of(cell, model, m, task)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    losses: list[Tensor] = []
    levers: list[float] = []
    finite = True
    every, watched = max(1, count // LEVERS), max(1, count // CURVE)
    for step in range(count):
        optimizer.zero_grad()
        losses.append(backward(model, task, next_batch))
        if step % watched == 0 and not float(losses[-1]) < HUGE:
            finite = False
            break
        if cell.arm != "plain" and step % every == 0 and len(levers) < LEVERS:
            levers.append(float(f"{median_lever(model):.4g}"))
        optimizer.step()
        schedule.step()
        if step + 1 < count:
            next_batch = batch()
    return {
        "cell": list(cell),
        "m": None if cell.m is None else m,
        **_ending(cell, model, task, torch.stack(losses).tolist() if finite else [], place),
        "levers": levers,
        "departure": _rounded(departure(model)),
        "seconds": round(clock() - begun, 1),
        "machine": machine() if device == "cpu" else f"{torch.cuda.get_device_name()}, torch {torch.__version__}",
    }


@torch.no_grad()
def _ending(cell: Cell, model: nn.Module, task: Task, losses: list[float], place: torch.device) -> Row:
    part = "test" if cell.seed in SEEDS else "validation"
    lowest = task.floor(part)
    score = task.score(model.eval(), part, place) if losses else math.nan
    diverged = not score > lowest  # NaN too
    return {
        "curve": [_rounded(value) for value in curve(losses)],
        "loss": None if diverged else _rounded(statistics.fmean(losses[-max(1, len(losses) // 10) :])),
        "score": round(lowest if diverged else score, 4),
        "diverged": diverged,
    }


def curve(losses: list[float], points: int = CURVE) -> list[float]:
    """The mean of each of `points` equal parts of the run; each step where there are fewer."""
    points = min(points, len(losses))
    edges = [len(losses) * point // points for point in range(points + 1)] if points else []
    return [statistics.fmean(losses[a:b]) for a, b in pairwise(edges)]


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
