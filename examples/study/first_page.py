"""The first edition's section of the study's page, and its plots, from its results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from intervals import interval

Row = dict[str, Any]
Runs = dict[tuple[str, str], dict[str, dict[int, Row]]]  # (data, net) -> arm -> seed -> its row
ARMS = ("K", "2K")

MACHINE = "AMD EPYC (2 cores), torch 2.14.1+cu130"  # its rows do not say it

HEAD = """## First edition: equal rates, small nets

`python examples/study/first_edition.py`. Every pair starts as the same function, sees the same batches in the same
order, and has the same optimizer (SGD, momentum 0.9, weight decay 5e-4, cosine from 0.05, batches of 64) with the same
rate for D: only the layer differs. Differences are over-parameterized minus plain, means over the seeds, with the 95 %
confidence interval of the paired mean (Student's t). An interval that holds zero shows no difference. The last loss is
the mean over the last tenth of the steps, the time that of the processor, the median over the pairs.

For comparison, what the authors publish for ImageNet (top-1 points gained, settings untouched, in their repository
yangyanli/DO-Conv and arXiv 2006.12030): +1.01 for a plain 18-layer net; +0.82, +0.49, +0.08, +0.46 and +0.07 for
ResNet-v1 of 18, 34, 50, 101 and 152 layers; +0.40 for ResNeXt-50 32x4d; +0.03 for MobileNet-v1. Small networks on small
images, as here, can neither confirm nor refute those.
"""


def read(path: Path) -> Runs:
    runs: Runs = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        data, net, arm, seed = row["cell"]
        runs.setdefault((data, net), {}).setdefault(arm, {})[seed] = row
    return dict(sorted(runs.items()))


def last_loss(row: Row) -> float:
    """The mean loss of the last tenth of the steps."""
    losses = row["losses"]
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def paired(arms: dict[str, dict[int, Row]], arm: str, figure: Callable[[Row], float]) -> list[float]:
    seeds = sorted(arms["plain"].keys() & arms.get(arm, {}).keys())
    return [figure(arms[arm][seed]) - figure(arms["plain"][seed]) for seed in seeds]


def table(runs: Runs) -> list[str]:
    lines = [
        "| data | net | D_mul | seeds | plain accuracy, % | accuracy, points | last loss | time, of plain |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for (data, net), arms in runs.items():
        plain = statistics.fmean(100 * row["accuracy"] for row in arms["plain"].values())
        for arm in ARMS:
            points = paired(arms, arm, lambda row: 100 * row["accuracy"])
            losses = paired(arms, arm, last_loss)
            times = [arms[arm][seed]["seconds"] / arms["plain"][seed]["seconds"] for seed in arms[arm]]
            (gain, wide), (less, loose) = interval(points), interval(losses)
            lines.append(
                f"| {data} | {net} | {arm} | {len(points)} | {plain:.2f} | {gain:+.2f} ± {wide:.2f} | "
                f"{less:+.4f} ± {loose:.4f} | {statistics.median(times):.2f} |"
            )
    return lines


def verdict(runs: Runs) -> str:
    """What the table says in words: how many intervals lie above, around and below zero."""
    spans = [interval(paired(arms, arm, lambda row: 100 * row["accuracy"])) for arms in runs.values() for arm in ARMS]
    above = sum(mean - half > 0 for mean, half in spans)
    below = sum(mean + half < 0 for mean, half in spans)
    seeds = min(len(arms["plain"]) for arms in runs.values())
    cells = [row for arms in runs.values() for rows in arms.values() for row in rows.values()]
    minutes = sum(row["seconds"] for row in cells) / 60
    return (
        f"{len(cells)} trainings, {minutes:.0f} minutes of processor time on {MACHINE}.\n\n"
        f"Of {len(spans)} comparisons of the test accuracy, {above} show a gain, {below} a loss, and "
        f"{len(spans) - above - below} no difference that {seeds} seeds could tell."
    )


def plot_accuracy(runs: Runs, path: Path) -> None:
    """Each comparison's mean difference in accuracy and its interval; the single pairs behind them."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    labels = []
    for row, ((data, net), arm) in enumerate((one, arm) for one in runs for arm in ARMS):
        points = paired(runs[data, net], arm, lambda row: 100 * row["accuracy"])
        mean, half = interval(points)
        axis.plot(points, [row] * len(points), ".", color="gray", markersize=4)
        axis.errorbar(mean, row, xerr=half, fmt="o", color=f"C{ARMS.index(arm)}", capsize=3)
        labels.append(f"{data}, {net}, {arm}")
    axis.axvline(0, color="gray", linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy minus the plain net's, points")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def plot_losses(runs: Runs, path: Path) -> None:
    """The training loss minus the plain net's, smoothed, with the spread over the seeds."""
    figure, axes = plt.subplots(2, (len(runs) + 1) // 2, figsize=(10, 5.5), squeeze=False, layout="constrained")
    for axis, ((data, net), arms) in zip(axes.flat, runs.items(), strict=False):
        for arm in ARMS:
            seeds = sorted(arms["plain"].keys() & arms[arm].keys())
            pairs = [np.subtract(arms[arm][seed]["losses"], arms["plain"][seed]["losses"]) for seed in seeds]
            window = max(1, len(pairs[0]) // 25)
            smooth = np.array([np.convolve(one, np.ones(window) / window, "valid") for one in pairs])
            middle, spread = smooth.mean(0), smooth.std(0, ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else 0
            steps = np.arange(len(middle)) + window
            (line,) = axis.plot(steps, middle, label=f"D_mul = {arm}")
            axis.fill_between(steps, middle - spread, middle + spread, alpha=0.2, color=line.get_color(), linewidth=0)
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set_title(f"{data}, {net}", fontsize=10)
    axes[0][0].legend(fontsize=8)
    figure.supxlabel("step")
    figure.supylabel("training loss minus the plain net's")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def section(results: Path, page: Path) -> list[str]:
    """Its lines; its two plots are drawn beside the page."""
    runs = read(results)
    accuracy, losses = (page.with_name(f"{page.stem}_{what}.svg") for what in ("accuracy", "losses"))
    plot_accuracy(runs, accuracy)
    plot_losses(runs, losses)
    pictures = [f"![test accuracy minus the plain net's]({accuracy.name})", f"![training loss]({losses.name})"]
    return [HEAD, verdict(runs), "", *table(runs), "", *pictures]
