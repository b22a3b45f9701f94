"""The study's second edition: cells that repeat, a plan that is fair, verdicts that were promised."""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "examples/study"
NAMES = ("cells", "comparisons", "intervals", "plan", "study", "summary", "tables", "training")


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    before = set(sys.modules)
    threads = torch.get_num_threads()
    sys.path.insert(0, str(STUDY))
    try:
        yield SimpleNamespace(**{name: __import__(name) for name in NAMES})
    finally:
        sys.path.remove(str(STUDY))
        torch.set_num_threads(threads)
        for name in set(sys.modules) - before:
            if str(STUDY) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]


def row_of(cell: Any, score: float, diverged: bool = False) -> dict[str, Any]:
    loss = math.exp(-score / 10)
    curve = [] if diverged else [loss * (2 - step / 100) for step in range(100)]
    levers = [] if cell.arm == "plain" else [0.02] * 20
    tail = {"levers": levers, "departure": None, "seconds": 1.0, "machine": "some machine", "m": cell.m}
    return {"cell": list(cell), "curve": curve, "loss": loss, "score": score, "diverged": diverged, **tail}


def played(modules: SimpleNamespace, score: Callable[[Any], float], size: str = "cpu") -> dict[Any, Any]:
    """The plan to its end, with scores that somebody made up."""
    results: dict[Any, Any] = {}
    while cells := list(modules.plan.ready(results, size)):
        results |= {cell: row_of(cell, score(cell)) for cell in cells}
    return results


def made_up(gain: float) -> Callable[[Any], float]:
    """Best at the grid's third rate and at m = 10, with a seed's own level and a small scatter of each pair."""

    def score(cell: Any) -> float:
        scatter = 0.01 * math.sin(37 * cell.seed + len(cell.arm) * 1.7)
        off = abs(math.log(cell.rate / RATES[cell[:3]][2])) + 0.1 * (cell.m not in (None, 10.0))
        return 30 + 0.3 * math.sin(cell.seed) + scatter - 0.1 * off + gain * (cell.arm != "plain")

    return score


RATES: dict[tuple[str, str, str], tuple[float, ...]] = {}


@pytest.fixture(autouse=True)
def rates(modules: SimpleNamespace) -> None:
    RATES.update(modules.plan.RATES)


def test_a_cell_repeats_its_numbers_and_its_arms_part_from_one_start(modules: SimpleNamespace) -> None:
    def cell(arm: str, m: Any, seed: int = 100) -> Any:
        return modules.cells.Cell("denoise", "3x3", "adam", 1, arm, 0.003, m, seed)

    def run(arm: str, m: Any) -> dict[str, Any]:
        found: dict[str, Any] = modules.training.run(cell(arm, m), steps=2)
        return found

    plain, ours, again = run("plain", None), run("K", "1/lever"), run("K", "1/lever")
    assert modules.study.differences(ours, again) == []
    assert json.loads(json.dumps(ours)) == ours
    assert modules.study.differences(ours, {**ours, "score": ours["score"] + 1e-4}) == ["score"]
    assert ours["curve"][0] == plain["curve"][0]
    assert ours["curve"][-1] != plain["curve"][-1]
    starts = [modules.training.start(cell("plain", None, seed))[0].weight for seed in (100, 100, 101)]
    assert starts[0].equal(starts[1])
    assert not starts[0].equal(starts[2])
    assert ours["m"] == pytest.approx(1 / ours["levers"][0], rel=1e-3)
    assert ours["departure"] > 0


@pytest.mark.parametrize(
    ("task", "net"),
    [("denoise", "3x3 bn"), ("denoise", "7x7"), ("superres", "espcn"), ("denoise", "fourier"), ("fashion", "resnet18")],
)
def test_every_net_trains_converted(modules: SimpleNamespace, task: str, net: str) -> None:
    work = modules.training.WORK[task, net]
    starts = [modules.training.start(modules.cells.Cell(task, net, "adam", 1, arm, 0.1, 1.0, 5)) for arm in ("K", "2K")]
    x = torch.randn(2, 1, 8, 8)
    found = [model(x) for model in starts]
    assert found[0].equal(found[1])
    assert found[0].shape == {"superres": (2, 1, 16, 16), "fashion": (2, 10)}.get(task, x.shape)
    target = torch.tensor([3, 7]) if task == "fashion" else torch.zeros_like(found[0])
    modules.training.backward(starts[0], work.task, (x, target))
    assert 0 < modules.training.median_lever(starts[0]) < 1


