"""Finding linear regions in a graph and the one convolution that each of them is. Importing this needs no torch.

A region has one input and one output, and every step from the one to the other is affine. Walking back from its
output, always to the latest value that is still open, the open values shrink to a single one exactly where all ways
lead through it: that is an input.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from doconv_convert.rewrite.linear.affine import AffineConv, composed
from doconv_convert.rewrite.linear.operations import (
    AveragePool,
    Combination,
    Scale,
    ZeroPad,
    average_pool,
    combined,
    identity,
    scaled,
    zero_pad,
)
from doconv_convert.rewrite.linear.reasons import Declined, Reason

Merge = Literal["none", "branches", "all"]
MERGES: tuple[Merge, ...] = ("none", "branches", "all")
Kind = Literal["convolution", "batch norm", "other"]
Operation = AffineConv | Scale | Combination | AveragePool | ZeroPad

# Input sizes at which the MACs of a region and of its convolution are compared. Borders and strides leave a remainder
# that depends on the size; a region that takes none of them has a kernel beyond all that is trained.
SIZES = (7, 16, 33, 64, 225)
# An input of this size for the figures that are shown.
SHOWN_SIZE = 64
PASSES_ON = Combination((1.0,))


@dataclass(frozen=True)
class Step:
    """One node of a graph: the values it reads, and what it does to them if that is affine, else None.

    `refused` says why a node that looks linear is not; `parameters` are those that go with it; `writes` is the value
    that it overwrites.
    """

    name: str
    inputs: tuple[str, ...]
    operation: Operation | None = None
    kind: Kind = "other"
    parameters: int = 0
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


@dataclass(frozen=True)
class _Candidate:
    steps: frozenset[str]
    entry: str
    reason: Reason | None


def find_regions(steps: Sequence[Step], merge: Merge, *, even_padding: bool = False) -> Found:
    """The regions of a graph, whose steps come in topological order, from its outputs back; no two overlap.

    "branches" takes regions with two convolutions or parallel paths, "all" a convolution with its batch norm too. With
    `even_padding` the convolution's padding must be one that torch's layers can have.
    """
    graph = _Graph(steps)
    found = Found([], [])
    taken: set[str] = set()
    if merge == "none":
        return found
    for step in reversed(steps):
        if step.name in taken or step.operation == PASSES_ON or (step.operation is None and step.refused is None):
            continue
        candidates = [one for one in graph.candidates(step.name) if graph.is_wanted(one, merge)]
        declined: DeclinedRegion | None = None
        for candidate in reversed(candidates):
            inside = graph.in_order(candidate.steps)
            try:
                found.regions.append(graph.region(candidate, even_padding))
                taken |= candidate.steps
                declined = None
                break
            except Declined as error:
                declined = declined or DeclinedRegion(inside, candidate.entry, error.reason)
        if declined is not None and not _is_known(declined, found.declined):
            found.declined.append(declined)
    found.regions.reverse()
    found.declined.reverse()
    return found


def _is_known(declined: DeclinedRegion, others: Sequence[DeclinedRegion]) -> bool:
    """Whether it is a part of a region declined before for the same reason."""
    names = {step.name for step in declined.steps}
    return any(other.reason is declined.reason and names <= {step.name for step in other.steps} for other in others)


class _Graph:
    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps: Mapping[str, Step] = {step.name: step for step in steps}
        self.order = {step.name: index for index, step in enumerate(steps)}
        self.users: dict[str, list[str]] = {step.name: [] for step in steps}
        self.readers: dict[str, list[str]] = {}  # of a storage, whatever the value is called
        self.writers: dict[str, list[str]] = {}
        for step in steps:
            for value in step.inputs:
                self.users[value].append(step.name)
                if step.operation != PASSES_ON:
                    self.readers.setdefault(self._storage(value), []).append(step.name)
            if step.writes is not None:
                self.writers.setdefault(self._storage(step.writes), []).append(step.name)

    def in_order(self, names: frozenset[str]) -> tuple[Step, ...]:
        return tuple(self.steps[name] for name in sorted(names, key=self.order.__getitem__))

    def candidates(self, output: str) -> Iterator[_Candidate]:
        """Every region that ends in `output`, from small to large. One that holds a step which is refused, or a value
        that others use, has that reason."""
        inside = {output}
        reason = self.steps[output].refused
        opened = set(self.steps[output].inputs)
        heap = [-self.order[value] for value in opened]
        heapq.heapify(heap)
        names, passed = list(self.steps), False
        while heap:
            latest = names[-heapq.heappop(heap)]
            if not heap and not passed:  # what only hands its input on is no part of a region that begins with it
                yield _Candidate(frozenset(inside), latest, reason)
            step = self.steps[latest]
            if step.operation is None and step.refused is None:
                return
            if reason is None and any(user not in inside for user in self.users[latest]):
                reason = Reason.SEVERAL_OUTPUTS
            reason = reason or step.refused
            passed = step.operation == PASSES_ON and not heap
            inside.add(latest)
            for value in step.inputs:
                if value not in opened:
                    opened.add(value)
                    heapq.heappush(heap, -self.order[value])

    def is_wanted(self, candidate: _Candidate, merge: Merge) -> bool:
        """Whether `merge` is about such a region at all, foldable or not."""
        steps = [self.steps[name] for name in candidate.steps]
        convolutions = sum(step.kind == "convolution" for step in steps)
        parallel = any(len(set(step.inputs)) > 1 and isinstance(step.operation, Combination) for step in steps)
        if merge == "branches":
            return convolutions > 1 or (convolutions == 1 and parallel)
        return convolutions > 0 and sum(step.operation != PASSES_ON for step in steps) > 1

    def region(self, candidate: _Candidate, even_padding: bool) -> LinearRegion:
        """Raises Declined."""
        if candidate.reason is not None:
            raise Declined(candidate.reason)
        steps = self.in_order(candidate.steps)
        self._refuse_writes(steps, candidate.entry)
        conv = evaluate(steps, candidate.entry)
        if even_padding and not has_even_padding(conv):
            raise Declined(Reason.UNEVEN_PADDING)
        parameters = sum(step.parameters for step in steps)
        for size in SIZES:
            macs = region_macs(steps, candidate.entry, (size,) * conv.rank)
            if macs is not None and conv.macs((size,) * conv.rank) > macs:
                raise Declined(Reason.MORE_MACS)
        if conv.parameters > parameters:
            raise Declined(Reason.MORE_PARAMETERS)
        shown = region_macs(steps, candidate.entry, (SHOWN_SIZE,) * conv.rank)
        return LinearRegion(steps, candidate.entry, conv, shown or 0, parameters)

    def _storage(self, value: str) -> str:
        """The first of the values that a chain of steps which do nothing hands on."""
        while self.steps[value].operation == PASSES_ON:
            value = self.steps[value].inputs[0]
        return value

    def _refuse_writes(self, steps: Sequence[Step], entry: str) -> None:
        """A value that is written while the region reads it is not one value."""
        first, last = self.order[steps[0].name], self.order[steps[-1].name]
        for value in (self._storage(entry), *(self._storage(step.name) for step in steps[:-1])):
            for writer in self.writers.get(value, ()):
                others = [reader for reader in self.readers[value] if reader != writer]
                if others and first <= self.order[writer] <= last:
                    raise Declined(Reason.WRITTEN_IN_PLACE)


def evaluate(steps: Sequence[Step], entry: str) -> AffineConv:
    """The one convolution that the steps are. Raises Declined."""
    rank = next((_rank(step.operation) for step in steps if _rank(step.operation)), 0)
    known = [op for step in steps if isinstance(op := step.operation, AffineConv | Scale)]
    if not rank or not known:
        raise Declined(Reason.CHANNELS)
    channels = known[0].in_channels if isinstance(known[0], AffineConv) else len(known[0].weight)
    start = identity(channels, rank)
    values: dict[str, AffineConv] = {entry: start}
    with np.errstate(all="ignore"):  # what is not finite then is refused by the region's own check
        for step in steps:
            values[step.name] = _after(step, [values[value] for value in step.inputs], start)
    return values[steps[-1].name]


def _rank(operation: Operation | None) -> int:
    if isinstance(operation, AffineConv):
        return operation.rank
    return len(operation.size) if isinstance(operation, AveragePool) else 0


def _after(step: Step, inputs: Sequence[AffineConv], start: AffineConv) -> AffineConv:
    operation = step.operation
    if isinstance(operation, Combination):
        return inputs[0] if operation == PASSES_ON else combined(inputs, operation)
    (value,) = inputs
    if isinstance(operation, Scale):
        return scaled(value, operation)
    if operation is None:
        raise Declined(step.refused or Reason.INPUT_DEPENDENT)
    if isinstance(operation, AveragePool):
        operation = average_pool(operation, value.out_channels)
    elif isinstance(operation, ZeroPad):
        operation = zero_pad(operation, value.out_channels, value.rank)
    if value is start and operation.in_channels == start.in_channels and operation.rank == start.rank:
        return operation
    return composed(operation, value)


def has_even_padding(conv: AffineConv) -> bool:
    """Whether a layer of torch can have the padding: the same on both sides, or of a transposed one an output padding
    less."""
    axes = zip(conv.padding, conv.stride, conv.dilation, strict=True)
    return all(
        0 <= before and (0 <= before - after < max(s, d) if conv.transposed else before == after)
        for (before, after), s, d in axes
    )


def region_macs(steps: Sequence[Step], entry: str, size: tuple[int, ...]) -> int | None:
    """The MACs of the steps on one sample of that size; None where one of them has no output at it."""
    sizes, total = {entry: size}, 0
    for step in steps:
        here, operation = sizes[step.inputs[0]], step.operation
        if isinstance(operation, AveragePool):
            operation = average_pool(operation, 1)
        elif isinstance(operation, ZeroPad):
            operation = zero_pad(operation, 1, len(size))
        if isinstance(operation, AffineConv):
            out = operation.output_size(here)
            total += operation.macs(here) if step.kind == "convolution" else 0
            here = out
        if min(here) < 1:
            return None
        sizes[step.name] = here
    return total


def shown_macs(conv: AffineConv) -> int:
    """The MACs of a region's convolution at SHOWN_SIZE."""
    return conv.macs((SHOWN_SIZE,) * conv.rank)
