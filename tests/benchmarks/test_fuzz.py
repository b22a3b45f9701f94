"""The fuzz bench itself: a short run without a finding, and its checks on results that are wrong."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support_cli import ROOT

sys.path.insert(0, str(ROOT / "benchmarks/robustness"))
import damage
import fuzz

SCRIPT = ROOT / "benchmarks/robustness/fuzz.py"


def run_script(*options: Any) -> dict[str, Any]:
    command = [sys.executable, SCRIPT, *options]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.zoo)])
def test_damaged_and_hostile_files_end_in_words_or_in_what_they_say(count: int) -> None:
    found = run_script("--count", count, "--workers", 1, "--seed", 7)
    assert found["files"] >= count
    assert found["problems"] == []
    assert found["peak_bytes"] < fuzz.PEAK_BYTES


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fuzz.Bench:
    monkeypatch.setattr(damage.dcp, "save", lambda *_, **__: None)
    monkeypatch.setattr(fuzz, "peak_bytes", lambda: 0)
    return fuzz.Bench(tmp_path / "bench")


def ended(bench: fuzz.Bench, code: int, said: str = "", factor: float = 1.0) -> str | None:
    """What the bench thinks of a command that ended so; with exit 0, after writing W's layer times `factor`."""
    target, state = bench.out / "plain.safetensors", damage.foreign_state()
    torch.save(state, bench.folder / "a.pth")
    target.write_bytes(fuzz.OLD)
    if code == 0:
        folded = {key: torch.from_numpy(array) for key, array in damage.expected_fold(state).items()}
        save_file({**folded, "a.weight": folded["a.weight"] * factor}, target)
    return bench._problem(bench.folder / "a.pth", "state", SimpleNamespace(exit_code=code, stderr=said), target)


def test_the_bench_sees_what_is_wrong(bench: fuzz.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(bench, 1, "error: damaged") is None
    assert ended(bench, 0) is None
    assert "'a.weight' is off by" in str(ended(bench, 0, factor=1 + 1e-11))
    assert "exit 2" in str(ended(bench, 2, "error: usage"))
    assert "exit 1" in str(ended(bench, 1, "Traceback (most recent call last):"))
    assert "unexpected" in str(ended(bench, 1, "error: KeyError: 3 (unexpected; please report it)"))
    bench.marker.touch()
    assert ended(bench, 1, "error: damaged") == "code was run"
    (bench.out / ".plain.safetensors.0.tmp").touch()
    assert "left behind" in str(ended(bench, 1, "error: damaged"))
    (bench.out / ".plain.safetensors.0.tmp").unlink()
    monkeypatch.setattr(fuzz, "peak_bytes", lambda: 2**31)
    assert ended(bench, 1, "error: damaged") == "2048 MiB"


@pytest.mark.filterwarnings("ignore")
def test_hostile_pickles_do_run_code_where_they_are_opened_carelessly(tmp_path: Path) -> None:
    for call in range(4):
        for form in range(15):
            marker = tmp_path / damage.MARKER
            damage.write_hostile(tmp_path / "a.pth", damage.foreign_state(), str(marker), call, form)
            if form % 5 == 3:
                continue  # a bare pickle, which torch.load takes for a damaged file
            torch.load(tmp_path / "a.pth", weights_only=False)
            assert marker.exists()
            marker.unlink()


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.zoo)])
def test_hostile_pickles_neither_run_nor_import_nor_end_the_process(count: int) -> None:
    command = [sys.executable, ROOT / "benchmarks/robustness/pickles.py", "--count", str(count), "--seed", "7"]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    found = json.loads(done.stdout)
    assert found["files"] == count
    assert found["problems"] == []
    assert any(kind.startswith("honest") and kind.endswith("read") for kind in found["outcomes"])


def test_the_watch_sees_what_a_careless_reader_does(tmp_path: Path) -> None:
    code = """
import sys, random, json
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import pickles, torch
pickles.read_checkpoint = lambda path, selection: torch.load(path, weights_only=False)
watch, draw, folder = pickles.Watch(), random.Random(0), Path(sys.argv[2])
seen = []
for _ in range(12):
    torch.save(pickles.honest(draw, str(folder / "RAN")), folder / "a.pth")
    pickles.read(folder / "a.pth", watch, draw)
    seen += watch.seen
print(json.dumps([(folder / "RAN").exists(), seen]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(SCRIPT.parent), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    ran, seen = json.loads(done.stdout)
    assert ran
    assert {"import", "exec", "os.system"} & {event.partition(" ")[0] for event in seen}