def test_a_training_that_runs_away_counts_as_the_floor(modules: SimpleNamespace) -> None:
    cell = modules.cells.Cell("denoise", "3x3", "sgd", 1, "plain", 1e6, None, 100)
    row = modules.training.run(cell, steps=4)
    assert row["diverged"]
    assert row["loss"] is None
    assert 20 < row["score"] < 21  # sigma 25: -20 log10(25 / 255) is 20.17, a little more with values cut to [0, 1]


def test_both_sides_are_tuned_over_as_many_runs_and_meet_on_seeds_of_their_own(modules: SimpleNamespace) -> None:
    results = played(modules, made_up(0.1))
    tuning, fresh = modules.cells.TUNING_SEEDS, modules.cells.SEEDS
    assert not {*tuning, *range(6)} & {*fresh}
    for setting in modules.plan.confirmatory("cpu"):
        sides = [
            [cell for cell in results if cell.setting == setting and cell.arm == arm and cell.seed in tuning]
            for arm in ("plain", "K")
        ]
        assert [len(side) for side in sides] == [{1: 12, 4: 6, 16: 0}[setting.length]] * 2
        one = modules.comparisons.tuned(setting, results)
        assert one.whole
        assert (one.plain.rate, one.ours.m) == (RATES[setting[:3]][2], 10.0)


def test_no_fresh_seed_runs_before_its_setting_is_tuned(modules: SimpleNamespace) -> None:
    first = list(modules.plan.ready({}, "cpu"))
    assert first[0].setting == modules.plan.FOUR[0]
    assert {cell.arm for cell in first[:24]} == {"plain", "K"}
    fixed = {choice for part in modules.plan.PILOT for choice in part.choices}
    assert all(cell.choice in fixed for cell in first if cell.seed in modules.cells.SEEDS)
    assert all(cell.length == 1 for cell in first)
    only = list(modules.plan.ready({}, "cpu", "superres"))
    assert {cell.task for cell in only} == {"superres"}


def test_the_reserve_keeps_to_the_budget(modules: SimpleNamespace) -> None:
    results = played(modules, made_up(0.0))
    reserved = modules.plan.FOUR[2]._replace(length=16)
    assert any(cell.setting == reserved for cell in results)
    spent = {c: {**row, "seconds": 1e5} for c, row in results.items() if c.setting != reserved}
    assert list(modules.plan.ready(spent, "cpu")) == []


def test_a_planted_gain_is_found_and_without_one_none_is(modules: SimpleNamespace) -> None:
    family = modules.plan.confirmatory("cpu")
    assert len(family) == 13
    for gain, word in ((0.5, "gain"), (-0.5, "loss"), (0.0, "no difference")):
        found = modules.comparisons.verdicts(family, played(modules, made_up(gain)))
        assert {one.word for one in found} == {word}
    assert "Nothing here helps" in modules.comparisons.headline(found)


def test_a_best_rate_at_the_end_of_its_grid_is_no_gain(modules: SimpleNamespace) -> None:
    def score(cell: Any) -> float:
        return made_up(0.5)(cell) + (1.0 if cell.arm == "plain" and cell.rate == RATES[cell[:3]][-1] else 0.0) * (
            cell.seed in modules.cells.TUNING_SEEDS
        )

    found = modules.comparisons.verdicts(modules.plan.confirmatory("cpu"), played(modules, score))
    assert {one.word for one in found} == {"at an end"}


def test_what_is_cut_short_wins_nothing(modules: SimpleNamespace) -> None:
    family, results = modules.plan.confirmatory("cpu"), played(modules, made_up(0.5))
    last = [c for c in results if c.setting == family[0] and c.seed == modules.cells.SEEDS[-1]]
    cut = {cell: row for cell, row in results.items() if cell not in last}
    found = modules.comparisons.verdicts(family, cut)
    assert found[0].word == "not run"
    assert found[0].p == 1
    assert "1 have not run" in modules.comparisons.headline(found)


