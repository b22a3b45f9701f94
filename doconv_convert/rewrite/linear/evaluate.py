"""What a region's steps are as one convolution, and what they cost. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

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
from doconv_convert.rewrite.linear.steps import PASSES_ON, LinearRegion, Operation, Step

# Input sizes at which the MACs of a region and of its convolution are compared. Borders and strides leave a remainder
# that depends on the size; a region that takes none of them has a kernel beyond all that is trained.
SIZES = (7, 16, 33, 64, 225)
# An input of this size for the figures that are shown.
SHOWN_SIZE = 64


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


def fits_torch(conv: AffineConv) -> bool:
    """Whether a layer of torch can have the padding: the same on both sides, or of a transposed one an output padding
    less behind."""
    axes = zip(conv.padding, conv.stride, conv.dilation, strict=True)
    return all(
        0 <= before and (0 <= before - after < max(s, d) if conv.transposed else before == after)
        for (before, after), s, d in axes
    )


def fits_onnx(conv: AffineConv) -> bool:
    """Whether an ONNX node can have the padding, whose two sides may differ."""
    sides = zip(conv.padding, conv.stride, conv.dilation, strict=True)
    return all(
        before >= 0 and (after >= 0 or (conv.transposed and -after < max(s, d))) for (before, after), s, d in sides
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


def check_sizes(region: LinearRegion) -> list[tuple[int, ...]]:
    """Spatial sizes for a region's own check; axes differ from each other."""
    rank, extent = region.conv.rank, max(region.conv.extent)
    runs = [
        size
        for n in range(1, 4 * extent + 64)
        if region_macs(region.steps, region.entry, size := tuple(n + axis for axis in range(rank))) is not None
    ]
    larger = [size for size in runs if size[0] >= extent + 3]
    return [*runs[:1], *larger[:2]]
