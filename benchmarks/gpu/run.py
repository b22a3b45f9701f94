"""What run.sh runs: the steps in order, each a process with a time budget, and what became of them.

A step gets `--json FILE`, `--seconds N` (it starts nothing new after them) and, in a dry run, `--dry`. It is ended
GRACE seconds later; what it had written by then stays.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOTAL = 465.0  # seconds, of the 480 that a call may take
GRACE = 15.0


@dataclass(frozen=True)
class Step:
    """A script of this folder and the seconds it may take."""

    name: str
    seconds: float


STEPS = [
    Step("device_limits", 20),
    Step("gpu_tests", 120),
    Step("training_step", 170),
    Step("kernel_time", 60),
    Step("study", 60),
]


def run(step: Step, out: Path, seconds: float, dry: bool) -> dict[str, Any]:
    """Run one step; its status, its time, and where it failed the end of what it printed."""
    target, log = out / f"{step.name}.json", out / "run.log"
    target.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"{step.name}.py"), "--json", str(target), "--seconds", f"{seconds:.0f}"]
    start = time.monotonic()
    with log.open("a") as file, printed(log):
        file.write(f"\n== {step.name}, {seconds:.0f} s\n")
        file.flush()
        process = subprocess.Popen(
            [*command, *(["--dry"] if dry else [])], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    result: dict[str, Any] = {"step": step.name, "seconds": round(time.monotonic() - start, 1)}
    result["status"] = "out of time" if code is None else "done" if code == 0 else f"exit code {code}"
    if code != 0:
        result["tail"] = log.read_text(errors="replace").splitlines()[-12:]
    if not target.exists():
        target.write_text(json.dumps({"dry": dry, **result}, indent=1) + "\n")
    return result


@contextmanager
def printed(log: Path) -> Iterator[None]:
    """Print what is added to the log meanwhile."""
    before = log.stat().st_size if log.exists() else 0
    try:
        yield
    finally:
        with log.open("rb") as file:
            file.seek(before)
            sys.stdout.write(file.read().decode(errors="replace"))
            sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument(
        "--only", nargs="+", choices=[step.name for step in STEPS], help="these steps; one alone has all of the time"
    )
    options = parser.parse_args()
    out, start = Path(os.environ["OUT"]), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.log").unlink(missing_ok=True)
    results = []
    for step in STEPS:
        if options.only and step.name not in options.only:
            continue
        left = TOTAL - (time.monotonic() - start) - GRACE
        if left < 5:
            results.append({"step": step.name, "status": "no time left"})
        else:
            alone = options.only == [step.name]
            results.append(run(step, out, left if alone else min(step.seconds, left), options.dry))
        (out / "run.json").write_text(json.dumps({"dry": options.dry, "steps": results}, indent=1) + "\n")
    for result in results:
        print(f"{result['step']:16s} {result['status']:14s} {result.get('seconds', '')}")
    sys.exit(any(result["status"] != "done" for result in results))


if __name__ == "__main__":
    main()
