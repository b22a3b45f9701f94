"""The second edition's plots: differences with their intervals, loss curves, the lever over training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from cells import Row
from comparisons import Comparison
from intervals import interval
from tasks import WORK

matplotlib.rcParams["svg.hashsalt"] = "study"
WIDTH = 3  # panels


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def differences(compared: Sequence[tuple[str, Comparison]], path: Path) -> None:
    """Each comparison's mean difference and its interval, and the pairs behind it; a panel for each unit."""
    units = sorted({WORK[one.setting[:2]].task.unit for _, one in compared})
    figure, axes = plt.subplots(1, len(units), figsize=(10, 1.2 + 0.3 * len(compared)), squeeze=False)
    for axis, unit in zip(axes.flat, units, strict=True):
        chosen = [(name, one) for name, one in compared if WORK[one.setting[:2]].task.unit == unit]
        for row, (_, one) in enumerate(chosen):
            mean, half = interval(one.scores)
            axis.plot(one.scores, [row] * len(one.scores), ".", color="gray", markersize=4)
            axis.errorbar(mean, row, xerr=half, fmt="o", color="C0", capsize=3)
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_yticks(range(len(chosen)), [name for name, _ in chosen], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel(f"DO-Conv minus plain, {unit}")
    figure.tight_layout()
    save(figure, path)


def panels(
    compared: Sequence[tuple[str, Comparison]], path: Path, draw: Callable[[Any, Comparison], None], label: str
) -> None:
    rows = (len(compared) + WIDTH - 1) // WIDTH
    figure, axes = plt.subplots(rows, WIDTH, figsize=(10, 2.4 * rows + 0.6), squeeze=False, layout="constrained")
    for axis, (name, one) in zip(axes.flat, compared, strict=False):
        draw(axis, one)
        axis.set_yscale("log")
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
    for axis in list(axes.flat)[len(compared) :]:
        axis.axis("off")
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("part of the steps, %", fontsize=9)
    figure.supylabel(label, fontsize=9)
    save(figure, path)


def mean_curve(rows: Sequence[Row], name: str) -> np.ndarray[Any, Any]:
    """Over the seeds; without runs that ended early."""
    longest = max(len(row[name]) for row in rows)
    return np.mean([row[name] for row in rows if len(row[name]) == longest], axis=0)  # type: ignore[no-any-return]


def _losses(axis: Any, one: Comparison) -> None:
    for label, rows in zip(("plain", "DO-Conv"), zip(*one.pairs, strict=True), strict=True):
        curve = mean_curve(rows, "curve")
        if not len(curve):  # all diverged
            continue
        window = max(1, len(curve) // 10)
        smooth = np.convolve(curve, np.ones(window) / window, "valid")
        axis.plot(100 * (np.arange(len(smooth)) + window) / len(curve), smooth, label=label, linewidth=1)


def _levers(axis: Any, one: Comparison) -> None:
    for number, (_, row) in enumerate(one.pairs):
        levers = row["levers"]
        label = "a seed" if number == 0 else None
        axis.plot(100 * np.arange(len(levers)) / max(1, len(levers)), levers, color="C0", linewidth=0.7, label=label)


def curves(compared: Sequence[tuple[str, Comparison]], path: Path) -> None:
    """The training loss, a running mean over a tenth of the steps, the mean over the seeds."""
    panels(compared, path, _losses, "training loss")


def levers(compared: Sequence[tuple[str, Comparison]], path: Path) -> None:
    """The median lever of DO-Conv's layers over training, at m = 1."""
    panels(compared, path, _levers, "median lever")
