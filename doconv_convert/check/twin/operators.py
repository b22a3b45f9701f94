"""ONNX operators in numpy, fast in float64: in place of those with which onnx's own evaluator takes minutes.

A convolution is a sum over its kernel's positions (taps): at each, a strided view of the padded input is multiplied by
that position's matrix. Pooling goes the same way. Nothing is rounded to another type than the input's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from doconv_convert.check.outputs.compare import Array

Sizes = Sequence[int] | None


class Conv(OpRun):
    def _run(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        auto_pad: str | None = None,
        dilations: Sizes = None,
        group: int | None = None,
        kernel_shape: Sizes = None,
        pads: Sizes = None,
        strides: Sizes = None,
    ) -> tuple[Array]:
        size = w.shape[2:]
        frame = _Frame(x.shape[2:], size, strides, dilations, pads, auto_pad)
        groups = group or 1
        padded = np.pad(x, [(0, 0), (0, 0), *frame.pads])
        out: Array = np.zeros((len(x), groups, w.shape[0] // groups, math.prod(frame.out)), x.dtype)
        for tap, view in frame.views(padded):
            kernel = w[_everywhere(tap)].reshape(groups, -1, w.shape[1])
            columns = view.reshape(len(x), groups, w.shape[1], -1)
            # a matrix product of one channel would be a loop over products of single numbers
            out += kernel * columns if w.shape[1] == 1 else kernel @ columns
        out = out.reshape(len(x), w.shape[0], *frame.out)
        return (out if b is None else out + b.reshape(-1, *[1] * len(size)),)


class ConvTranspose(OpRun):
    def _run(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        auto_pad: str | None = None,
        dilations: Sizes = None,
        group: int | None = None,
        kernel_shape: Sizes = None,
        output_padding: Sizes = None,
        output_shape: Sizes = None,
        pads: Sizes = None,
        strides: Sizes = None,
    ) -> tuple[Array]:
        size, n, groups = w.shape[2:], w.ndim - 2, group or 1
        if output_shape or auto_pad not in (None, "NOTSET"):
            raise NotImplementedError("ConvTranspose with an output_shape or auto_pad")
        steps, spread, more = strides or [1] * n, dilations or [1] * n, output_padding or [0] * n
        cut = pads or [0] * 2 * n
        whole = [
            (s - 1) * step + (k - 1) * d + 1 + m
            for s, step, k, d, m in zip(x.shape[2:], steps, size, spread, more, strict=True)
        ]
        out = np.zeros((len(x), groups * w.shape[1], *whole), x.dtype)
        columns = x.reshape(len(x), groups, -1, math.prod(x.shape[2:]))
        for tap in np.ndindex(*size):
            kernel = w[_everywhere(tap)].reshape(groups, -1, w.shape[1]).swapaxes(1, 2)
            made = (kernel @ columns).reshape(len(x), -1, *x.shape[2:])
            place = [
                slice(t * d, t * d + (s - 1) * step + 1, step)
                for t, d, s, step in zip(tap, spread, x.shape[2:], steps, strict=True)
            ]
            out[_everywhere(place)] += made
        kept = [slice(cut[axis], length - cut[axis + n]) for axis, length in enumerate(whole)]
        out = out[_everywhere(kept)]
        return (out if b is None else out + b.reshape(-1, *[1] * n),)


class MaxPool(OpRun):
    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        dilations: Sizes = None,
        kernel_shape: Sizes = None,
        pads: Sizes = None,
        storage_order: int | None = None,
        strides: Sizes = None,
    ) -> tuple[Array]:
        frame = _Frame(x.shape[2:], kernel_shape or (), strides, dilations, pads, auto_pad, bool(ceil_mode))
        least = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
        padded = np.pad(x, [(0, 0), (0, 0), *frame.pads], constant_values=least)
        out = None
        for _, view in frame.views(padded):
            out = view.copy() if out is None else np.maximum(out, view, out=out)
        if out is None or len(self.onnx_node.output) > 1:
            raise NotImplementedError("MaxPool with indices")
        return (out,)


class AveragePool(OpRun):
    def _run(
        self,
        x: Array,
        auto_pad: str | None = None,
        ceil_mode: int | None = None,
        count_include_pad: int | None = None,
        dilations: Sizes = None,
        kernel_shape: Sizes = None,
        pads: Sizes = None,
        strides: Sizes = None,
    ) -> tuple[Array]:
        frame = _Frame(x.shape[2:], kernel_shape or (), strides, dilations, pads, auto_pad, bool(ceil_mode))
        # what a window counts: the input and, where asked, its padding, but never what ceil_mode lets stand over
        counted = np.ones((1, 1, *x.shape[2:]), x.dtype)
        if count_include_pad:
            counted = np.pad(counted, [(0, 0), (0, 0), *frame.asked], constant_values=1)
            counted = np.pad(counted, [(0, 0), (0, 0), *frame.over])
        else:
            counted = np.pad(counted, [(0, 0), (0, 0), *frame.pads])
        total = sum(view for _, view in frame.views(np.pad(x, [(0, 0), (0, 0), *frame.pads])))
        return (np.asarray(total / sum(view for _, view in frame.views(counted))),)


class Erf(OpRun):
    def _run(self, x: Array) -> tuple[Array]:
        return (_erf(x),)


class Gelu(OpRun):
    def _run(self, x: Array, approximate: str | None = None) -> tuple[Array]:
        if approximate == "tanh":
            return (0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
        return (0.5 * x * (1 + _erf(x / math.sqrt(2))),)


OPERATORS: list[type[Any]] = [Conv, ConvTranspose, MaxPool, AveragePool, Erf, Gelu]

_STEP = 2.0**-5  # of the points that erf is expanded around
_LAST = 6.0  # beyond, erf is 1 in float64
_TERMS = 9


def _taylor() -> Array:
    """(points, _TERMS) coefficients of erf around 0, _STEP, ... _LAST. Its derivative g = 2 / sqrt(pi) exp(-x^2) has
    g' = -2 x g, so (m + 1) g[m + 1] = -2 (x g[m] + g[m - 1]) for the coefficients of g."""
    points = np.arange(0, _LAST + _STEP, _STEP)
    slope = [2 / math.sqrt(math.pi) * np.exp(-(points**2))]
    for m in range(_TERMS - 2):
        before = slope[m - 1] if m else 0.0
        slope.append(-2 * (points * slope[m] + before) / (m + 1))
    values = np.array([math.erf(point) for point in points])
    return np.stack([values, *(one / (m + 1) for m, one in enumerate(slope))], axis=1)


