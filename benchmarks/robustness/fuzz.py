"""Damaged and hostile checkpoints through `fold`, thousands of them, in a few reused processes.

    python benchmarks/robustness/fuzz.py [--count 10000] [--workers 2] [--seed 0] [--json docs/data/fuzz.json]

Every file must end in one of two ways: exit 1 with one message, nothing written and the old output untouched; or,
where it is still a valid checkpoint, exit 0 with exactly what its content says. Never a traceback, a file that
shows that code ran, a dead process, or a process above 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
import damage
from peak import peak_bytes

from doconv_convert.cli.app import app

PEAK_BYTES = 2**30
# float64 sums of at most a hundred products; the largest seen was 5e-16 of the scale.
SAME = 1e-12
OLD = b"an older output"
FILES = ("zip.pth", "legacy.pth", "foreign.safetensors", "ours.safetensors", "ours.pth")
INSIDE = ("shards/one.safetensors", "shards/model.safetensors.index.json", "distributed/.metadata", "distributed/shard")


@st.composite
def cases(draw: Any) -> tuple[str, str, bool, int, int, int]:
    """(what is damaged, how, whether a model is named, three numbers)."""
    base = draw(st.sampled_from((*FILES, *INSIDE, "state", "state", "hostile", "compressed")))
    how = draw(st.sampled_from(sorted(damage.STATES if base == "state" else damage.BYTES)))
    numbers = [draw(st.integers(0, 2**31)) for _ in range(3)]
    return (base, how, draw(st.booleans()), *numbers)  # type: ignore[return-value]


class Bench:
    """A folder with undamaged checkpoints, one damaged copy at a time, and the outputs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bases, self.out = folder, folder / "bases", folder / "out"
        self.bases.mkdir(parents=True)
        self.out.mkdir()
        damage.write_bases(self.bases)
        (folder / "net.py").write_text(damage.NET)
        self.marker = folder / damage.MARKER
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []

    def write(self, base: str, how: str, a: int, b: int, c: int) -> tuple[Path, str]:
        """The damaged copy and what was done to it."""
        place = self.folder / "now"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        foreign: dict[str, Any] = damage.foreign_state()
        if base == "state":
            changed = damage.STATES[how](foreign, sorted(foreign)[a % len(foreign)], b)
            torch.save(changed, place / "a.pth")
            return place / "a.pth", how
        if base == "hostile":
            if c % 3 == 0:
                shutil.copytree(self.bases / "distributed", place / "d")
                (place / "d" / ".metadata").write_bytes(pickle.dumps(damage.Runs(a, str(self.marker))))
                return place / "d", "a planted .metadata"
            damage.write_hostile(place / "a.pth", foreign, str(self.marker), a, b)
            return place / "a.pth", "a pickle that calls code"
        if base == "compressed":
            shutil.copy(self.bases / "zip.pth", place / "a.pth")
            damage.compressed(place / "a.pth")
            return place / "a.pth", "a compressed zip"
        outer, _, inner = base.partition("/")
        whole = self.bases / outer
        shutil.copytree(whole, place / outer) if whole.is_dir() else shutil.copy(whole, place / outer)
        target = place / outer
        if inner == "shard":
            target = next(target.glob("*.distcp"))
        elif inner:
            target /= inner
        target.write_bytes(damage.BYTES[how](bytearray(target.read_bytes()), a, b, c))
        return place / outer, f"{how} ({base.partition('/')[0]})"

    def run(self, base: str, how: str, named: bool, a: int, b: int, c: int) -> None:
        path, what = self.write(base, how, a, b, c)
        named = named or base.startswith("ours")
        target = self.out / "plain.safetensors"
        target.write_bytes(OLD)
        model = ["--model", f"{self.folder}/net.py:net"] if named else []
        (self.folder / "current").write_text(repr((base, how, named, a, b, c)))
        result = CliRunner().invoke(app, ["fold", str(path), *model, "-o", str(target)])
        try:
            problem = self._problem(path, base, result, target)
        except Exception as error:  # what torch itself cannot read, or what folds to another shape
            problem = f"folded, but the plain reader says {type(error).__name__}: {str(error)[:200]}"
        if problem is not None:
            self.problems.append(f"{what} {(base, how, named, a, b, c)}: {problem}")
        self.outcomes[f"{what}: {'refused' if result.exit_code else 'folded'}"] += 1

    def _problem(self, path: Path, base: str, result: Any, target: Path) -> str | None:
        """What is wrong with how it ended."""
        if self.marker.exists():
            self.marker.unlink()
            return "code was run"
        if sorted(one.name for one in self.out.iterdir()) != [target.name]:
            return f"left behind {sorted(one.name for one in self.out.iterdir())}"
        if peak_bytes() > PEAK_BYTES:
            return f"{peak_bytes() / 2**20:.0f} MiB"
        if result.exit_code == 0:
            return self._differs(path, base, load_file(target))
        said = result.stderr.strip()
        if target.read_bytes() != OLD:
            return "an old output was changed"
        if result.exit_code != 1 or not said.startswith("error: ") or "Traceback" in said or "unexpected)" in said:
            return f"exit {result.exit_code}, {said[:300]!r}"
        if "please report it" in said:
            return f"unexpected: {said[:300]!r}"
        return None

    def _differs(self, path: Path, base: str, got: dict[str, Any]) -> str | None:
        """How what was written differs from what the file's content says."""
        if base == "distributed/.metadata":
            state = damage.foreign_state()  # the shards were not touched
        elif base == "distributed/shard":
            shutil.copytree(path, self.folder / "copy", dirs_exist_ok=True)
            state = damage.foreign_state()
            try:
                damage.dcp.load({"model": state}, checkpoint_id=str(self.folder / "copy"), no_dist=True)
            except CheckpointException:  # torch refuses the damage; what comes out must be what was there before it
                state = damage.foreign_state()
            shutil.rmtree(self.folder / "copy")
        else:
            try:
                state = damage.read_plainly(path)
            except pickle.UnpicklingError:
                # torch refuses the names that stand beside the tensors; those were not touched
                state = damage.foreign_state() if not base.startswith("ours") else damage.our_model().state_dict()
        # torch fills this counter in, in strict loads too, where an old file lacks it
        counters = {key: got[key].numpy() for key in got if key.endswith("num_batches_tracked") and not got[key].any()}
        expected = counters | damage.expected_fold(state)
        if got.keys() != expected.keys():
            return f"wrote the keys {sorted(got)}, expected {sorted(expected)}"
        for key, value in expected.items():
            if got[key].shape != value.shape:
                return f"'{key}' has the shape {tuple(got[key].shape)}, expected {value.shape}"
            # in units of the largest entry: the squares of flipped exponents' values overflow
            unit = float(np.abs(value.astype(np.float64)).max(initial=0.0)) or 1.0
            found, wanted = got[key].double().numpy() / unit, value.astype(np.float64) / unit
            error = float(np.linalg.norm((found - wanted).ravel())) / (float(np.linalg.norm(wanted.ravel())) or 1.0)
            if not error <= SAME:
                return f"'{key}' is off by {error:.1e}"
        return None


