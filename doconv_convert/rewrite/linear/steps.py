"""A graph as steps, and what is found in it. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from doconv_convert.rewrite.linear.affine import AffineConv
from doconv_convert.rewrite.linear.operations import AveragePool, Combination, Scale, ZeroPad
from doconv_convert.rewrite.linear.reasons import Reason

Merge = Literal["none", "branches", "all"]
MERGES: tuple[Merge, ...] = ("none", "branches", "all")
Kind = Literal["convolution", "batch norm", "other"]
Operation = AffineConv | Scale | Combination | AveragePool | ZeroPad

PASSES_ON = Combination((1.0,))


@dataclass(frozen=True)
class Step:
    """One node of a graph: the values it reads, and what it does to them if that is affine, else None.

    `refused` says why a node that looks linear is not; `parameters` are the names and sizes of those
    it reads; `writes` is the value
    that it overwrites.
    """

    name: str
    inputs: tuple[str, ...]
    operation: Operation | None = None
    kind: Kind = "other"
    parameters: tuple[tuple[str, int], ...] = ()
    refused: Reason | None = None
    writes: str | None = None


@dataclass(frozen=True)
class LinearRegion:
    """A region: its steps in order (the last one's value is its output), the value it reads, and what it is."""

    steps: tuple[Step, ...]
    entry: str
    conv: AffineConv
    macs: int
    parameters: int

    @property
    def output(self) -> str:
        return self.steps[-1].name

    def count(self, kind: Kind) -> int:
        return sum(step.kind == kind for step in self.steps)


@dataclass(frozen=True)
class DeclinedRegion:
    """The steps that look like a region, and why they are left."""

    steps: tuple[Step, ...]
    entry: str
    reason: Reason


@dataclass(frozen=True)
class Found:
    regions: list[LinearRegion]
    declined: list[DeclinedRegion]
