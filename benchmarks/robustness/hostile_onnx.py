"""Hostile and odd ONNX files through `flops`, each in a process of its own.

    python benchmarks/robustness/hostile_onnx.py [--count 300] [--seed 0] [--json docs/data/hostile.json]

Every command must end in 30 s and below 1 GiB, without a traceback: with exit 1 and one message, or with a count.
Where onnxruntime runs the file, no budget below what it multiplies (its own profile, `executed.py`) may pass, and
honest files must be counted exactly.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from executed import executed_macs
from hostile_files import FILES
from hostile_nets import HONEST_CONTROL, HOSTILE, Case
from odd_nets import ODD

SECONDS, PEAK_BYTES = 30.0, 2**30
COMMAND = "from doconv_convert.cli.app import main; main()"
NETS = {**HOSTILE, **HONEST_CONTROL, **ODD}
KINDS = [*NETS, *FILES]
# The first third of a run are nets, which onnxruntime runs too; the rest are files that nobody should run.
NET_SHARE = 3


@dataclass
class Ended:
    """How a command ended: its exit code (None: it had to be killed), what it said, seconds and peak memory."""

    code: int | None
    out: str
    error: str
    seconds: float
    peak: int


def run(*arguments: str, folder: Path) -> Ended:
    """`doconv-convert ARGUMENTS`, with the memory of the largest of its processes."""
    read, write = folder / "out", folder / "err"
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    with read.open("wb") as out, write.open("wb") as error:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stdout=out,
            stderr=error,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            late = time.perf_counter() - start > 2 * SECONDS
            if late:
                os.killpg(process.pid, signal.SIGKILL)
                _, status, usage = os.wait4(process.pid, 0)
            if done or late:
                break
            time.sleep(0.02)
    process.returncode = 0  # it was waited for
    code = None if late else os.waitstatus_to_exitcode(status)
    said = (path.read_bytes().decode(errors="replace") for path in (read, write))
    peak = usage.ru_maxrss * 1024
    # the system counts from before the program was loaded: up to there, the figure is the caller's own
    return Ended(code, *said, time.perf_counter() - start, 0 if peak <= own else peak)


def survives(ended: Ended) -> str | None:
    """What is wrong with how a command ended, whatever it was about."""
    if ended.code is None or ended.seconds > SECONDS:
        return f"took {ended.seconds:.0f} s"
    if ended.peak > PEAK_BYTES:
        return f"took {ended.peak >> 20} MiB"
    if ended.code not in (0, 1, 3):
        return f"exit {ended.code}: {ended.error[-300:]!r}"
    if "Traceback" in ended.error or "please report" in ended.error:
        return f"unexpected: {ended.error[-300:]!r}"
    if ended.code == 1 and not ended.error.startswith("error: "):
        return f"no message: {ended.error[-300:]!r}"
    return None


def judge(case: Case, executed: int | None, ended: Ended) -> str | None:
    """What is wrong with a net's count under the budget `executed` - 1, or, of an honest one, `executed`."""
    if executed is None:
        return "onnxruntime refuses it"
    if not case.honest:
        return f"a budget of {executed - 1} passes, {executed} MACs run" if executed and ended.code == 0 else None
    found = json.loads(ended.out) if ended.code == 0 else {}
    return None if found.get("total") == executed else f"exit {ended.code}, {found.get('total')}; {executed} MACs run"


def ran(case: Case) -> int | None:
    try:
        return executed_macs(case.model, case.feeds)
    except Exception:  # onnxruntime's own classes share no public base
        return None


def net(name: str, seed: int, folder: Path) -> tuple[Ended, str | None]:
    case = NETS[name](np.random.default_rng(seed))
    path = folder / "model.onnx"
    path.write_bytes(case.model.SerializeToString())
    executed = ran(case)
    budget = max(0, (executed or 0) - (not case.honest))
    ignored = [text for op in case.ignore for text in ("--ignore", op)]
    ended = run("flops", str(path), "--json", "--max", str(budget), *ignored, folder=folder)
    return ended, survives(ended) or judge(case, executed, ended)


def file(name: str, seed: int, folder: Path) -> tuple[Ended, str | None]:
    path = FILES[name](np.random.default_rng(seed), folder)
    ended = run("flops", str(path), "--max", "1k", folder=folder)
    return ended, survives(ended)


def plan(count: int, seed: int) -> Iterator[tuple[str, int]]:
    """(kind, seed) of every file: a third are nets, and each kind comes as often as the others of its sort."""
    nets = count // NET_SHARE
    for names, number in ((list(NETS), nets), (list(FILES), count - nets)):
        for index in range(number):
            yield names[index % len(names)], seed + index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kind", help="this kind alone")
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    problems, seconds, peak = [], 0.0, 0
    for kind, seed in plan(options.count, options.seed):
        if options.kind not in (None, kind):
            continue
        with tempfile.TemporaryDirectory() as folder:
            ended, problem = (net if kind in NETS else file)(kind, seed, Path(folder))
        outcomes[f"{kind}: exit {ended.code}"] += 1
        seconds, peak = max(seconds, ended.seconds), max(peak, ended.peak)
        if problem is not None:
            problems.append(f"{kind}, seed {seed}: {problem}")
            print(problems[-1], file=sys.stderr)
    document: dict[str, Any] = {
        "files": sum(outcomes.values()),
        "problems": problems,
        "longest_seconds": round(seconds, 1),
        "peak_bytes": peak,
        "seed": options.seed,
        "outcomes": dict(sorted(outcomes.items())),
    }
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    if problems:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
