"""Finding linear regions in a graph and the one convolution that each of them is. Importing this needs no torch.

A region has one input and one output, and every step from the one to the other is affine. Walking back from its
output, always to the latest value that is still open, the open values shrink to a single one exactly where all ways
lead through it: that is an input.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from doconv_convert.rewrite.linear.affine import AffineConv
from doconv_convert.rewrite.linear.evaluate import SHOWN_SIZE, SIZES, evaluate, region_macs
from doconv_convert.rewrite.linear.operations import Combination
from doconv_convert.rewrite.linear.reasons import Declined, Reason
from doconv_convert.rewrite.linear.steps import PASSES_ON, DeclinedRegion, Found, LinearRegion, Merge, Step


@dataclass(frozen=True)
class _Candidate:
    steps: frozenset[str]
    entry: str
    reason: Reason | None


def find_regions(steps: Sequence[Step], merge: Merge, fits: Callable[[AffineConv], bool]) -> Found:
    """The regions of a graph, whose steps come in topological order, from its outputs back; no two overlap.

    "branches" takes regions with two convolutions or parallel paths, "all" a convolution with its batch norm too.
    `fits` says which padding a layer there can have.
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
                found.regions.append(graph.region(candidate, fits))
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
        self.reads = Counter(name for step in steps for name, _ in step.parameters)
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

    def region(self, candidate: _Candidate, fits: Callable[[AffineConv], bool]) -> LinearRegion:
        """Raises Declined."""
        if candidate.reason is not None:
            raise Declined(candidate.reason)
        steps = self.in_order(candidate.steps)
        self._refuse_writes(steps, candidate.entry)
        conv = evaluate(steps, candidate.entry)
        if not fits(conv):
            raise Declined(Reason.PADDING)
        parameters = self._own_parameters(steps)
        for size in SIZES:
            macs = region_macs(steps, candidate.entry, (size,) * conv.rank)
            if macs is not None and conv.macs((size,) * conv.rank) > macs:
                raise Declined(Reason.MORE_MACS)
        if conv.parameters > parameters:
            raise Declined(Reason.MORE_PARAMETERS)
        shown = region_macs(steps, candidate.entry, (SHOWN_SIZE,) * conv.rank)
        return LinearRegion(steps, candidate.entry, conv, shown or 0, parameters)

    def _own_parameters(self, steps: Sequence[Step]) -> int:
        """How many parameters would go with the steps: of those that others read too, none."""
        inside = [parameter for step in steps for parameter in step.parameters]
        return sum(size for name, size in set(inside) if inside.count((name, size)) == self.reads[name])

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
                others = [reader for reader in self.readers.get(value, ()) if reader != writer]
                if others and first <= self.order[writer] <= last:
                    raise Declined(Reason.WRITTEN_IN_PLACE)
