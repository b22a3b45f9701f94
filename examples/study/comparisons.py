"""From rows to comparisons and their verdicts, as docs/study_plan.md promised before the runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from cells import SEEDS, Choice, Results, Row, Setting, cell_of
from intervals import holm, interval, p_value
from plan import at_an_end, best
from tasks import WORK

LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """DO-Conv minus plain, pair by pair on the fresh seeds."""

    setting: Setting
    plain: Choice
    ours: Choice
    pairs: list[tuple[Row, Row]]

    @property
    def whole(self) -> bool:
        return len(self.pairs) == len(SEEDS)

    def differences(self, figure: Callable[[Row], float]) -> list[float]:
        return [figure(ours) - figure(plain) for plain, ours in self.pairs]

    @property
    def scores(self) -> list[float]:
        return self.differences(lambda row: float(row["score"]))

    @property
    def losses(self) -> list[float]:
        """The last tenth's mean training loss, in % of the plain net's, by logarithms; without what diverged."""
        pairs = [(a["loss"], b["loss"]) for a, b in self.pairs if not (a["diverged"] or b["diverged"])]
        return [100 * math.log(b / a) for a, b in pairs]

    @property
    def speeds(self) -> list[float]:
        """The part of the steps, in %, after which the loss has come down to the plain net's last one."""
        return [reached(ours, plain) for plain, ours in self.pairs if not plain["diverged"]]

    @property
    def diverged(self) -> tuple[int, int]:
        """(plain, ours)"""
        return sum(a["diverged"] for a, _ in self.pairs), sum(b["diverged"] for _, b in self.pairs)


def reached(row: Row, plain: Row) -> float:
    """In % of the steps: where the running mean over a tenth of them is first no more than the plain net's loss over
    its last tenth. 100 of one that never is."""
    curve = row["curve"]
    width = max(1, len(curve) // 10)
    goal = statistics.fmean(plain["curve"][-width:])
    for end in range(width, len(curve) + 1):
        if statistics.fmean(curve[end - width : end]) <= goal:
            return 100 * end / len(curve)
    return 100.0


def compare(setting: Setting, plain: Choice, ours: Choice, results: Results) -> Comparison:
    """With the pairs that are there."""
    rows = [[results.get(cell_of(setting, one, seed)) for one in (plain, ours)] for seed in SEEDS]
    return Comparison(setting, plain, ours, [(a, b) for a, b in rows if a is not None and b is not None])


def tuned(setting: Setting, results: Results) -> Comparison | None:
    """Both sides' best choices; None before they are known."""
    plain, ours = best(setting, "plain", results), best(setting, "K", results)
    return compare(setting, plain, ours, results) if plain and ours else None


@dataclass(frozen=True)
class Verdict:
    """What a confirmatory comparison says."""

    setting: Setting
    comparison: Comparison | None
    p: float  # Holm's
    word: str  # gain, loss, at an end, no difference, open, not run


def verdicts(family: list[Setting], results: Results) -> list[Verdict]:
    """One for each of the family. A comparison that is not whole counts as p = 1: cutting the study short wins
    nothing."""
    compared = [tuned(setting, results) for setting in family]
    adjusted = holm([p_value(one.scores) if one and one.whole else 1.0 for one in compared])
    return [
        Verdict(setting, one, p, word(setting, one, p, results))
        for setting, one, p in zip(family, compared, adjusted, strict=True)
    ]


def word(setting: Setting, one: Comparison | None, p: float, results: Results) -> str:
    if one is None or not one.whole:
        return "not run"
    mean, half = interval(one.scores)
    if p < LEVEL and mean < 0:
        return "loss"
    if p < LEVEL:
        return "at an end" if at_an_end(setting, results) else "gain"
    margin = WORK[setting[:2]].task.margin
    return "no difference" if abs(mean) + half < margin else "open"


def sentence(found: list[Verdict]) -> str:
    """One task, net and optimizer over its lengths, in one sentence."""
    first = found[0].setting
    name = f"{first.task}, {first.net}, {first.optimizer}"
    ran = [one for one in found if one.word != "not run"]
    if not ran:
        return f"{name}: not run yet."
    words = {one.setting.length: one.word for one in ran}
    told = ", ".join(f"{said} at {length}x" for length, said in words.items())
    if len(ran) < len(found):
        said = "not all lengths have run"
    elif "loss" in words.values():
        said = "DO-Conv hurts"
    elif set(words.values()) == {"gain"}:
        said = "DO-Conv helps a tuned net" + (", at every length" if len(words) > 1 else "")
    elif "gain" in words.values():
        lasts = words[max(words)] == "gain"
        said = "DO-Conv helps, and does at the longest" if lasts else "DO-Conv helps; at the longest it is not shown to"
    else:
        said = "no help shown beyond a tuned plain net"
    return f"{name}: {said} ({told})."


def headline(found: list[Verdict]) -> str:
    counts = {said: sum(one.word == said for one in found) for said in ("gain", "loss", "not run")}
    if counts["not run"] == len(found):
        return "The second edition has not been run yet: its plan is [study_plan.md](study_plan.md)."
    left = f"; {counts['not run']} have not run" if counts["not run"] else ""
    start = f"Of {len(found)} comparisons against a plain net tuned over as many runs"
    if counts["gain"] == 0 and not left:
        return f"Nothing here helps beyond a tuned plain net. {start}, none shows a gain, and {counts['loss']} a loss."
    return f"{start}, {counts['gain']} show a gain and {counts['loss']} a loss, after Holm's correction{left}."