def test_intervals_and_holm(modules: SimpleNamespace) -> None:
    from scipy.stats import ttest_1samp

    values = [0.3, 0.1, -0.05, 0.2, 0.15]
    theirs = ttest_1samp(values, 0)
    assert modules.intervals.p_value(values) == pytest.approx(theirs.pvalue)
    mean, half = modules.intervals.interval(values)
    assert (mean - half, mean + half) == pytest.approx(tuple(theirs.confidence_interval()))
    assert modules.intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_speed_is_the_part_of_the_steps_to_the_plain_nets_last_loss(modules: SimpleNamespace) -> None:
    plain = {"curve": [100.0 - step for step in range(100)]}
    twice = {"curve": [100.0 - 2 * step for step in range(100)]}
    never = {"curve": [100.0] * 100}
    reached = modules.comparisons.reached
    assert (reached(plain, plain), reached(twice, plain), reached(never, plain)) == (100, 53, 100)


def test_the_page_has_every_choice_and_its_plots_repeat(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = played(modules, made_up(0.5))
    chosen = [one for one in results if one.task == "superres"]
    (tmp_path / "study2.jsonl").write_text("".join(json.dumps(results[one]) + "\n" for one in chosen))
    page = tmp_path / "study.md"
    monkeypatch.setattr(sys, "argv", ["summary.py", str(tmp_path), str(page)])
    drawn = []
    for _ in range(2):
        modules.summary.main()
        drawn.append([path.read_bytes() for path in sorted(tmp_path.glob("*.svg"))])
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 3
    text = page.read_text()
    assert "12 have not run" in text
    assert "superres, espcn, adam: DO-Conv helps" in text
    for cell in chosen:
        assert f"{cell.rate:g}{'' if cell.m is None else f', m = {cell.m}'}: " in text or f"| {cell.choice} |" in text


def test_without_results_the_page_says_so(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "study.md"
    monkeypatch.setattr(sys, "argv", ["summary.py", str(tmp_path), str(page)])
    modules.summary.main()
    assert "has not been run yet" in page.read_text()


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_plan_page_counts_what_would_run(modules: SimpleNamespace, size: str) -> None:
    page = (ROOT / "docs/study_plan.md").read_text()
    assert "\n".join(modules.plan.cost_table(size)) in page
    assert "\n".join(modules.plan.grid_table(size)) in page
    assert f"has {len(modules.plan.confirmatory('cpu'))} comparisons" in page
    if size == "cpu":
        played(modules, made_up(0.1))  # ends
        minutes = re.findall(r"\| every m, and 2K \| \d+ \| [\d.]+ \| (\d+) \|", page)
        assert int(minutes[0]) <= 150


def test_a_run_goes_on_from_its_file(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study2.jsonl"
    cells = list(modules.plan.ready({}, "cpu", "superres"))
    path.write_text("".join(json.dumps(row_of(cell, 30.0)) + "\n" for cell in cells[:-2]) + '{"cell": ["super')
    monkeypatch.setattr(modules.plan, "cost", lambda setting: 60.0)
    command = ["study.py", "--resume", str(path), "--only", "superres", "--jobs", "1", "--steps", "2", "--minutes"]
    for minutes, run in (("0.9", 0), ("9", 2)):
        monkeypatch.setattr(sys, "argv", [*command, minutes])
        if run:  # the tuning's last two, and none of what then is ready
            monkeypatch.setattr(modules.plan, "SEEDS", ())
        modules.study.main()
        assert f"{run} cells run; " in capsys.readouterr().out
        assert list(modules.cells.read(path)) == cells[: len(cells) - 2 + run]
    monkeypatch.setattr(modules.study, "run", lambda cell, *_: {**modules.cells.read(path)[cell], "score": 1.0})
    monkeypatch.setattr(sys, "argv", [*command[:3], "--repeat", "1"])
    with pytest.raises(SystemExit, match="True"):
        modules.study.main()
    assert "differs in score" in capsys.readouterr().out
