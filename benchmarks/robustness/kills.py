"""`kill -9` and a file-size limit in the middle of writing: the target is the old file or a complete new one.

    python benchmarks/robustness/kills.py [--kills 220] [--json docs/data/kills.json]

`to-doconv`, `fold -o` and `fold --onnx` (one file, and external data) run in forks of one process that has
everything imported; only the two exports are replaced, by copies of files that were exported before. Most of the
kills come when the fork is about to flush or rename a finished temporary file, or has just renamed it (it tells by a
pipe, from a wrapped `os.replace` or `os.fsync`), the others at a random time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from typer.testing import CliRunner

from doconv_convert import files
from doconv_convert.artifacts.export import onnx_file
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.cli.app import app
from doconv_convert.workflows import exports

NET = """
from torch import nn

INPUT_SHAPE = (1, 8, 4, 4)


def net():
    return nn.Sequential(nn.Conv2d(8, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 512, 3), nn.Flatten())
"""
COMMANDS = ("to-doconv", "fold -o", "fold --onnx", "fold --onnx, external data")


class Desk:
    """A folder with the inputs, and for every command a folder with its target."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "net.py").write_text(NET)
        self.source = f"{folder}/net.py:net"
        self.old = self._checkpoint("old.safetensors", 0)
        self.new = self._checkpoint("new.safetensors", 1)
        self.exports: dict[str, tuple[Path, Any]] = {}
        for name in ("old", "new"):
            self.exports[name] = self._export(name)

    def _checkpoint(self, name: str, seed: int) -> Path:
        torch.manual_seed(seed)
        weights = self.folder / f"{seed}.pth"
        torch.save(build(parse_source(self.source), None, seed).state_dict(), weights)
        assert run(["to-doconv", self.source, "--weights", weights, "-o", self.folder / name]) == 0
        return self.folder / name

    def _export(self, name: str) -> tuple[Path, Any]:
        made = []

        def watch(jobs: Any, **options: Any) -> Any:
            reports = original(jobs, **options)
            made.extend(reports)
            return reports

        original, exports.export_in_child = exports.export_in_child, watch
        target = self.folder / f"{name}.onnx"
        try:
            command = ["fold", self.folder / f"{name}.safetensors", "--model", self.source, "--onnx", target]
            assert run([*command, "--no-verify"]) == 0
        finally:
            exports.export_in_child = original
        return target, made[0]

    def command(self, name: str, which: str, out: Path) -> list[Any]:
        """The command that writes the `which` ("old" or "new") output to the folder `out`."""
        checkpoint = self.folder / f"{which}.safetensors"
        if name == "to-doconv":
            seed = 0 if which == "old" else 1
            return ["to-doconv", self.source, "--weights", self.folder / f"{seed}.pth", "-o", out / "out.safetensors"]
        fold = ["fold", checkpoint, "--model", self.source]
        return (
            [*fold, "-o", out / "out.safetensors"]
            if name == "fold -o"
            else [*(*fold, "--onnx", out / "out.onnx", "--no-verify")]
        )

    @contextmanager
    def no_exports(self, name: str, which: str) -> Iterator[None]:
        """The exporting children are replaced by a copy of what they made; the rest is the product's own."""
        finished, report = self.exports[which]

        def copied(jobs: Any, **_: Any) -> list[Any]:
            shutil.copyfile(finished, jobs[0].path)
            return [report]

        before = exports.export_in_child, onnx_file.ONE_FILE_BYTES
        exports.export_in_child = copied
        if name.endswith("data"):
            onnx_file.ONE_FILE_BYTES = 0
            copied_model = onnx_file.ir.load(finished)
            exports.export_in_child = lambda jobs, **_: [onnx_file.write(copied_model, jobs[0].path), report][1:]
        try:
            yield
        finally:
            exports.export_in_child, onnx_file.ONE_FILE_BYTES = before


def run(command: list[Any]) -> int:
    result = CliRunner().invoke(app, [str(part) for part in command])
    if result.exit_code:
        print(result.stderr)
    return int(result.exit_code)


def content(out: Path) -> dict[str, bytes]:
    """The target's bytes and, of an ONNX file, those of the data files that it refers to."""
    found = {path.name: path.read_bytes() for path in out.glob("out.*") if path.suffix in (".onnx", ".safetensors")}
    for path in out.glob("out.onnx"):
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    found[entry.value] = (out / entry.value).read_bytes()
    return found


