"""What one step of a graph does, as far as it is affine, and what it makes of an affine convolution before it.

Importing this needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from doconv_convert.rewrite.linear.affine import AffineConv, Array, added
from doconv_convert.rewrite.linear.reasons import Declined, Reason


@dataclass(frozen=True)
class Scale:
    """Each channel times `weight` plus `bias`, both (C,); `rank` of the input where the scale tells it."""

    weight: Array
    bias: Array
    rank: int | None = None


@dataclass(frozen=True)
class Combination:
    """The inputs, each times its coefficient, plus a constant."""

    coefficients: tuple[float, ...]
    constant: float = 0.0


@dataclass(frozen=True)
class AveragePool:
    """The mean of `size` positions, zero padding counted as positions."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ZeroPad:
    """(before, after) zeros for each of the last axes, in their order."""

    padding: tuple[tuple[int, int], ...]


def identity(channels: int, rank: int) -> AffineConv:
    one, zero = (1,) * rank, ((0, 0),) * rank
    return AffineConv(np.ones((channels, 1, *one)), np.zeros(channels), one, zero, one, channels)


def pointwise(weight: Array, bias: Array, rank: int) -> AffineConv:
    """Each channel scaled and shifted, as a depthwise 1x1 convolution."""
    return replace(identity(len(weight), rank), kernel=weight.reshape(-1, 1, *(1,) * rank), bias=bias)


def average_pool(pool: AveragePool, channels: int) -> AffineConv:
    rank = len(pool.size)
    kernel = np.full((channels, 1, *pool.size), 1.0 / prod(pool.size))
    return AffineConv(kernel, np.zeros(channels), pool.stride, pool.padding, (1,) * rank, channels)


def zero_pad(pad: ZeroPad, channels: int, rank: int) -> AffineConv:
    if len(pad.padding) > rank:
        raise Declined(Reason.CHANNELS)
    return replace(identity(channels, rank), padding=((0, 0),) * (rank - len(pad.padding)) + pad.padding)


def batch_norm(mean: Array, variance: Array, weight: Array | None, bias: Array | None, epsilon: float) -> Scale:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias, by running statistics."""
    scale = (1.0 if weight is None else weight) / np.sqrt(variance + epsilon)
    return Scale(scale, (0.0 if bias is None else bias) - mean * scale)


def by_constant(constant: float | Array, factors: Callable[[Any], tuple[Any, Any]]) -> Combination | Scale | None:
    """Each value times the one of `factors`, plus the other, both made of the constant: a number, or one a channel, in
    the shapes (C, 1, 1) and (1, C, 1, 1), which tell the rank, too. None where it is neither."""
    if isinstance(constant, float) or constant.size == 1:
        weight, shift = factors(float(constant) if isinstance(constant, float) else constant.item())
        return Combination((float(weight),), float(shift))
    shape = constant.shape[1:] if constant.ndim > 2 and constant.shape[0] == 1 else constant.shape
    if len(shape) < 2 or any(extent != 1 for extent in shape[1:]):
        return None
    with np.errstate(all="ignore"):
        weight, shift = factors(constant.reshape(-1))
    ones = np.ones(shape[0])
    return Scale(weight * ones, shift * ones, len(shape) - 1)


def scaled(conv: AffineConv, scale: Scale) -> AffineConv:
    """`scale` after `conv`."""
    if len(scale.weight) != conv.out_channels or scale.rank not in (None, conv.rank):
        raise Declined(Reason.CHANNELS)
    kernel = conv.kernel * scale.weight.reshape(-1, 1, *(1,) * conv.rank)
    return replace(conv, kernel=kernel, bias=conv.bias * scale.weight + scale.bias)


def combined(convs: Sequence[AffineConv], combination: Combination) -> AffineConv:
    """The sum of convolutions of one input, each times its coefficient, plus the constant."""
    total: AffineConv | None = None
    for conv, factor in zip(convs, combination.coefficients, strict=True):
        term = replace(conv, kernel=conv.kernel * factor, bias=conv.bias * factor)
        total = term if total is None else added(total, term)
    if total is None:
        raise Declined(Reason.CHANNELS)
    return replace(total, bias=total.bias + combination.constant)
