"""The correctly rounded product of D^ and W: error-free sums, in numpy alone.

A product of two float32 numbers is exact in float64. Each sum below keeps its rounding error (Knuth's TwoSum), so

    k[o, j, p] = W[o, j, p] + sum_s D[c, p, s] W[o, j, s] = high + low

to about 2^-100 of its terms, and what float32 number is nearest to it can be said. The few entries that lie too close
to the middle between two float32 numbers, or cancel almost wholly, are summed exactly (`math.fsum`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Entries of a block whose few arrays stay in a processor's cache: 0.05 s a million weights of nine terms.
_BLOCK = 2**13
_UNIT = 2.0**-53  # the largest relative error of one float64 operation
_FLOAT32_NORMAL = 2.0**-126
# What float32 drops of a float64 number's 52 bits; the middle between two float32 numbers is its highest bit alone.
_DROPPED, _MIDDLE = np.int64(2**29 - 1), np.int64(2**28)


def correctly_rounded(weight: Array, d: Array, extra: Array | None, groups: int) -> Array:
    """The kernel of `compose_kernel` (shapes as there), each entry the float32 number nearest to the exact product,
    ties to even. All of `weight`, `d` and `extra` are finite float32."""
    (channels, positions, slots), rows = d.shape, weight.shape[0] // groups
    full = weight.reshape(groups, rows, -1, positions)
    if extra is not None:
        full = np.concatenate([full, extra.reshape(groups, rows, full.shape[2], -1)], axis=3)
    # W as (S, C_out/g, C_in), D as (K, S, C_in): input channels, of all groups, lie side by side
    w = full.transpose(3, 1, 0, 2).reshape(slots, rows, channels).astype(np.float64)
    factors = np.ascontiguousarray(d.transpose(1, 2, 0), dtype=np.float64)
    kernel = np.empty((positions, rows, channels), np.float32)
    step = max(1, _BLOCK // channels)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        block = np.ascontiguousarray(w[:, part])
        largest = np.abs(block).max(axis=0)
        for position in range(positions):
            kernel[position, part] = _rounded_block(block, factors[position], position, largest)
    return kernel.reshape(positions, rows, groups, -1).transpose(2, 1, 3, 0).reshape(weight.shape)


def _rounded_block(w: Array, d: Array, position: int, largest: Array) -> Array:
    """One kernel position: `w` is (S, R, C), `d` (S, C), `largest` the largest |w| of every (R, C)."""
    high = w[position].copy()
    term, total, seen, low = (np.zeros_like(high) for _ in range(4))
    for slot in range(len(w)):
        np.multiply(w[slot], d[slot], out=term)
        _add(high, term, total, seen, low)
        high, total = total, high
    high += low
    kernel: Array = high.astype(np.float32)
    undecided = np.nonzero(_undecided(high, largest * (1 + len(w) * np.abs(d).max(axis=0)), len(w) + 1))
    if undecided[0].size:
        row, channel = undecided
        terms = w[:, row, channel] * d[:, channel]
        kernel[undecided] = _rounded_exactly(np.vstack([w[position, row, channel], terms]).T)
    return kernel


def _add(a: Array, b: Array, total: Array, seen: Array, error: Array) -> None:
    """a + b, rounded, into `total`; its error, which TwoSum gives exactly, is added to `error`. Overwrites b."""
    np.add(a, b, out=total)
    np.subtract(total, a, out=seen)
    np.subtract(b, seen, out=b)
    np.subtract(total, seen, out=seen)
    np.subtract(a, seen, out=seen)
    b += seen
    error += b


def _undecided(high: Array, size: Array, terms: int) -> Array:
    """Where rounding `high` to float32 may not round the exact sum: the middle between two float32 numbers is within
    one step of float64, or the errors of `low`, below 2 (n u)^2 sum |terms|, may be as large as half that step. `size`
    is at least the sum of |terms|; where it is zero, every term is."""
    least = np.maximum(size * (4 * terms**2 * _UNIT), _FLOAT32_NORMAL)
    dropped = high.view(np.int64) & _DROPPED
    undecided: Array = ((np.abs(high) < least) & (size > 0)) | (np.abs(dropped - _MIDDLE) <= 1)
    return undecided


def _rounded_exactly(terms: Array) -> Array:
    """(N, n) float64 terms -> (N,) the float32 numbers nearest to their exact sums.

    The sum is rounded to odd first: of the two float64 neighbors of a sum that is none itself, the one whose last bit
    is set. Rounding that to float32 is then as good as rounding the sum (Boldo and Melquiond, 2008).
    """
    sums = np.array([math.fsum(row) for row in terms])
    rest = np.array([math.fsum([*row, -total]) for row, total in zip(terms, sums, strict=True)])
    even = sums.view(np.int64) & 1 == 0
    odd = np.where(even & (rest != 0), np.nextafter(sums, np.copysign(np.inf, rest)), sums)
    rounded: Array = odd.astype(np.float32)
    return rounded