def fork(body: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            body()
        finally:
            os._exit(0)
    return child


def tell(pipe: int, stage: str, out: Path) -> None:
    """In the fork: say by the pipe that the stage is reached in the folder `out` itself, and wait to be killed."""
    real_replace, real_fsync = os.replace, os.fsync

    def told() -> None:
        os.write(pipe, b"!")
        time.sleep(60)

    def replace(source: Any, target: Any) -> None:
        # onnx_ir renames temporary files of its own, onto ours
        data, here = str(target).endswith(".data"), Path(target).parent == out and Path(target).name.startswith("out.")
        if here and stage == ("before the data's rename" if data else "before the rename"):
            told()
        real_replace(source, target)
        if here and stage == ("after the data's rename" if data else "after the rename"):
            told()

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if stage == "before the flush" and out in path.parents and path.is_file():
            told()
        real_fsync(descriptor)

    files.os.replace, files.os.fsync = replace, fsync  # type: ignore[assignment]


def one_kill(desk: Desk, name: str, stage: str, longest: float, states: dict[str, dict[str, bytes]]) -> dict[str, Any]:
    """Start the command over the old output, kill it, look at the target."""
    out = desk.folder / "target"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(desk.folder / f"made {name} old", out)
    reading, writing = os.pipe()

    def body() -> None:
        if stage != "at a random time":
            tell(writing, stage, out)
        with desk.no_exports(name, "new"):
            run(desk.command(name, "new", out))

    start = time.perf_counter()
    child = fork(body)
    os.close(writing)
    if stage == "at a random time":
        time.sleep(random.uniform(0, longest))
    else:
        os.read(reading, 1)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reading)
    temporary = any(path.name.endswith(".tmp") for path in out.iterdir())
    now = content(out)
    state = next((which for which, files_of in states.items() if now == files_of), "neither")
    return {
        "command": name,
        "stage": stage,
        "killed": os.WIFSIGNALED(status),
        "between": temporary,
        "target": state,
        "seconds": round(time.perf_counter() - start, 3),
    }


def limited(desk: Desk, name: str, states: dict[str, dict[str, bytes]]) -> dict[str, Any]:
    """The command under a file-size limit of 64 KiB: the old output stays, the error is in words."""
    out, said = desk.folder / "target", desk.folder / "said"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(desk.folder / f"made {name} old", out)

    def body() -> None:
        with desk.no_exports(name, "new"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
            result = CliRunner().invoke(app, [str(part) for part in desk.command(name, "new", out)])
            said.write_text(json.dumps({"exit": result.exit_code, "error": result.stderr.strip()}))

    os.waitpid(fork(body), 0)
    answer = json.loads(said.read_text())
    answer["error"] = answer["error"].replace(str(desk.folder), "...")
    old = content(out) == states["old"]
    left = sorted(path.name for path in out.iterdir() if path.name.startswith("."))
    clear = answer["exit"] == 1 and answer["error"].startswith("error: ") and "report it" not in answer["error"]
    return {"command": name, **answer, "old_file_stays": old, "left_behind": left, "ok": old and clear and not left}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=220)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    random.seed(0)
    with tempfile.TemporaryDirectory() as text:
        desk = Desk(Path(text))
        longest: dict[str, float] = {}
        states: dict[str, dict[str, dict[str, bytes]]] = {}
        for name in COMMANDS:
            for which in ("old", "new"):
                out = desk.folder / f"made {name} {which}"
                out.mkdir()
                start = time.perf_counter()
                with desk.no_exports(name, which):
                    assert run(desk.command(name, which, out)) == 0
                longest[name] = time.perf_counter() - start
                states.setdefault(name, {})[which] = content(out)
            assert states[name]["old"] != states[name]["new"]
        kills = []
        for index in range(options.kills):
            name = COMMANDS[index % len(COMMANDS)]
            data = "data's " if name.endswith("data") else ""
            stages = ["before the rename", "at a random time", "before the flush", "at a random time"]
            stages += [f"before the {data}rename", f"after the {data}rename", "after the rename"]
            stage = stages[index // len(COMMANDS) % len(stages)]
            kills.append(one_kill(desk, name, stage, longest[name], states[name]))
        limits = [limited(desk, name, states[name]) for name in COMMANDS]
    bad = [one for one in kills if one["target"] == "neither"] + [one for one in limits if not one["ok"]]
    landed = [one for one in kills if one["killed"]]
    document = {
        "kills": len(landed),
        "between": sum(one["between"] for one in landed),
        "targets": dict(Counter(f"{one['command']}, {one['stage']}: {one['target']}" for one in landed)),
        "finished_before_the_kill": len(kills) - len(landed),
        "limits": limits,
        "bad": bad,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    if bad:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
