"""The study's page and plots, from its results.

python examples/study/summary.py docs/data docs/study.md

Reads study.jsonl (the first edition), study2.jsonl and gpu/study.json of the folder, as far as they are there.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

import first_page
import plots
import tables
from cells import Cell, Results, read
from comparisons import Verdict, headline, sentence, verdicts
from plan import confirmatory

HEAD = """# Does it help?

Made by `python examples/study/summary.py docs/data docs/study.md`; do not edit.
"""
ABOUT = """Run with `{command}` on {machines}: {cells} trainings, {minutes:.0f} minutes of {clock}.
[study_plan.md](study_plan.md), committed before the runs, says what is compared and how.

Differences are DO-Conv minus plain, both at the choice that their tuning found best, paired on fresh seeds: the mean
with its 95 % interval (Student's t). *Last loss*: the training loss over the last tenth of the steps, in % of the plain
net's. *Steps*: the part of the run after which DO-Conv has come down to that loss, the median. *Time*: over plain's,
the median. *An end*: the best rate is the last of its grid, so a better one may lie outside.
"""
RUN_BY = {
    "cpu": ("python examples/study/study.py --jobs 2", "processor time"),
    "gpu": ("benchmarks/gpu/run.sh --only study", "time"),
}


def second_edition(results: Results, size: str, page: Path) -> list[str]:
    """Its lines; its plots are drawn beside the page."""
    command, clock = RUN_BY[size]
    found = verdicts(confirmatory(size), results)
    machines = " and ".join(sorted({row["machine"] for row in results.values()}))
    minutes = sum(row["seconds"] for row in results.values()) / 60
    about = ABOUT.format(command=command, machines=machines, cells=len(results), minutes=minutes, clock=clock)
    lines = [about, *sentences(found), "", *tables.confirmatory(found, results), ""]
    lines += pictures(found, size, page)
    sections = [
        ("The pilot's table, again (exploratory)", tables.pilots(results) if size == "cpu" else []),
        ("Every m at the plain net's best rate, and D_mul = 2K (exploratory)", tables.untuned(results, size)),
        ("In reserve (exploratory)", tables.reserves(results, size, confirmatory(size))),
    ]
    for title, compared in sections:
        if compared:
            lines += [f"### {title}", "", *tables.against(compared), ""]
    lines += ["### All that was run", "", *tables.tuning(results), "", *tables.alone(results), ""]
    return lines


def sentences(found: list[Verdict]) -> list[str]:
    by_net = groupby(sorted(found, key=lambda one: one.setting), key=lambda one: one.setting[:3])
    return [f"- {sentence(list(some))}" for _, some in by_net]


def pictures(found: list[Verdict], size: str, page: Path) -> list[str]:
    compared = [(str(one.setting), one.comparison) for one in found if one.comparison and one.comparison.pairs]
    if not compared:
        return []
    lines = []
    for name, draw, title in (
        ("difference", plots.differences, "DO-Conv minus plain, with intervals"),
        ("curves", plots.curves, "training loss"),
        ("lever", plots.levers, "the lever over training"),
    ):
        path = page.with_name(f"{page.stem}2_{'gpu_' if size == 'gpu' else ''}{name}.svg")
        draw(compared, path)
        lines.append(f"![{title}]({path.name})")
    return [*lines, ""]


def read_gpu(path: Path) -> Results:
    """The rows of benchmarks/gpu/study.py, if it ran on a card."""
    found = json.loads(path.read_text()) if path.exists() else {}
    rows = found.get("rows", []) if found.get("gpu") and not found["dry"] else []
    return {Cell(*row["cell"]): row for row in rows}


def main() -> None:
    folder, page = Path(sys.argv[1]), Path(sys.argv[2])
    results = {"cpu": read(folder / "study2.jsonl"), "gpu": read_gpu(folder / "gpu/study.json")}
    lines = [HEAD, headline(verdicts(confirmatory("cpu"), results["cpu"])), ""]
    for size, title in (("cpu", "## Second edition: both sides tuned"), ("gpu", "## Second edition, on a GPU")):
        if results[size]:
            lines += [title, "", *second_edition(results[size], size, page)]
    if (folder / "study.jsonl").exists():
        lines += first_page.section(folder / "study.jsonl", page)
    page.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
