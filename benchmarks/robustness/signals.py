"""SIGINT, SIGTERM and SIGHUP at random moments: the old files or whole new ones, no child and nothing temporary left.

    python benchmarks/robustness/signals.py [--signals 200] [--seed 0] [--json docs/data/signals.json]

`to-doconv` and `fold --onnx -o` run whole, with their exporting processes, in forks of one process that has everything
imported, over older outputs. The signal goes to the command's process alone, as a scheduler or `kill` sends it, at a
time drawn from the whole length of the run. Then: the outputs are the older ones or the complete new ones, byte for
byte; no process that the command started lives 2 seconds later; no file of its own is in the target's folder or among
the temporary ones; the exit code is 128 + the signal's number.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # its files among the temporary ones are not ours
from kills import NET, fork

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
COMMANDS = ("fold --onnx", "to-doconv")
CHILDREN_END = 2.0  # seconds
ENOUGH = 60.0  # seconds, after which a process hangs


class Desk:
    """A folder with a network, two trained checkpoints, and what the commands make of each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.temporary = folder, folder / "tmp"
        self.temporary.mkdir()
        (folder / "net.py").write_text(NET.replace("256", "16").replace("512", "16"))
        self.source = f"{folder}/net.py:net"
        for seed in (0, 1):
            torch.manual_seed(seed)
            net = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3))
            torch.save(net.state_dict(), folder / f"{seed}.pth")

    def command(self, name: str, seed: int, out: Path) -> list[str]:
        weights = f"{self.folder}/{seed}.pth"
        if name == "to-doconv":
            return ["to-doconv", self.source, "--weights", weights, "-o", f"{out}/out.safetensors"]
        return ["fold", weights, "--model", self.source, "--onnx", f"{out}/out.onnx", "-o", f"{out}/out.safetensors"]

    def start(self, command: list[str]) -> int:
        """The process id of a fork that runs the command as its user's shell would."""

        def body() -> None:
            from doconv_convert.cli.app import main

            os.setsid()  # the children are told by their session
            tempfile.tempdir = os.environ["TMPDIR"] = str(self.temporary)
            sys.argv = ["doconv-convert", *command]
            code: Any = 0
            try:
                main()
            except SystemExit as ended:
                code = ended.code or 0
            os._exit(code)

        return fork(body)


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}


def in_session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return found


def wait(process: int, seconds: float) -> int | None:
    """The exit code, negative where a signal ended it; None where it is still there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def one_signal(desk: Desk, name: str, number: signal.Signals, after: float, states: dict[str, Any]) -> dict[str, Any]:
    out = desk.folder / "target"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(desk.folder / f"{name} 0", out)
    process = desk.start(desk.command(name, 1, out))
    early = wait(process, after)
    start = time.monotonic()
    if early is None:
        os.kill(process, number)
    code = early if early is not None else wait(process, ENOUGH)
    ended = time.monotonic() - start
    while (alive := in_session(process)) and time.monotonic() - start < max(ended, CHILDREN_END):
        time.sleep(0.02)
    if alive:
        children = time.monotonic() - start
        for child in alive:
            os.kill(child, signal.SIGKILL)
    else:
        children = ended
    now = content(out)
    left = [path.name for folder in (out, desk.temporary) for path in folder.iterdir() if path.name.startswith(".")]
    for path in desk.temporary.iterdir():
        shutil.rmtree(path, ignore_errors=True)
    return {
        "command": name,
        "signal": number.name,
        "after": round(after, 2),
        "early": early is not None,
        "code": code,
        "outputs": next((which for which, files in states.items() if now == files), "neither"),
        "seconds": round(ended, 3),
        "children_alive": len(alive),
        "children_seconds": round(children, 3),
        "left": left,
    }


def is_bad(one: dict[str, Any]) -> bool:
    expected = 0 if one["early"] else 128 + signal.Signals[one["signal"]]
    # a signal in the last moments finds a process that is done
    done = one["code"] == 0 and one["outputs"] == "new"
    return bool(
        one["outputs"] == "neither"
        or one["left"]
        or one["children_alive"]
        or one["seconds"] > CHILDREN_END
        or not (one["code"] == expected or done)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    import doconv_convert.workflows.convert
    import doconv_convert.workflows.fold  # noqa: F401 (imported once, for every fork)

    draw = random.Random(options.seed)
    runs = []
    with tempfile.TemporaryDirectory() as text:
        desk = Desk(Path(text))
        longest, states = {}, {}
        for name in COMMANDS:
            for seed, which in enumerate(("old", "new")):
                out = desk.folder / f"{name} {seed}"
                out.mkdir()
                start = time.monotonic()
                assert wait(desk.start(desk.command(name, seed, out)), 10 * ENOUGH) == 0
                longest[name] = time.monotonic() - start
                states.setdefault(name, {})[which] = content(out)
            assert states[name]["old"].keys() == states[name]["new"].keys()
            assert states[name]["old"] != states[name]["new"]
        for index in range(options.signals):
            name = COMMANDS[index % len(COMMANDS)]
            number = SIGNALS[index // len(COMMANDS) % len(SIGNALS)]
            runs.append(one_signal(desk, name, number, draw.uniform(0, longest[name]), states[name]))
    bad = [one for one in runs if is_bad(one)]
    landed = [one for one in runs if not one["early"] and one["code"] != 0]
    table: dict[str, dict[str, int]] = {}
    for one in landed:
        row = table.setdefault(f"{one['command']}, {one['signal']}", Counter())
        row["signals"] += 1
        row[f"{one['outputs']} outputs"] += 1
        row[f"exit {one['code']}"] += 1
    document = {
        "signals": len(landed),
        "finished_before": len(runs) - len(landed),
        "run_seconds": {name: round(seconds, 2) for name, seconds in longest.items()},
        "slowest_end": max((one["seconds"] for one in landed), default=0.0),
        "slowest_children": max((one["children_seconds"] for one in landed), default=0.0),
        "table": table,
        "bad": bad,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    if bad:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
