"""The algebra of affine convolutions, as pure functions on float64 arrays. Importing this needs no torch.

An affine convolution maps x, (N, C_in, *n), to

    y[o, t] = bias[o] + sum_(j, p) kernel[o, j, p] * x[c(o, j), t*stride - before + p*dilation]

where x is zero outside of its bounds and c(o, j) is the input channel that slot j of output o reads (groups); a
transposed one adds kernel[o, j, p] * x[c, t] to y[o, t*stride - before + p*dilation]. Sums, compositions and scales of
such maps are such maps again, or raise `Declined` with the reason why not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd, prod

import numpy as np
import numpy.typing as npt

from doconv_convert.rewrite.linear.reasons import Declined, Reason

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AffineConv:
    """`kernel` is (C_out, C_in/groups, *K) in float64, of a transposed convolution too; `bias` (C_out,).

    `padding` has (before, after) for each axis: zeros added to the input or, of a transposed convolution, positions
    cut off the output (after: less its output padding). Negative ones cut where others add.
    """

    kernel: Array
    bias: Array
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False

    @property
    def rank(self) -> int:
        return self.kernel.ndim - 2

    @property
    def size(self) -> tuple[int, ...]:
        return self.kernel.shape[2:]

    @property
    def out_channels(self) -> int:
        return int(self.kernel.shape[0])

    @property
    def in_channels(self) -> int:
        return int(self.kernel.shape[1]) * self.groups

    @property
    def extent(self) -> tuple[int, ...]:
        """The positions that a dilated kernel spans."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.size, self.dilation, strict=True))

    @property
    def is_pointwise(self) -> bool:
        """1x1 with stride 1 and without padding: it maps each position by itself."""
        return prod(self.size) == 1 and prod(self.stride) == 1 and not any(map(any, self.padding))

    @property
    def parameters(self) -> int:
        """Those of the layer: a bias of zeros is left out."""
        return self.kernel.size + (self.out_channels if self.bias.any() else 0)

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        axes = zip(size, self.stride, self.padding, self.extent, strict=True)
        if self.transposed:
            return tuple((n - 1) * s - before - after + extent for n, s, (before, after), extent in axes)
        return tuple((n + before + after - extent) // s + 1 for n, s, (before, after), extent in axes)

    def macs(self, size: Sequence[int]) -> int:
        """Multiply-accumulates of one sample of that size."""
        return int(self.kernel.size) * prod(size if self.transposed else self.output_size(size))

    def __call__(self, x: Array) -> Array:
        """x, (N, C_in, *n), convolved: position by position of the kernel, as the formula above says."""
        size, out = x.shape[2:], self.output_size(x.shape[2:])
        grouped = x.reshape(x.shape[0], self.groups, -1, *size)
        kernel = self.kernel.reshape(self.groups, -1, *self.kernel.shape[1:])
        y = np.zeros((x.shape[0], self.out_channels, *out)) + self.bias.reshape(-1, *(1,) * self.rank)
        target = y.reshape(x.shape[0], self.groups, -1, *out)
        for position in np.ndindex(*self.size):
            here = [_overlap(axis, p, n, o) for axis, p, n, o in zip(self._axes(), position, size, out, strict=True)]
            read, written = (tuple(one[side] for one in here) for side in (0, 1))
            if self.transposed:
                read, written = written, read
            weights, values = kernel[(..., *position)], grouped[(slice(None),) * 3 + read]
            target[(slice(None),) * 3 + written] += np.einsum("goc,ngc...->ngo...", weights, values, optimize=True)
        return y

    def _axes(self) -> list[tuple[int, int, int, bool]]:
        befores = [before for before, _ in self.padding]
        return list(zip(self.stride, befores, self.dilation, [self.transposed] * self.rank, strict=True))


def _overlap(axis: tuple[int, int, int, bool], position: int, size: int, out: int) -> tuple[slice, slice]:
    """Where the strided side and the other one meet at a kernel position: (strided side, the side with one step)."""
    stride, before, dilation, transposed = axis
    offset, steps, bound = position * dilation - before, size if transposed else out, out if transposed else size
    first = max(0, -(offset // stride))  # the least t with t*stride + offset >= 0
    last = min(steps - 1, (bound - 1 - offset) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    start = first * stride + offset
    return slice(start, last * stride + offset + 1, stride), slice(first, last + 1)


def added(a: AffineConv, b: AffineConv) -> AffineConv:
    """The convolution that gives a(x) + b(x) for every x of every size."""
    if a.transposed != b.transposed:
        a, b = _not_transposed(a), _not_transposed(b)
    if a.rank != b.rank or a.out_channels != b.out_channels or a.in_channels != b.in_channels:
        raise Declined(Reason.CHANNELS)
    if a.stride != b.stride:
        raise Declined(Reason.STRIDES)
    steps = tuple(map(_common_step, zip(a.size, a.dilation, a.padding), zip(b.size, b.dilation, b.padding)))  # noqa: B905
    a, b = _dilated(a, steps), _dilated(b, steps)
    befores = [max(one[0], other[0]) for one, other in zip(a.padding, b.padding, strict=True)]
    a, b = _grown(a, befores, before=True), _grown(b, befores, before=True)
    sizes = [max(one, other) for one, other in zip(a.size, b.size, strict=True)]
    a, b = _grown(a, sizes, before=False), _grown(b, sizes, before=False)
    if a.padding != b.padding:
        raise Declined(Reason.SIZES)
    groups = gcd(a.groups, b.groups)
    a, b = regrouped(a, groups), regrouped(b, groups)
    return replace(a, kernel=a.kernel + b.kernel, bias=a.bias + b.bias)


def composed(second: AffineConv, first: AffineConv) -> AffineConv:
    """The convolution that gives second(first(x)) for every x of every size.

    Between the two, `first`'s output ends and `second` pads it with zeros: only where `first`, evaluated there, is zero
    as well is the composition one convolution.
    """
    if second.rank != first.rank or second.in_channels != first.out_channels:
        raise Declined(Reason.CHANNELS)
    if second.transposed or first.transposed:
        return _composed_transposed(second, first)
    if any(before > 0 or after > 0 for before, after in second.padding):
        for stride, (before, after), extent in zip(first.stride, first.padding, first.extent, strict=True):
            if before < extent - stride or after < extent - 1:
                raise Declined(Reason.PADDING_BETWEEN)
        if _reaches(second, first.bias):
            raise Declined(Reason.BIAS_BEFORE_PADDING)
    # second's position q reads first's output at t*s2 + q*d2, whose position p reads x at (t*s2 + q*d2)*s1 + p*d1
    strides = tuple(d * s for d, s in zip(second.dilation, first.stride, strict=True))
    sides = zip(first.padding, second.padding, first.stride, strict=True)
    return _product(
        second,
        first,
        strides,
        stride=tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        padding=tuple((b1 + s * b2, a1 + s * a2) for (b1, a1), (b2, a2), s in sides),
    )


def _composed_transposed(second: AffineConv, first: AffineConv) -> AffineConv:
    """One of the two is pointwise. A bias before a transposed convolution is none behind it, but for a border of its
    own and a pattern of its strides."""
    inner, outer = (first, second) if second.is_pointwise else (second, first)
    if not outer.is_pointwise:
        raise Declined(Reason.TRANSPOSED)
    if inner is second and _reaches(second, first.bias):
        raise Declined(Reason.BIAS_BEFORE_PADDING)
    result = _product(second, first, second.dilation, stride=inner.stride, padding=inner.padding)
    return replace(result, dilation=inner.dilation, transposed=True)


def _product(
    second: AffineConv,
    first: AffineConv,
    strides: tuple[int, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
) -> AffineConv:
    """Kernel and bias of second(first(x)): second's positions lie `strides` apart, first's its dilation."""
    groups = gcd(second.groups, first.groups)
    outer, inner = (regrouped(one, groups) for one in (second, first))
    pairs = list(zip(outer.size, strides, inner.size, inner.dilation, strict=True))
    steps = [gcd(s if k2 > 1 else 0, d if k1 > 1 else 0) or 1 for k2, s, k1, d in pairs]
    size = [((k2 - 1) * s + (k1 - 1) * d) // step + 1 for (k2, s, k1, d), step in zip(pairs, steps, strict=True)]
    kernel = np.zeros((outer.out_channels, inner.kernel.shape[1], *size))
    blocks = outer.kernel.reshape(groups, -1, *outer.kernel.shape[1:])
    flat = inner.kernel.reshape(groups, inner.out_channels // groups, -1)
    for position in np.ndindex(*outer.size):
        part = np.matmul(blocks[(..., *position)], flat).reshape(outer.out_channels, -1, *inner.size)
        kernel[(slice(None), slice(None), *_places(position, pairs, steps))] += part
    bias = second.bias + _through(second, first.bias)
    return AffineConv(kernel, bias, stride, padding, tuple(steps), groups)


def _places(position: Sequence[int], pairs: Sequence[tuple[int, ...]], steps: Sequence[int]) -> list[slice]:
    places = []
    for q, (_, s, k1, d), step in zip(position, pairs, steps, strict=True):
        start, stride = q * s // step, max(1, d // step) if k1 > 1 else 1
        places.append(slice(start, start + (k1 - 1) * stride + 1, stride))
    return places


def regrouped(conv: AffineConv, groups: int) -> AffineConv:
    """The same map with fewer groups, a divisor of its own: zeros where an output did not read an input."""
    if conv.groups == groups:
        return conv
    fine = conv.groups // groups
    outputs, inputs = conv.out_channels // conv.groups, conv.kernel.shape[1]
    kernel = np.zeros((groups, fine, outputs, fine, inputs, *conv.size))
    every = np.arange(fine)
    kernel[:, every, :, every] = np.moveaxis(conv.kernel.reshape(groups, fine, outputs, inputs, *conv.size), 1, 0)
    return replace(conv, kernel=kernel.reshape(conv.out_channels, -1, *conv.size), groups=groups)


def _through(conv: AffineConv, values: Array) -> Array:
    """What an input that is `values`, (C_in,), at every position adds to each output."""
    sums = conv.kernel.reshape(conv.groups, -1, *conv.kernel.shape[1:]).sum(tuple(range(3, 3 + conv.rank)))
    result: Array = np.matmul(sums, values.reshape(conv.groups, -1, 1)).reshape(-1)
    return result


def _reaches(conv: AffineConv, values: Array) -> bool:
    """Whether some output depends on a channel where `values` is not zero."""
    return bool(_through(replace(conv, kernel=np.abs(conv.kernel)), np.abs(values)).any())


def _not_transposed(conv: AffineConv) -> AffineConv:
    """A transposed convolution of stride 1 is an ordinary one with its kernel turned around."""
    if not conv.transposed:
        return conv
    if prod(conv.stride) != 1:
        raise Declined(Reason.STRIDES)
    sides = zip(conv.extent, conv.padding, strict=True)
    padding = tuple((extent - 1 - before, extent - 1 - after) for extent, (before, after) in sides)
    return replace(conv, kernel=np.flip(conv.kernel, tuple(range(2, 2 + conv.rank))), padding=padding, transposed=False)


def _common_step(*axes: tuple[int, int, tuple[int, int]]) -> int:
    """The largest dilation in which the positions of both kernels can be written."""
    (k_a, d_a, (before_a, _)), (k_b, d_b, (before_b, _)) = axes
    return gcd(d_a if k_a > 1 else 0, d_b if k_b > 1 else 0, before_a - before_b) or 1


def _dilated(conv: AffineConv, steps: tuple[int, ...]) -> AffineConv:
    """The same map, its positions written `steps` apart: with zeros between them."""
    spread = [d // step if k > 1 else 1 for k, d, step in zip(conv.size, conv.dilation, steps, strict=True)]
    size = [(k - 1) * f + 1 for k, f in zip(conv.size, spread, strict=True)]
    kernel = np.zeros((*conv.kernel.shape[:2], *size))
    every = slice(None)
    kernel[(every, every, *(slice(None, None, f) for f in spread))] = conv.kernel
    return replace(conv, kernel=kernel, dilation=steps)


def _grown(conv: AffineConv, goal: Sequence[int], *, before: bool) -> AffineConv:
    """The same map with zeros around its kernel: to a padding `before` of `goal`, or behind it to a size of `goal`."""
    if before:
        axes = zip(goal, conv.padding, conv.dilation, strict=True)
        added = [((want - have) // d, 0) for want, (have, _), d in axes]
    else:
        added = [(0, want - have) for want, have in zip(goal, conv.size, strict=True)]
    kernel = np.pad(conv.kernel, [(0, 0), (0, 0), *added])
    sides = zip(conv.padding, added, conv.dilation, strict=True)
    return replace(
        conv,
        kernel=kernel,
        padding=tuple((low + front * d, high + back * d) for (low, high), (front, back), d in sides),
    )
