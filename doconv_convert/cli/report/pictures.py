"""The pictures of a report as paths of inline SVG: pure functions from numbers to a text of digits.

A picture is a row of bars in a box of `slots` by 100 units, the first thing at the left; the page stretches it to its
own width and writes every text beside it, in HTML.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

HEIGHT = 100.0
# Fewer bars than these would be slabs.
_LEAST_SLOTS = 12
# From so many bars on, the gaps between them would be finer than a pixel.
_NO_GAPS = 200
# The least bar that can be seen, in units.
_LEAST_BAR = 0.8


@dataclass(frozen=True)
class Bars:
    """The paths of the bars, those above a line apart from those below it; `line` is its height from the top, None
    where there is none. `low` and `high` are the values at the box' lower and upper edge."""

    slots: int
    above: str
    below: str
    line: float | None
    low: float
    high: float


def linear_bars(values: Sequence[float | None]) -> Bars:
    """Bars from zero up; a gap where there is no value."""
    high = max((value for value in values if value is not None), default=0.0)
    tops = [None if value is None else HEIGHT * (1 - value / high if high else 1.0) for value in values]
    return Bars(slots_for(values), _path(tops, HEIGHT), "", None, 0.0, high)


def log_bars(values: Sequence[float | None], line: float) -> Bars:
    """Bars from the value `line` up and down, by logarithm; zero reaches the lower edge."""
    positive = [value for value in values if value is not None and value > 0]
    low, high = min([line / 10, *positive]), max([line * 10, *positive])

    def height(value: float) -> float:
        share = math.log(max(value, low) / low) / math.log(high / low)
        return HEIGHT * (1 - share)

    base = height(line)
    above = [None if value is None or not value > line else height(value) for value in values]
    below = [None if value is None or value > line else height(value) for value in values]
    return Bars(slots_for(values), _path(above, base), _path(below, base), base, low, high)


def slots_for(values: Sequence[object]) -> int:
    return max(len(values), _LEAST_SLOTS)


def _path(ends: Sequence[float | None], base: float) -> str:
    """A rectangle from `base` to each end, all in one path."""
    gap = 0.0 if len(ends) >= _NO_GAPS else 0.2
    parts = []
    for index, end in enumerate(ends):
        if end is None:
            continue
        size = base - end
        if size and abs(size) < _LEAST_BAR:
            size = math.copysign(_LEAST_BAR, size)
        if size:
            parts.append(f"M{_short(index + gap / 2)} {_short(base)}v{_short(-size)}h{_short(1 - gap)}v{_short(size)}z")
    return "".join(parts)


def _short(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")
