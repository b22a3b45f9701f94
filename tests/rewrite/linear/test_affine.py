"""The algebra of affine convolutions, held against torch's own operations in float64, borders included."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from doconv_convert.rewrite.linear.affine import AffineConv, added, composed, regrouped
from doconv_convert.rewrite.linear.operations import (
    AveragePool,
    Combination,
    Scale,
    ZeroPad,
    average_pool,
    batch_norm,
    combined,
    identity,
    pointwise,
    scaled,
    zero_pad,
)
from doconv_convert.rewrite.linear.reasons import Declined, Reason

# Sums of a few hundred terms in another order: the largest seen over 2,000 drawn pairs is 4e-15.
TOLERANCE = 1e-12
CALLS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED_CALLS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def normal(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def conv(
    out: int,
    inputs: int,
    size: tuple[int, ...],
    *,
    stride: int = 1,
    padding: Any = 0,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = True,
    transposed: bool = False,
    seed: int = 0,
) -> AffineConv:
    rank = len(size)
    pads = padding if isinstance(padding, tuple) else ((padding, padding),) * rank
    kernel = normal(seed, out, inputs // groups, *size)
    values = normal(seed + 1, out) if bias else np.zeros(out)
    return AffineConv(kernel, values, (stride,) * rank, pads, (dilation,) * rank, groups, transposed)


def by_torch(one: AffineConv, x: Any) -> Any:
    """The same map by torch: its padding by F.pad, so that the two sides may differ or cut."""
    call = (TRANSPOSED_CALLS if one.transposed else CALLS)[one.rank]
    kernel = torch.from_numpy(one.kernel)
    flat = [side for pair in reversed(one.padding) for side in pair]
    bias = torch.from_numpy(one.bias)
    if not one.transposed:
        padded = F.pad(torch.from_numpy(x), flat)
        return call(padded, kernel, bias, one.stride, 0, one.dilation, one.groups).numpy()
    # torch's layout of a transposed kernel is (C_in, C_out/groups, *K)
    blocks = kernel.reshape(one.groups, -1, *kernel.shape[1:]).transpose(1, 2).flatten(0, 1)
    y = call(torch.from_numpy(x), blocks, None, one.stride, 0, 0, one.groups, one.dilation)
    cut = F.pad(y, [-side for side in flat])
    return (cut + bias.reshape(-1, *(1,) * one.rank)).numpy()


def distance(got: Any, expected: Any) -> float:
    assert got.shape == expected.shape
    assert np.abs(expected).max() > 0
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), list(product((1, 2), (0, 2), (1, 2), (1, 2))))
@pytest.mark.parametrize("transposed", [False, True])
def test_the_formula_is_torchs(
    rank: int, stride: int, padding: int, dilation: int, groups: int, transposed: bool
) -> None:
    sides = ((padding, padding + 1), (0, 1), (padding, 0))[:rank]
    one = conv(
        4,
        6,
        (3, 2, 1)[:rank],
        stride=stride,
        padding=sides,
        dilation=dilation,
        groups=groups,
        transposed=transposed,
    )
    x = normal(7, 2, 6, *(7, 6, 5)[:rank])
    assert one.output_size(x.shape[2:]) == one(x).shape[2:]
    assert distance(one(x), by_torch(one, x)) < TOLERANCE


def test_a_kernel_that_reads_padding_alone_adds_nothing() -> None:
    one = conv(2, 3, (3, 3), padding=4, dilation=4)
    x = normal(1, 1, 3, 2, 2)
    assert distance(one(x), by_torch(one, x)) < TOLERANCE


@st.composite
def convs(draw: Any, inputs: int, out: int, rank: int, *, border: bool = True, transposed: bool = False) -> AffineConv:
    common = [g for g in (1, 2, 3, 6) if inputs % g == 0 and out % g == 0]
    groups = draw(st.sampled_from(common))
    size = tuple(draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank)))
    sides = st.tuples(st.integers(-1, 3), st.integers(-1, 3)) if border else st.just((0, 0))
    return AffineConv(
        normal(draw(st.integers(0, 99)), out, inputs // groups, *size),
        normal(draw(st.integers(0, 99)), out),
        tuple(draw(st.integers(1, 3)) for _ in range(rank)),
        tuple(draw(sides) for _ in range(rank)),
        tuple(draw(st.integers(1, 3)) for _ in range(rank)),
        groups,
        transposed,
    )


def at_sizes(*chain: AffineConv) -> list[Any]:
    """Inputs of several sizes that every convolution of the chain can take."""
    found = []
    for n in range(4, 40):
        size: tuple[int, ...] = tuple(n + axis for axis in range(chain[0].rank))
        for one in chain:
            size = one.output_size(size)
        if min(size) > 0:
            found.append(normal(n, 2, chain[0].in_channels, *(n + axis for axis in range(chain[0].rank))))
    return found[:5]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_a_composition_without_padding_between_is_exact(data: Any) -> None:
    rank = data.draw(st.integers(1, 2))
    first = data.draw(convs(6, 6, rank))
    second = data.draw(convs(6, 4, rank, border=False))
    one = composed(second, first)
    inputs = at_sizes(first, second)
    assert inputs
    for x in inputs:
        assert distance(one(x), by_torch(second, by_torch(first, x))) < TOLERANCE


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_a_composition_with_padding_between_is_exact_or_declined(data: Any) -> None:
    """Of convolutions without a bias, which another reason is about."""
    first = data.draw(convs(6, 6, 1))
    first = replace(first, bias=first.bias * 0)
    second = data.draw(convs(6, 4, 1))
    inputs = at_sizes(first, second)
    try:
        one = composed(second, first)
    except Declined as declined:
        if declined.reason is Reason.PADDING_BETWEEN:
            return
        raise
    for x in inputs:
        assert distance(one(x), by_torch(second, by_torch(first, x))) < TOLERANCE


def test_a_pointwise_kernel_before_padding_composes_without_a_bias_alone() -> None:
    first, second = conv(5, 3, (1, 1), bias=False), conv(4, 5, (3, 3), padding=1)
    x = normal(3, 2, 3, 6, 6)
    assert distance(composed(second, first)(x), by_torch(second, by_torch(first, x))) < TOLERANCE
    with pytest.raises(Declined, match="bias before zero padding"):
        composed(second, conv(5, 3, (1, 1)))
    # padded first, as DBB's right variant does it, the border sees the bias in both
    first, second = conv(5, 3, (1, 1), padding=1), conv(4, 5, (3, 3))
    assert distance(composed(second, first)(x), by_torch(second, by_torch(first, x))) < TOLERANCE


def test_a_bias_that_reaches_no_output_does_not_count() -> None:
    first, second = conv(4, 3, (1, 1)), conv(4, 4, (3, 3), padding=1, groups=2)
    first.bias[:2] = 0
    second.kernel[2:] = 0
    x = normal(3, 2, 3, 6, 6)
    assert distance(composed(second, first)(x), by_torch(second, by_torch(first, x))) < TOLERANCE
    second.kernel[3, 1, 2, 2] = 1.0
    with pytest.raises(Declined, match="bias before zero padding"):
        composed(second, first)


def test_two_padded_spatial_kernels_are_declined() -> None:
    with pytest.raises(Declined, match="padding between two spatial kernels"):
        composed(conv(4, 4, (3, 3), padding=1), conv(4, 4, (3, 3), padding=1, bias=False))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_a_sum_is_exact_where_the_sizes_agree(data: Any) -> None:
    """The second branch's padding is chosen so that its outputs have the first one's sizes."""
    rank, transposed = data.draw(st.integers(1, 2)), data.draw(st.booleans())
    a, b = (data.draw(convs(6, 6, rank, transposed=transposed)) for _ in "ab")
    shifted = [before - data.draw(st.integers(-2, 2)) for before, _ in a.padding]
    sides = zip(shifted, a.padding, a.extent, b.extent, strict=True)
    pads = tuple((low, sum(pair) - own + extent - low) for low, pair, own, extent in sides)
    b = replace(b, stride=a.stride, padding=pads)
    one = combined([a, b], Combination((1.5, -1.0), 0.25))
    inputs = at_sizes(a)
    assert inputs
    for x in inputs:
        assert distance(one(x), 1.5 * by_torch(a, x) - by_torch(b, x) + 0.25) < TOLERANCE
    if prod_of(a.stride) > 1:
        with pytest.raises(Declined, match="different strides"):
            added(a, replace(b, stride=(1,) * rank))


def prod_of(values: tuple[int, ...]) -> int:
    return int(np.prod(values))


def test_branches_of_other_sizes_are_declined() -> None:
    three, one = conv(4, 4, (3, 3), stride=2, padding=1), conv(4, 4, (1, 1), stride=2)
    x = normal(2, 1, 4, 9, 8)
    assert distance(added(three, one)(x), by_torch(three, x) + by_torch(one, x)) < TOLERANCE
    two = conv(4, 4, (2, 2), stride=2)  # equal at even sizes only
    with pytest.raises(Declined, match="differ in size"):
        added(three, two)
    with pytest.raises(Declined, match="broadcast"):
        added(three, conv(1, 4, (1, 1), stride=2))


def test_dilations_are_kept_where_they_agree() -> None:
    a, b = conv(4, 4, (3, 3), padding=2, dilation=2), identity(4, 2)
    one = added(a, b)
    assert one.size == (3, 3)
    assert one.dilation == (2, 2)
    other = added(a, conv(4, 4, (3, 3), padding=3, dilation=3, seed=5))
    assert other.size == (7, 7)
    assert other.dilation == (1, 1)
    x = normal(2, 1, 4, 9, 8)
    assert distance(one(x), by_torch(a, x) + x) < TOLERANCE


@pytest.mark.parametrize("stride", [1, 2])
def test_a_transposed_convolution_composes_with_pointwise_ones(stride: int) -> None:
    up = conv(4, 6, (3, 3), stride=stride, padding=((1, 0), (1, 1)), groups=2, transposed=True)
    x = normal(3, 2, 6, 4, 5)
    after = conv(5, 4, (1, 1), seed=9)
    assert distance(composed(after, up)(x), by_torch(after, by_torch(up, x))) < TOLERANCE
    before = conv(6, 3, (1, 1), bias=False, seed=9)
    y = normal(4, 2, 3, 4, 5)
    assert distance(composed(up, before)(y), by_torch(up, by_torch(before, y))) < TOLERANCE
    with pytest.raises(Declined, match="bias before zero padding"):
        composed(up, conv(6, 3, (1, 1)))
    with pytest.raises(Declined, match="next to a spatial kernel"):
        composed(conv(4, 4, (3, 3)), up)


def test_a_transposed_convolution_of_stride_1_adds_to_an_ordinary_one() -> None:
    up, plain = conv(4, 4, (3, 3), padding=1, transposed=True), conv(4, 4, (1, 1), seed=3)
    x = normal(3, 2, 4, 6, 5)
    assert distance(added(plain, up)(x), by_torch(plain, x) + by_torch(up, x)) < TOLERANCE
    with pytest.raises(Declined, match="different strides"):
        added(plain, replace(up, stride=(2, 2)))


def test_batch_norm_scales_pads_and_pools() -> None:
    mean, variance, weight, bias = normal(1, 4), normal(2, 4) ** 2 + 0.5, normal(3, 4), normal(4, 4)
    x = normal(5, 2, 4, 7, 6)
    arguments = [torch.from_numpy(value) for value in (x, mean, variance, weight, bias)]
    expected = F.batch_norm(*arguments, eps=1e-3).numpy()
    scale = batch_norm(mean, variance, weight, bias, 1e-3)
    assert distance(scaled(identity(4, 2), scale)(x), expected) < TOLERANCE
    assert distance(pointwise(scale.weight, scale.bias, 2)(x), expected) < TOLERANCE
    expected = F.batch_norm(*arguments[:3], eps=1e-5).numpy()
    assert distance(scaled(identity(4, 2), batch_norm(mean, variance, None, None, 1e-5))(x), expected) < TOLERANCE
    with pytest.raises(Declined, match="broadcast"):
        scaled(identity(3, 2), scale)
    with pytest.raises(Declined, match="broadcast"):
        scaled(identity(4, 2), Scale(weight, bias, 3))
    pool = average_pool(AveragePool((3, 2), (2, 2), ((1, 1), (1, 1))), 4)
    assert distance(pool(x), F.avg_pool2d(torch.from_numpy(x), (3, 2), 2, 1).numpy()) < TOLERANCE
    padded = zero_pad(ZeroPad(((1, 2),)), 4, 2)
    assert distance(padded(x), F.pad(torch.from_numpy(x), (1, 2)).numpy()) < TOLERANCE


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_fewer_groups_are_the_same_map(groups: int) -> None:
    fine = conv(12, 6, (2, 1), groups=6)
    coarse = regrouped(fine, groups)
    assert coarse.kernel.shape == (12, 6 // groups, 2, 1)
    x = normal(5, 2, 6, 7, 6)
    assert distance(coarse(x), by_torch(fine, x)) < TOLERANCE


def test_macs_and_parameters() -> None:
    assert conv(4, 6, (3, 2), groups=2).macs((5, 5)) == 4 * 3 * 6 * 3 * 4
    assert conv(4, 6, (3, 2), transposed=True).macs((5, 5)) == 4 * 6 * 6 * 25
    assert conv(4, 6, (3, 2)).parameters == 4 * 6 * 6 + 4
    assert conv(4, 6, (3, 2), bias=False).parameters == 4 * 6 * 6
