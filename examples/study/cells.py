"""What is trained: a setting (shared by both sides of a comparison), a side's arm and rates, a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

TUNING_SEEDS = (10, 11)
SEEDS = tuple(range(100, 108))
"""Of what is compared. The pilot had 0 to 3, the search for the grids' ranges 5."""
LENGTHS = (1, 4, 16)

Row = dict[str, Any]


class Setting(NamedTuple):
    task: str
    net: str
    optimizer: str
    length: int = 1

    def __str__(self) -> str:
        return f"{self.task}, {self.net}, {self.optimizer}, {self.length}x"


class Choice(NamedTuple):
    """What tuning chooses on one side. `m` is D's learning rate over that of the rest: a number or "1/lever"; None of
    the plain net."""

    arm: str  # "plain", or D_mul: "K", "2K"
    rate: float
    m: float | str | None = None

    def __str__(self) -> str:
        of_d = "" if self.m is None else f", m = {self.m if isinstance(self.m, str) else f'{self.m:g}'}"
        return f"{self.arm} at {self.rate:g}{of_d}"


class Cell(NamedTuple):
    """One training."""

    task: str
    net: str
    optimizer: str
    length: int
    arm: str
    rate: float
    m: float | str | None
    seed: int

    @property
    def setting(self) -> Setting:
        return Setting(*self[:4])

    @property
    def choice(self) -> Choice:
        return Choice(*self[4:7])


Results = dict[Cell, Row]


def cell_of(setting: Setting, choice: Choice, seed: int) -> Cell:
    return Cell(*setting, *choice, seed)


def read(path: Path) -> Results:
    """The finished cells. A last line that a killed run left unfinished is cut off the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return {Cell(*row["cell"]): row for row in map(json.loads, whole.decode().splitlines())}