def work(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run `count` cases in this process."""
    torch.set_num_threads(1)
    bench = Bench(folder)

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(cases())
    def everything(case: tuple[str, str, bool, int, int, int]) -> None:
        bench.run(*case)

    start = time.perf_counter()
    before = peak_bytes()
    everything()
    return {
        "files": sum(bench.outcomes.values()),
        "outcomes": dict(sorted(bench.outcomes.items())),
        "problems": bench.problems,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": before,
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        json.dump(work(options.count, options.seed, options.worker), sys.stdout)
        return
    share = -(-options.count // options.workers)
    with tempfile.TemporaryDirectory() as text:
        folders = [Path(text) / str(index) for index in range(options.workers)]
        commands = [
            [sys.executable, __file__, "--count", share, "--seed", options.seed + index, "--worker", folder]
            for index, folder in enumerate(folders)
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        running = [
            subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True, env=environment)
            for command in commands
        ]
        results = []
        for process, folder in zip(running, folders, strict=True):
            answer, _ = process.communicate()
            if process.returncode:
                current = (folder / "current").read_text() if (folder / "current").exists() else "nothing"
                raise SystemExit(f"a process died with {process.returncode} at {current}")
            results.append(json.loads(answer))
    total: Counter[str] = Counter()
    for result in results:
        total.update(result["outcomes"])
    document = {
        "files": sum(result["files"] for result in results),
        "problems": [problem for result in results for problem in result["problems"]],
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "peak_bytes_before": max(result["peak_bytes_before"] for result in results),
        "seconds": max(result["seconds"] for result in results),
        "workers": options.workers,
        "seed": options.seed,
        "outcomes": dict(sorted(total.items())),
    }
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps({key: value for key, value in document.items() if key != "outcomes"}, indent=1))
    if document["problems"]:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
