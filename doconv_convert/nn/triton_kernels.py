"""The composition and its gradients in Triton, for contiguous or channels-last tensors in float32, bfloat16, float16.

Both kernels see W, its gradient and the composed kernel as q = C_out/g rows of C_in columns of numbers. A *column* is
an input channel c with one of its X numbers: X = K positions, or X = S slots. Accumulated in float32 in one fixed
order, so that a run repeats to the bit; a product with D = 0 leaves the bits of what it is added to.

Imported only where a CUDA tensor is composed (`cuda.py`); under TRITON_INTERPRET=1 everything here runs on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that keep a large card busy: rows are split among them until there are so many.
PROGRAMS = 1024


@triton.jit
def _column(m, q, per_group, X: tl.constexpr, LAST: tl.constexpr):
    """Column m of C_in * X: its channel c, its number x, the offset of its first row, and its channel's place j."""
    size = per_group * X
    group, n = m // size, m % size
    if LAST:  # channels last: (row, x, j)
        x, j = n // per_group, n % per_group
    else:  # (row, j, x)
        j, x = n // X, n % X
    return group * per_group + j, x, group * q * size + n, group, j


@triton.jit
def _add_product(total, source, step, d, d_step, mask, columns_mask, T: tl.constexpr, BLOCK_T: tl.constexpr):
    """total + sum_t D[c, x, t] source[row, c, t], for rows by columns; `source` and `d` point to t = 0."""
    UNROLL: tl.constexpr = T if T <= 12 else 4  # several loads at once under way
    if BLOCK_T == 1:
        for t in tl.range(0, T, loop_unroll_factor=UNROLL):
            numbers = tl.load(source + t * step, mask, 0.0).to(tl.float32)
            factors = tl.load(d + t * d_step, columns_mask, 0.0).to(tl.float32)
            total += numbers * factors[None, :]
    else:  # few rows: D is what there is to read, and neighbors in memory are read together
        for start in range(0, T, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            more = mask[:, :, None] & (t < T)[None, None, :]
            numbers = tl.load(source[:, :, None] + (t * step)[None, None, :], more, 0.0).to(tl.float32)
            here = columns_mask[:, None] & (t < T)[None, :]
            factors = tl.load(d[:, None] + (t * d_step)[None, :], here, 0.0).to(tl.float32)
            total += tl.sum(numbers * factors[None, :, :], 2)
    return total


@triton.jit
def product_block(
    column_block,
    row_block,
    out,
    base,
    source,
    extra,
    d,
    q,
    per_group,
    columns,
    d_channel,
    d_number,
    d_step,
    X: tl.constexpr,
    T: tl.constexpr,
    EXTRA: tl.constexpr,
    BASE: tl.constexpr,
    OUT_LAST: tl.constexpr,
    SOURCE_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """out[row, c, x] = base[row, c, x] + sum_t D[c, x, t] [source | extra][row, c, t], of T and EXTRA numbers."""
    m = column_block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    columns_mask = m < columns
    mask = (rows < q)[:, None] & columns_mask[None, :]
    c, x, first, group, j = _column(m, q, per_group, X, OUT_LAST)
    places = first[None, :] + rows[:, None] * (per_group * X)
    total = tl.load(base + places, mask, 0.0).to(tl.float32) if BASE else tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
    channels = (group[None, :] * q + rows[:, None]) * per_group
    at, step = (channels * T + j[None, :], per_group) if SOURCE_LAST else ((channels + j[None, :]) * T, 1)
    factors = d + c * d_channel + x * d_number
    total = _add_product(total, source + at, step, factors, d_step, mask, columns_mask, T, BLOCK_T)
    if EXTRA > 0:
        at = (channels + j[None, :]) * EXTRA
        factors += T * d_step
        total = _add_product(total, extra + at, 1, factors, d_step, mask, columns_mask, EXTRA, BLOCK_T)
    tl.store(out + places, total.to(out.dtype.element_ty), mask)


@triton.jit
def _product(
    out,
    base,
    source,
    extra,
    d,
    q,
    per_group,
    columns,
    d_channel,
    d_number,
    d_step,
    X: tl.constexpr,
    T: tl.constexpr,
    EXTRA: tl.constexpr,
    BASE: tl.constexpr,
    OUT_LAST: tl.constexpr,
    SOURCE_LAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """`product_block` of one kernel, a program for each block."""
    i, j = tl.program_id(0), tl.program_id(1)
    sizes = q, per_group, columns, d_channel, d_number, d_step
    product_block(
        i, j, out, base, source, extra, d, *sizes, X, T, EXTRA, BASE, OUT_LAST, SOURCE_LAST, BLOCK_R, BLOCK_M, BLOCK_T
    )


@triton.jit
def _correlation(
    out,
    gradient,
    source,
    q,
    rows_each,
    per_group,
    columns,
    out_split,
    slots,
    first_slot,
    X: tl.constexpr,
    T: tl.constexpr,
    LAST: tl.constexpr,
    SOURCE_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """out[split, c, x, first_slot + t] = sum over the split's rows of gradient[row, c, x] source[row, c, t]."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    columns_mask = m < columns
    mask = columns_mask[:, None] & (t < T)[None, :]
    c, x, first, group, j = _column(m, q, per_group, X, LAST)
    places = (group * q * per_group * T + (j if SOURCE_LAST else j * T))[:, None]
    places += (t * (per_group if SOURCE_LAST else 1))[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    stop = tl.minimum(q, (split + 1) * rows_each)
    for start in range(split * rows_each, stop, UNROLL):
        for ahead in tl.static_range(UNROLL):  # several loads at once under way
            row = start + ahead
            left = tl.load(gradient + first + row * (per_group * X), columns_mask & (row < stop), 0.0)
            right = tl.load(source + places + row * (per_group * T), mask & (row < stop), 0.0)
            total += left.to(tl.float32)[:, None] * right.to(tl.float32)
    target = out + split * out_split + ((c * X + x) * slots + first_slot)[:, None] + t[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask)


@dataclass(frozen=True)
class Tile:
    """What one program computes: rows x columns, `numbers` of a sum at a time, by that many warps."""

    rows: int
    columns: int
    numbers: int
    warps: int = 4


def product_tile(q: int, columns: int, numbers: int, together: bool) -> Tile:
    """For `_product`; `together`: the sum's factors in D are neighbors in memory."""
    if q < 8:
        few = triton.next_power_of_2(q)
        return Tile(few, 128 // few, min(16, triton.next_power_of_2(numbers)) if together else 1)
    return Tile(16 if q * columns >= 16 * 128 * PROGRAMS // 4 else 8, 128, 1)


def correlation_tile(q: int, columns: int, numbers: int) -> tuple[Tile, int]:
    """For `_correlation`, and into how many parts the rows are split; `rows` are loaded at once."""
    tile = Tile(1 if q < 4 else 4, 64, min(16, triton.next_power_of_2(numbers)))
    programs = triton.cdiv(columns, tile.columns) * triton.cdiv(numbers, tile.numbers)
    return tile, max(1, min(PROGRAMS // programs, q // 16))


def compose(weight: Tensor, d: Tensor, weight_extra: Tensor | None, groups: int) -> Tensor:
    """weight + D [weight | weight_extra], of (C_out, C_in/g, *size), (C_in, K, S), (C_out, C_in/g, S - K), in
    weight's dtype and layout."""
    weight = dense(weight)
    out = new_like(weight)
    extra = None if weight_extra is None else weight_extra.contiguous()
    _launch_product(out, weight, weight, extra, d.contiguous(), groups, transposed=False)
    return out


def differentiate(
    weight: Tensor, gradient: Tensor, d: Tensor, weight_extra: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of weight, D and weight_extra from the kernel's, each in its own dtype and layout."""
    weight, d = dense(weight), d.contiguous()
    gradient = gradient.contiguous(memory_format=layout(weight))
    for_weight, for_d, for_extra = new_like(weight), torch.empty_like(d), None
    _launch_product(for_weight, gradient, gradient, None, d, groups, transposed=True)
    if weight_extra is not None:
        weight_extra = weight_extra.contiguous()
        for_extra = torch.empty_like(weight_extra)
        _launch_product(for_extra, None, gradient, None, d, groups, transposed=True)
    _launch_correlation(for_d, gradient, weight, weight_extra, groups)
    return for_weight, for_d, for_extra


def layout(weight: Tensor) -> torch.memory_format:
    """Which of the layouts that a kernel can have."""
    if not weight.is_contiguous():
        for dims, other in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if weight.dim() == dims and weight.is_contiguous(memory_format=other):
                return other
    return torch.contiguous_format


def dense(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=layout(weight))


def new_like(weight: Tensor) -> Tensor:
    """Memory for a kernel with the strides of `dense(weight)`: with others a convolution may take another algorithm."""
    is_dense = weight.is_contiguous() or layout(weight) != torch.contiguous_format
    return torch.empty_like(weight, memory_format=torch.preserve_format if is_dense else torch.contiguous_format)


def _launch_product(
    out: Tensor, base: Tensor | None, source: Tensor, extra: Tensor | None, d: Tensor, groups: int, *, transposed: bool
) -> None:
    """`transposed`: sums over D's positions; without a base then for the slots of weight_extra."""
    (channels, positions, slots), q = d.shape, out.shape[0] // groups
    last = layout(source) != torch.contiguous_format
    numbers = positions if base is not None else slots - positions
    columns = channels * numbers
    if out.numel() == 0:
        return
    d_number, d_step = (1, slots) if transposed else (slots, 1)
    tile = product_tile(q, columns, slots if not transposed else positions, together=not transposed)
    _product[(triton.cdiv(columns, tile.columns), triton.cdiv(q, tile.rows))](
        out,
        source if base is None else base,
        source,
        source if extra is None else extra,
        d if base is not None else d[:, :, positions:],
        q,
        channels // groups,
        columns,
        positions * slots,
        d_number,
        d_step,
        X=numbers,
        T=positions,
        EXTRA=0 if extra is None else slots - positions,
        BASE=base is not None,
        OUT_LAST=last and base is not None,
        SOURCE_LAST=last,
        BLOCK_R=tile.rows,
        BLOCK_M=tile.columns,
        BLOCK_T=tile.numbers,
        num_warps=tile.warps,
    )


def _launch_correlation(out: Tensor, gradient: Tensor, weight: Tensor, extra: Tensor | None, groups: int) -> None:
    (channels, positions, slots), q = out.shape, weight.shape[0] // groups
    if out.numel() == 0:
        return
    if weight.numel() == 0:
        out.zero_()
        return
    columns, last = channels * positions, layout(weight) != torch.contiguous_format
    tile, splits = correlation_tile(q, columns, positions)
    parts = out.new_empty(splits, *out.shape, dtype=torch.float32) if splits > 1 else out.unsqueeze(0)
    for source, numbers, first_slot in ((weight, positions, 0), (extra, slots - positions, positions)):
        if source is None:
            continue
        _correlation[(triton.cdiv(columns, tile.columns), triton.cdiv(numbers, tile.numbers), splits)](
            parts,
            gradient,
            source,
            q,
            triton.cdiv(q, splits),
            channels // groups,
            columns,
            out.numel(),
            slots,
            first_slot,
            X=positions,
            T=numbers,
            LAST=last,
            SOURCE_LAST=last and source is weight,
            BLOCK_M=tile.columns,
            BLOCK_T=tile.numbers,
            UNROLL=tile.rows,
            num_warps=tile.warps,
        )
    if splits > 1:
        torch.sum(parts, 0, out=out) if out.dtype == torch.float32 else out.copy_(parts.sum(0))
