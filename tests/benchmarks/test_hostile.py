"""Hostile and odd ONNX files: what onnxruntime executes against what is counted, and the bench's own checks."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cli import ROOT

from doconv_convert.check.macs import constants, walk
from doconv_convert.check.macs.counting import count_macs
from doconv_convert.check.macs.result import MacCount
from doconv_convert.check.macs.scope import Scope
from doconv_convert.errors import DoconvError

sys.path.insert(0, str(ROOT / "benchmarks/robustness"))
import hostile_onnx as bench
from executed import executed_macs
from hostile_nets import HOSTILE

# Of each kind; 32 kinds.
SEEDS = range(3)


def wrong(kind: str, seed: int) -> str | None:
    """What is wrong with the count of one net: a budget below what runs would pass, or an honest count is not exact."""
    case = bench.NETS[kind](np.random.default_rng(seed))
    executed = executed_macs(case.model, case.feeds)
    try:
        count = count_macs(case.model, ignore=case.ignore)
    except DoconvError as error:
        return str(error) if case.honest else None
    sure = not (count.uncounted or count.claimed)
    right = (sure and count.total == executed) if case.honest else (not sure or count.total >= executed)
    return None if right else f"{executed} MACs run, counted {count}"


@pytest.mark.parametrize("kind", bench.NETS)
def test_no_count_is_below_what_onnxruntime_executes(kind: str) -> None:
    assert [found for seed in SEEDS if (found := wrong(kind, seed))] == []


def test_the_hostile_nets_do_cost_something() -> None:
    """A kind whose nets run nothing would show nothing."""
    for kind, make in HOSTILE.items():
        cases = [make(np.random.default_rng(seed)) for seed in range(10)]
        assert max(executed_macs(case.model, case.feeds) for case in cases) > 1000, kind


def believed(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A counter that lets itself be talked down in one way."""
    if what == "claims":
        monkeypatch.setattr(walk.Walk, "nodes", believing_nodes)
    elif what == "functions":
        monkeypatch.setattr(walk, "in_runtime_domain", lambda domain: False)
    elif what == "hidden names":
        monkeypatch.setattr(Scope, "forget", lambda self, name: None)
    else:
        monkeypatch.setattr(constants, "OPERATORS", {**constants.OPERATORS, "Cast": saturated})


def saturated(_: object, values: Any) -> Any:
    """Infinity as the largest integer, which it is in some libraries."""
    return np.where(values[0] > 2.0**62, 2**63 - 1, 0)


def believing_nodes(self: walk.Walk, nodes: object, values: object, scope: Scope) -> MacCount:
    count = NODES(self, nodes, values, scope)  # type: ignore[arg-type]
    return replace(count, claimed=())


NODES = walk.Walk.nodes


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("claims", "claimed sizes"),
        ("functions", "functions that shadow operators"),
        ("hidden names", "names that hide others"),
        ("arithmetic", "arithmetic that differs"),
    ],
)
def test_a_counter_that_is_talked_down_is_found(monkeypatch: pytest.MonkeyPatch, what: str, kind: str) -> None:
    seeds = range(40)
    assert not any(wrong(kind, seed) for seed in seeds)
    believed(monkeypatch, what)
    assert any(wrong(kind, seed) for seed in seeds)


def test_the_bench_sees_what_is_wrong() -> None:
    fine = bench.Ended(1, "", "error: no", 1.0, 2**20)
    assert bench.survives(fine) is None
    assert bench.survives(replace(fine, seconds=31.0)) == "took 31 s"
    assert bench.survives(replace(fine, code=None)) is not None
    assert bench.survives(replace(fine, peak=2**31)) == "took 2048 MiB"
    assert "exit -11" in str(bench.survives(replace(fine, code=-11)))
    assert "unexpected" in str(bench.survives(replace(fine, error="Traceback (most recent call last)")))
    assert "no message" in str(bench.survives(replace(fine, error="")))
    case = HOSTILE["claimed sizes"](np.random.default_rng(0))
    passed = bench.Ended(0, '{"total": 9}', "", 1.0, 2**20)
    assert bench.judge(case, 10, passed) == "a budget of 9 passes, 10 MACs run"
    assert bench.judge(case, 10, replace(passed, code=3)) is None
    assert bench.judge(case, None, passed) == "onnxruntime refuses it"
    assert bench.judge(replace(case, honest=True), 9, passed) is None
    assert bench.judge(replace(case, honest=True), 10, passed) == "exit 0, 9; 10 MACs run"


@pytest.mark.parametrize(("kind", "seed"), [("calls of functions", 1), ("huge values", 2), ("no files", 4)])
def test_a_hostile_file_ends_in_words(tmp_path: Path, kind: str, seed: int) -> None:
    ended, problem = bench.file(kind, seed, tmp_path)
    assert problem is None, ended


@pytest.mark.zoo
def test_three_hundred_hostile_files(tmp_path: Path) -> None:
    problems = []
    for index, (kind, seed) in enumerate(bench.plan(300, 1000)):
        folder = tmp_path / str(index)
        folder.mkdir()
        ended, problem = (bench.net if kind in bench.NETS else bench.file)(kind, seed, folder)
        if problem is not None:
            problems.append((kind, seed, problem, ended.code))
    assert problems == []
