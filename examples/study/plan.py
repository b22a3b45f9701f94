"""The second edition's plan: which cells, in which order. What decides comes first.

Tuning is symmetric. At length 1 each side gets six choices on two seeds: the plain net six rates, DO-Conv the middle
two of them with three multiples m. At length 4 the three best of each side go on; the best there is taken at length
16, too. The best choices of both sides then meet on eight fresh seeds. Everything follows from the finished cells, so
that a plan that was cut short goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from cells import LENGTHS, SEEDS, TUNING_SEEDS, Cell, Choice, Results, Setting, cell_of

RATES: dict[tuple[str, str, str], tuple[float, ...]] = {
    ("denoise", "3x3", "adam"): (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01),
    ("denoise", "3x3", "sgd"): (0.3, 0.45, 0.6, 1.0, 1.4, 2.0),
    ("denoise", "3x3 bn", "adam"): (0.002, 0.003, 0.005, 0.01, 0.02, 0.03),
    ("denoise", "3x3 bn", "sgd"): (0.01, 0.018, 0.032, 0.056, 0.075, 0.1),
    ("denoise", "7x7", "adam"): (0.0003, 0.0005, 0.001, 0.002, 0.003, 0.005),
    ("superres", "espcn", "adam"): (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01),
    ("fashion", "stack bn", "adam"): (0.001, 0.002, 0.003, 0.005, 0.01, 0.02),
    ("fashion", "stack bn", "sgd"): (0.018, 0.032, 0.056, 0.1, 0.18, 0.32),
    ("denoise", "fourier", "adam"): (0.0005, 0.001, 0.002, 0.004),
    ("fashion", "resnet18", "adam"): (0.0005, 0.001, 0.002, 0.004),
    ("fashion", "resnet18", "sgd"): (0.032, 0.056, 0.1, 0.18),
}
"""The plain net's, by task, net and optimizer."""
MULTIPLES: dict[str, tuple[float | str, ...]] = {"sgd": (1.0, 10.0, "1/lever"), "adam": (1.0, 3.0, 10.0)}
RESERVE = "in reserve"
BUDGET = 18_000.0  # seconds of processor time, in which the reserve may run: 150 minutes on two cores
GPU_NETS = ("fourier", "resnet18")
SURVIVORS = 3
SIDES = ("plain", "K")


@dataclass(frozen=True)
class Tuning:
    """Two sides' search for their best choice in a setting."""

    setting: Setting

    def cells(self, results: Results) -> Iterator[Cell | None]:
        seeds = TUNING_SEEDS[:1] if self.setting.net in GPU_NETS else TUNING_SEEDS
        for side in SIDES:
            found = candidates(self.setting, side, results)
            yield from (cell_of(self.setting, one, seed) for one in found for seed in seeds)
            yield from [None] * (len(seeds) * (0 if found else SURVIVORS))


@dataclass(frozen=True)
class Deciding:
    """Both sides' best choices on the fresh seeds: a confirmatory comparison."""

    setting: Setting

    def cells(self, results: Results) -> Iterator[Cell | None]:
        yield from _pairs(self.setting, [best(self.setting, side, results) for side in SIDES])


@dataclass(frozen=True)
class Untuned:
    """Exploratory: DO-Conv at the plain net's best rate with each m, and its best choice with D_mul = 2K."""

    setting: Setting

    def choices(self, results: Results) -> list[Choice | None]:
        plain, ours = (best(self.setting, side, results) for side in SIDES)
        multiples = MULTIPLES[self.setting.optimizer]
        at_plain = [Choice("K", plain.rate, m) if plain else None for m in multiples]
        return [*at_plain, ours._replace(arm="2K") if ours else None]

    def cells(self, results: Results) -> Iterator[Cell | None]:
        yield from _pairs(self.setting, self.choices(results))