_COEFFICIENTS = _taylor()


def _erf(x: Array) -> Array:
    """To 2e-16: a Taylor series around the nearest of the points."""
    size = np.minimum(np.abs(x), _LAST).ravel()
    index = np.nan_to_num(np.rint(size / _STEP)).astype(np.intp)
    offset = size - index * _STEP
    table = _COEFFICIENTS.T
    value = table[-1].take(index)
    for coefficients in table[-2::-1]:
        value = value * offset + coefficients.take(index)
    signed: Array = np.copysign(value.reshape(x.shape), x).astype(x.dtype)
    return signed


def _everywhere(place: Sequence[int | slice]) -> Any:
    """That place in every channel of every sample."""
    return (slice(None), slice(None), *place)


class _Frame:
    """Where a window goes over an input of `size` (without batch and channels): the paddings before and after each
    axis, as `asked` for, and `over` for what ceil_mode lets stand over; `pads` are both. `out` is the output's size."""

    def __init__(
        self,
        size: Sequence[int],
        window: Sequence[int],
        strides: Sizes,
        dilations: Sizes,
        pads: Sizes,
        auto_pad: str | None,
        ceil_mode: bool = False,
    ) -> None:
        n = len(window)
        self.steps, self.spread = list(strides or [1] * n), list(dilations or [1] * n)
        self.window = window
        reach = [(w - 1) * d + 1 for w, d in zip(window, self.spread, strict=True)]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            missing = [
                max(0, (-(-s // step) - 1) * step + r - s) for s, step, r in zip(size, self.steps, reach, strict=True)
            ]
            self.asked = [(m // 2, m - m // 2) if auto_pad == "SAME_UPPER" else (m - m // 2, m // 2) for m in missing]
        else:
            flat = list(pads or [0] * 2 * n) if auto_pad != "VALID" else [0] * 2 * n
            self.asked = list(zip(flat[:n], flat[n:], strict=True))
        self.out, self.over = [], []
        for s, step, r, (before, after) in zip(size, self.steps, reach, self.asked, strict=True):
            free = s + before + after - r
            count = (-(-free // step) if ceil_mode else free // step) + 1
            if ceil_mode and (count - 1) * step >= s + before:  # a window must begin inside of the input
                count -= 1
            self.out.append(count)
            self.over.append((0, max(0, (count - 1) * step + r - s - before - after)))
        self.pads = [(a, b + c) for (a, b), (_, c) in zip(self.asked, self.over, strict=True)]

    def views(self, padded: Array) -> Iterator[tuple[tuple[int, ...], Array]]:
        """Each position in the window, with the values that it meets: (N, C, *out)."""
        for tap in product(*map(range, self.window)):
            place = [
                slice(t * d, t * d + (count - 1) * step + 1, step)
                for t, d, count, step in zip(tap, self.spread, self.out, self.steps, strict=True)
            ]
            yield tap, padded[_everywhere(place)]
