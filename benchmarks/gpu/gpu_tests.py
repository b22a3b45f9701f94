"""`pytest -m gpu`, and its outcome as JSON."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from on_device import Run

ROOT = Path(__file__).resolve().parents[2]
# Not the project's own options: they name plugins that may not be there.
OPTIONS = ["-o", "addopts=", "--import-mode=importlib", "-m", "gpu", "-v", "--durations=10", "-p", "no:cacheprovider"]
DRY = ["-k", "not test_commands"]  # tests/cli has them on a CPU


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            return child.tag, child.get("message", "")[:500]
    return "passed", ""


def main() -> None:
    run = Run(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        # Most of the time goes into Triton's compiler, one processor a kernel.
        workers = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
        options = [*OPTIONS, *workers, *(DRY if run.dry else []), f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, "tests/gpu"]
        code: int | None
        try:
            device = {"GPU_TESTS_DEVICE": run.device.type}
            code = subprocess.run(command, cwd=ROOT, timeout=run.left, env=os.environ | device).returncode
        except subprocess.TimeoutExpired:
            code = None  # pytest writes its report at the end alone; the log has what passed
        cases = [*ElementTree.parse(report).iter("testcase")] if report.exists() else []
    rows: list[dict[str, Any]] = []
    for case in cases:
        status, message = outcome(case)
        name = f"{case.get('classname')}::{case.get('name')}"
        rows.append({"test": name, "status": status, "seconds": float(case.get("time", 0)), "message": message})
    counts = Counter(row["status"] for row in rows)
    run.write(exit_code=code, counts=dict(counts), tests=rows)
    if code is None:
        raise SystemExit("pytest took too long")
    if counts["failure"] or counts["error"] or not rows:
        raise SystemExit(code or 1)


if __name__ == "__main__":
    main()