@dataclass(frozen=True)
class Fixed:
    """The pilot's table at the pilot's rates, on the fresh seeds."""

    setting: Setting
    choices: tuple[Choice, ...]

    def cells(self, results: Results) -> Iterator[Cell | None]:
        yield from _pairs(self.setting, self.choices)


Part = Tuning | Deciding | Untuned | Fixed


def _pairs(setting: Setting, choices: list[Choice | None] | tuple[Choice, ...]) -> Iterator[Cell | None]:
    """Seeds outermost: what is cut short has whole pairs."""
    yield from (None if one is None else cell_of(setting, one, seed) for seed in SEEDS for one in choices)


def grid(setting: Setting, side: str) -> list[Choice]:
    """A side's choices at length 1: as many on both sides."""
    rates, multiples = RATES[setting[:3]], MULTIPLES[setting.optimizer]
    if side == "plain":
        return [Choice("plain", rate) for rate in rates]
    middle = rates[len(rates) // 2 - 1 : len(rates) // 2 + 1]
    return [Choice(side, rate, m) for rate in middle for m in multiples[: len(rates) // 2]]


def candidates(setting: Setting, side: str, results: Results) -> list[Choice]:
    """What is tuned over at this length: the grid, or of it the best at length 1; none as long as that is unknown."""
    if setting.length == 1:
        return grid(setting, side)
    return ranking(setting._replace(length=1), side, results)[:SURVIVORS]


def ranking(setting: Setting, side: str, results: Results) -> list[Choice]:
    """The candidates, best first by their mean score of the tuning's part and seeds; none before all have run."""
    seeds = TUNING_SEEDS[:1] if setting.net in GPU_NETS else TUNING_SEEDS
    scores: dict[Choice, float] = {}
    for choice in candidates(setting, side, results):
        rows = [results.get(cell_of(setting, choice, seed)) for seed in seeds]
        if None in rows:
            return []
        scores[choice] = fmean(row["score"] for row in rows if row is not None)
    return sorted(scores, key=lambda one: -scores[one])  # stable: of equals the lower rate


def best(setting: Setting, side: str, results: Results) -> Choice | None:
    """What tuning chose: at length 16 what it chose at length 4."""
    ranked = ranking(setting._replace(length=min(setting.length, LENGTHS[1])), side, results)
    return ranked[0] if ranked else None


def at_an_end(setting: Setting, results: Results) -> bool | None:
    """Is the plain net's best rate the first or the last of its grid, so that a better one may lie outside?"""
    plain = best(setting, "plain", results)
    return None if plain is None else plain.rate in (RATES[setting[:3]][0], RATES[setting[:3]][-1])


def _fixed(optimizer: str, *choices: tuple[float, tuple[float, ...]]) -> list[Choice]:
    found = []
    for rate, multiples in choices:
        found += [Choice("plain", rate), *(Choice("K", rate, m) for m in multiples)]
    return found


PILOT = (
    Fixed(
        Setting("denoise", "3x3", "adam"),
        (*_fixed("adam", (0.001, (1.0, 3.0)), (0.003, (1.0, 3.0)), (0.005, (1.0,))), Choice("2K", 0.003, 1.0)),
    ),
    Fixed(
        Setting("denoise", "3x3", "sgd"),
        tuple(_fixed("sgd", (0.1, (1.0, 10.0, 100.0)), (0.3, (30.0,)), (0.6, (30.0,)), (1.0, (10.0,)))),
    ),
)
FOUR = [
    Setting("denoise", net, optimizer) for net, optimizer in
    (("3x3", "adam"), ("3x3 bn", "adam"), ("3x3", "sgd"), ("3x3 bn", "sgd"))
]  # fmt: skip
OTHERS = [
    Setting("fashion", "stack bn", "adam"),
    Setting("fashion", "stack bn", "sgd"),
    Setting("superres", "espcn", "adam"),
    Setting("denoise", "7x7", "adam"),
]
GPU = [
    Setting("fashion", "resnet18", "adam"),
    Setting("denoise", "fourier", "adam"),
    Setting("fashion", "resnet18", "sgd"),
]


def at(length: int, settings: list[Setting]) -> list[Setting]:
    return [setting._replace(length=length) for setting in settings]


def confirmatory(size: str) -> list[Setting]:
    """The family of comparisons that Holm's correction counts."""
    return GPU if size == "gpu" else [*FOUR, *at(4, FOUR[:3]), *at(16, FOUR[:2]), *OTHERS]


def parts(size: str) -> list[tuple[str, Part]]:
    """(what the page calls it, part), in order."""
    if size == "gpu":
        return [(str(one), part) for one in GPU for part in (Tuning(one), Deciding(one))]
    tuned = [*FOUR, *at(4, FOUR[:3])]
    return [
        *((f"denoising, {one.length}x", part) for one in tuned for part in (Tuning(one), Deciding(one))),
        *(("denoising, 16x", Deciding(one)) for one in at(16, FOUR[:2])),
        *((f"{one.task}, {one.net}", part) for one in OTHERS for part in (Tuning(one), Deciding(one))),
        *(("the pilot's table", part) for part in PILOT),
        *(("every m, and 2K", Untuned(one)) for one in FOUR[:2]),
        *((RESERVE, Untuned(one)) for one in (FOUR[2], *OTHERS)),
        *((RESERVE, part(one)) for one in at(4, FOUR[3:]) for part in (Tuning, Deciding)),
        *((RESERVE, Deciding(one)) for one in at(16, FOUR[2:])),
    ]


def ready(results: Results, size: str, only: str | None = None) -> Iterator[Cell]:
    """Cells that can run now, the most important first; what waits for a tuning is left out."""
    seen, used = set(results), sum(row["seconds"] for row in results.values())
    for name, part in parts(size):
        if only is not None and part.setting.task != only:
            continue
        if name == RESERVE and used + cost(part.setting) > BUDGET:
            continue
        for cell in part.cells(results):
            if cell is not None and cell not in seen:
                seen.add(cell)
                yield cell


def counts(size: str) -> dict[str, tuple[int, float]]:
    """By part: the cells and their seconds on one core, as if no two parts shared a cell or chose one twice."""
    found: dict[str, tuple[int, float]] = {}
    for name, part in parts(size):
        number, seconds = found.get(name, (0, 0.0))
        cells = len(list(part.cells({})))
        found[name] = number + cells, seconds + cells * cost(part.setting)
    return found


def grid_table(size: str) -> list[str]:
    """docs/study_plan.md's: every rate that tuning tries."""
    lines = ["| setting | plain's rates | DO-Conv's rates | its m |", "|---|---|---|---|"]
    for setting in dict.fromkeys(one._replace(length=1) for one in confirmatory(size)):
        ours = grid(setting, "K")
        tried = [dict.fromkeys(values) for values in (RATES[setting[:3]], [c.rate for c in ours], [c.m for c in ours])]
        told = (", ".join(one if isinstance(one, str) else f"{one:g}" for one in some) for some in tried)
        lines.append(f"| {', '.join(setting[:3])} | {' | '.join(told)} |")
    return lines


def cost_table(size: str) -> list[str]:
    """docs/study_plan.md's: minutes with two jobs, part by part, and their sum."""
    lines, total = ["| part, in the order of the runs | cells | minutes | in all |", "|---|---:|---:|---:|"], 0.0
    for name, (cells, seconds) in counts(size).items():
        minutes = seconds / 60 / (1 if size == "gpu" else 2)
        total += minutes
        lines.append(f"| {name} | {cells} | {minutes:.1f} | {total:.0f} |")
    return lines


SECONDS = {"3x3": 12, "3x3 bn": 13, "7x7": 19, "espcn": 8, "stack bn": 18, "fourier": 5, "resnet18": 5}
"""A training of length 1 on a core, its score included."""


def cost(setting: Setting) -> float:
    return float(SECONDS[setting.net] * setting.length)
