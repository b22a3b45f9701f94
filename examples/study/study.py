"""Does over-parameterization help? The second edition: both sides tuned alike, then pairs on fresh seeds.

    python examples/study/study.py --jobs 2 --resume docs/data/study2.jsonl
    python examples/study/summary.py docs/data docs/study.md

docs/study_plan.md says what is compared, how, and what each outcome means; it was committed before any run. A run that
is stopped goes on from its file. `--repeat N` runs N finished cells again and compares their numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import plan
from cells import Cell, Results, Row, read
from training import run

SAME = "cell", "m", "curve", "loss", "score", "diverged", "levers", "departure"
"""What a cell that is run again must repeat."""


def differences(first: Row, second: Row) -> list[str]:
    return [name for name in SAME if first[name] != second[name]]


def repeat(results: Results, count: int, steps: int | None, device: str) -> int:
    """Run `count` finished cells again, the cheapest settings first; how many differ."""
    rows = sorted(results.values(), key=lambda row: row["seconds"])[:count]
    changed = 0
    for row in rows:
        again = json.loads(json.dumps(run(Cell(*row["cell"]), steps, device)))
        found = differences(row, again)
        changed += bool(found)
        print(f"{title(row)}: {'differs in ' + ', '.join(found) if found else 'the same numbers'}", flush=True)
    return changed


def title(row: Row) -> str:
    cell = Cell(*row["cell"])
    return f"{cell.setting}: {cell.choice}, seed {cell.seed}"


def executor(jobs: int) -> Executor:
    """A process for each job, as torch's threads are set by process; a single job stays in this one."""
    return ThreadPoolExecutor(1) if jobs == 1 else ProcessPoolExecutor(jobs, get_context("spawn"))


def work(results: Results, file: Any, options: argparse.Namespace) -> None:
    """Run what is ready until nothing is, or until the next cell would not end in time."""
    start = time.monotonic()
    running: dict[Future[Row], Cell] = {}
    done = 0

    def next_cell() -> Cell | None:
        under_way = set(running.values())
        for cell in plan.ready(results, options.size, options.only):
            if cell in under_way:
                continue
            ends = (time.monotonic() - start + plan.cost(cell.setting)) / 60
            return cell if options.minutes is None or ends <= options.minutes else None
        return None

    with executor(options.jobs) as pool:
        while True:
            while len(running) < options.jobs and (cell := next_cell()) is not None:
                running[pool.submit(run, cell, options.steps, options.device)] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, row = running.pop(future), future.result()
                results[cell] = row
                print(json.dumps(row), file=file, flush=True)
                done += 1
                minutes = (time.monotonic() - start) / 60
                print(f"[{done}, {minutes:.1f} min] {title(row)}: {row['score']}, {row['seconds']} s", flush=True)
    left = sum(1 for _ in plan.ready(results, options.size, options.only))
    print(f"{done} cells run; {left or 'none'} ready to go on with.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--resume", type=Path, default=Path("docs/data/study2.jsonl"), help="results; what is there stays"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="start nothing that would end after them")
    parser.add_argument("--only", choices=sorted({setting[0] for setting in plan.RATES}), help="this task")
    parser.add_argument("--size", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--steps", type=int, help="of every cell, for a try")
    parser.add_argument(
        "--repeat", type=int, metavar="N", help="run N finished cells again; exit code 1 if they differ"
    )
    parser.add_argument("--count", action="store_true", help="print the plan's rates, cells and minutes; run nothing")
    options = parser.parse_args()
    if options.count:
        print("\n".join([*plan.grid_table(options.size), "", *plan.cost_table(options.size)]))
        return
    options.device = "cuda" if options.size == "gpu" else "cpu"
    results = read(options.resume)
    if options.repeat is not None:
        sys.exit(repeat(results, options.repeat, options.steps, options.device) > 0)
    options.resume.parent.mkdir(parents=True, exist_ok=True)
    with options.resume.open("a") as file:
        work(results, file, options)


if __name__ == "__main__":
    main()
