"""Signals and kills: what the process made for itself goes, and what a killed one left is swept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support_cli import ROOT, names

from doconv_convert.files import atomic_write
from doconv_convert.workspace import workspace

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
# A command's outline: a child, a file half written, and an executor that waits for its thread.
WORKING = """
import signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from doconv_convert.artifacts.export.json_process import JsonProcess
from doconv_convert.cli.console import output
from doconv_convert.files import atomic_write, install_files
from doconv_convert.interrupts import end_on_signals

target, how = Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
end_on_signals()
with output("json" in how, False, False) as shown, atomic_write(target) as temporary, ThreadPoolExecutor(1) as threads:
    temporary.write_bytes(b"half")
    child = JsonProcess("idle")
    waiting = threads.submit(child.ask, {})
    sys.stderr.write(f"{child._process.pid}\\n")
    sys.stderr.flush()
    if "swallowed" in how:
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    if "native" in how:
        import hashlib
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in which no handler in Python runs
    waiting.result()
"""
IDLE = """
import sys, tempfile, time
from doconv_convert.artifacts.export.json_process import serve
print("temporary", tempfile.mkdtemp(), file=sys.stderr)
serve(lambda: lambda asked: time.sleep(60))
"""


def started(folder: Path, how: str) -> tuple[subprocess.Popen[str], int]:
    """The process that works, and its child's process id."""
    (folder / "idle.py").write_text(IDLE)
    (folder / "tmp").mkdir()
    (folder / "out").mkdir()
    (folder / "out" / "target").write_bytes(b"old")
    process = subprocess.Popen(
        [sys.executable, "-c", WORKING, folder / "out" / "target", how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "TMPDIR": str(folder / "tmp")},
    )
    assert process.stderr is not None
    return process, int(process.stderr.readline())


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(process: int, seconds: float = 2.0) -> bool:
    end = time.monotonic() + seconds
    while alive(process) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(process)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes from /proc")
@pytest.mark.parametrize(
    ("number", "how"),
    [*((number, "plain") for number in SIGNALS), (signal.SIGTERM, "swallowed"), (signal.SIGHUP, "native json")],
)
def test_a_signal_ends_children_and_removes_unfinished_files(tmp_path: Path, number: int, how: str) -> None:
    process, child = started(tmp_path, how)
    assert alive(child)
    assert len(names(tmp_path / "out")) == 2
    start = time.monotonic()
    process.send_signal(number)
    said, error = process.communicate(timeout=20)
    assert time.monotonic() - start < 2.0
    assert process.returncode == 128 + number
    message = f"interrupted by {signal.Signals(number).name}; every output is complete or as it was before."
    assert error.strip() == f"error: {message}"
    assert (json.loads(said) if "json" in how else said) == (
        {"error": message, "exit_code": 128 + number} if "json" in how else ""
    )
    assert gone(child)
    assert names(tmp_path / "out") == ["target"]
    assert (tmp_path / "out" / "target").read_bytes() == b"old"
    assert names(tmp_path / "tmp") == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads processes from /proc")
def test_the_next_run_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    process, child = started(tmp_path, "plain")
    out, others = tmp_path / "out", [".a.doconv-0123456789abcdef.tmp.bak", ".mine.0123456789abcdef.tmp", "mine.tmp"]
    for name in others:
        (out / name).mkdir()
    (out / ".b.doconv-0123456789abcdef.tmp").write_bytes(b"a file, not a folder of ours")
    left = set(names(out))
    with atomic_write(out / "other"):  # the other process lives: its folder stays
        assert left < set(names(out))
    process.kill()
    process.communicate()
    assert gone(child)
    assert left < {*names(out), "other"}
    with atomic_write(out / "other"):
        pass
    assert names(out) == sorted([*others, ".b.doconv-0123456789abcdef.tmp", "other", "target"])
    assert names(tmp_path / "tmp") != []
    with workspace(tmp_path / "tmp", "scratch"):
        assert len(names(tmp_path / "tmp")) == 1
    assert names(tmp_path / "tmp") == []


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup."""
    code = """
import os, signal
from doconv_convert.interrupts import end_on_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
end_on_signals()
os.kill(os.getpid(), signal.SIGHUP)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_a_signal_waits_while_files_that_belong_together_are_renamed(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from doconv_convert import files
from doconv_convert.interrupts import end_on_signals
folder, real = Path(sys.argv[1]), os.replace
def replace(source, target):
    os.kill(os.getpid(), signal.SIGTERM)
    real(source, target)
files.os.replace = replace
end_on_signals()
for name in "ab":
    (folder / f"new {name}").write_bytes(b"new")
files.install_files([(folder / f"new {name}", folder / name) for name in "ab"])
print("not reached")
"""
    for name in "ab":
        (tmp_path / name).write_bytes(b"old")
    command = [sys.executable, "-c", code, tmp_path]
    done: Any = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"new", "b": b"new"}
