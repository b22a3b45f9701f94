"""The second edition's tables. Every choice that was run is in one of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from cells import SEEDS, TUNING_SEEDS, Choice, Results, Setting
from comparisons import Comparison, Verdict, compare, tuned
from intervals import interval
from plan import PILOT, SIDES, Fixed, Untuned, at_an_end, best, parts
from tasks import WORK

Lines = list[str]


def spread(values: Sequence[float], digits: int) -> str:
    mean, half = interval(values)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def time_ratio(one: Comparison) -> float:
    return statistics.median(float(ours["seconds"]) / plain["seconds"] for plain, ours in one.pairs if plain["seconds"])


def confirmatory(found: Sequence[Verdict], results: Results) -> Lines:
    lines = [
        "| setting | plain | DO-Conv | pairs | plain's score | difference | p (Holm) | verdict | last loss, % "
        "| steps, % | time |",
        "|---|---|---|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for verdict in found:
        one = verdict.comparison
        if one is None or not one.pairs:
            lines.append(f"| {verdict.setting} | | | 0 | | | | {verdict.word} | | | |")
            continue
        unit = WORK[verdict.setting[:2]].task.unit
        plain = statistics.fmean(a["score"] for a, _ in one.pairs)
        speeds = statistics.median(one.speeds) if one.speeds else float("nan")
        end = " (an end)" if at_an_end(verdict.setting, results) else ""
        lost = f" ({one.diverged[0]} and {one.diverged[1]} diverged)" if any(one.diverged) else ""
        lines.append(
            f"| {verdict.setting} | {one.plain.rate:g}{end} | {one.ours.rate:g}, m = {one.ours.m} "
            f"| {len(one.pairs)}{lost} | {plain:.3f} {unit} | {spread(one.scores, 3)} | {verdict.p:.2g} "
            f"| {verdict.word} | {spread(one.losses, 2) if one.losses else ''} | {speeds:.0f} | {time_ratio(one):.2f} |"
        )
    return lines


def against(compared: Sequence[Comparison]) -> Lines:
    """Choices against plain ones, uncorrected."""
    lines = [
        "| setting | plain | DO-Conv | pairs | plain's score | difference | last loss, % |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for one in compared:
        plain = statistics.fmean(a["score"] for a, _ in one.pairs)
        unit = WORK[one.setting[:2]].task.unit
        lines.append(
            f"| {one.setting} | {one.plain.rate:g} | {one.ours} | {len(one.pairs)} | {plain:.3f} {unit} "
            f"| {spread(one.scores, 3)} | {spread(one.losses, 2) if one.losses else ''} |"
        )
    return lines


def pilots(results: Results) -> list[Comparison]:
    """DO-Conv against plain at the same rate, as the pilot had it; and against the tuned plain net."""
    found = []
    for part in PILOT:
        for ours in part.choices:
            if ours.arm != "plain":
                found.append(compare(part.setting, Choice("plain", ours.rate), ours, results))
        reference = best(part.setting, "plain", results)
        if reference is not None:
            found += [
                compare(part.setting, reference, ours, results)
                for ours in part.choices
                if ours.arm != "plain" and ours.rate != reference.rate
            ]
    return [one for one in found if one.pairs]


def untuned(results: Results, size: str) -> list[Comparison]:
    found = []
    for _, part in parts(size):
        plain = best(part.setting, "plain", results) if isinstance(part, Untuned) else None
        if isinstance(part, Untuned) and plain is not None:
            choices = [one for one in part.choices(results) if one is not None]
            found += [compare(part.setting, plain, one, results) for one in choices]
    return [one for one in found if one.pairs]


def reserves(results: Results, size: str, family: Sequence[Setting]) -> list[Comparison]:
    """What was compared beyond the family."""
    settings = dict.fromkeys(p.setting for _, p in parts(size) if not isinstance(p, Fixed) and p.setting not in family)
    compared = [tuned(setting, results) for setting in settings]
    return [one for one in compared if one is not None and one.pairs]


def tuning(results: Results) -> Lines:
    """The mean validation score of every choice on the tuning seeds."""
    scores: dict[tuple[Setting, Choice], list[float]] = {}
    for cell, row in results.items():
        if cell.seed in TUNING_SEEDS:
            scores.setdefault((cell.setting, cell.choice), []).append(row["score"])
    lines = ["| setting | side | choices, best first: validation score |", "|---|---|---|"]
    for setting in dict.fromkeys(one for one, _ in scores):
        for side in SIDES:
            tried = [
                (statistics.fmean(found), choice)
                for (where, choice), found in scores.items()
                if where == setting and choice.arm == side
            ]
            told = "; ".join(
                f"{choice.rate:g}{'' if choice.m is None else f', m = {choice.m}'}: {mean:.3f}"
                for mean, choice in sorted(tried, key=lambda one: (-one[0], one[1].rate))
            )
            lines.append(f"| {setting} | {side} | {told} |")
    return lines


def alone(results: Results) -> Lines:
    """The mean test score of every choice on the fresh seeds."""
    scores: dict[tuple[Setting, Choice], list[float]] = {}
    for cell, row in results.items():
        if cell.seed in SEEDS:
            scores.setdefault((cell.setting, cell.choice), []).append(row["score"])
    lines = ["| setting | choice | seeds | score |", "|---|---|---:|---:|"]
    for (setting, choice), found in sorted(scores.items(), key=lambda one: (str(one[0][0]), str(one[0][1]))):
        lines.append(f"| {setting} | {choice} | {len(found)} | {statistics.fmean(found):.3f} |")
    return lines
