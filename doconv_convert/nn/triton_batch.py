"""What `cuda.py` launches: `triton_kernels`, and all kernels of a model composed at once, in one launch for all that
have the same K, dtypes, layout and tile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from doconv_convert.nn import triton_kernels
from doconv_convert.nn.triton_kernels import Tile, compose, dense, differentiate, layout, new_like, product_block

__all__ = ["compose", "compose_many", "differentiate", "new_like"]

Factors = tuple[Tensor, Tensor, Tensor | None, int]
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_FIELDS = 8


@triton.jit
def _compose_many(
    table,
    owners,
    d_channel,
    d_number,
    X: tl.constexpr,
    EXTRA: tl.constexpr,
    LAST: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """`product_block` of the kernel that owns this program, whose addresses and sizes are a row of the table."""
    program = tl.program_id(0)
    row = table + tl.load(owners + program) * FIELDS
    out = tl.load(row).to(tl.pointer_type(W))
    weight = tl.load(row + 1).to(tl.pointer_type(W))
    d = tl.load(row + 2).to(tl.pointer_type(D))
    extra = tl.load(row + 3).to(tl.pointer_type(E))
    q, per_group = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32)
    columns, first = tl.load(row + 6).to(tl.int32), tl.load(row + 7).to(tl.int32)
    blocks = (columns + BLOCK_M - 1) // BLOCK_M
    i, j = (program - first) % blocks, (program - first) // blocks
    sizes = q, per_group, columns, d_channel, d_number, 1
    product_block(i, j, out, weight, weight, extra, d, *sizes, X, X, EXTRA, True, LAST, LAST, BLOCK_R, BLOCK_M, BLOCK_T)


def compose_many(factors: Sequence[Factors]) -> list[Tensor]:
    """`triton_kernels.compose` of each (weight, D, weight_extra, groups), all on one device."""
    ready = [(dense(w), d.contiguous(), None if e is None else e.contiguous(), g) for w, d, e, g in factors]
    results = [new_like(weight) for weight, *_ in ready]
    alike: dict[tuple[object, ...], list[int]] = {}
    for index, (weight, d, extra, groups) in enumerate(ready):
        if weight.numel():
            alike.setdefault(_kind(weight, d, extra, groups), []).append(index)
    for members in alike.values():
        _launch([ready[index] for index in members], [results[index] for index in members])
    return results


def _kind(weight: Tensor, d: Tensor, extra: Tensor | None, groups: int) -> tuple[object, ...]:
    """What must be the same in one launch."""
    dtypes = weight.dtype, d.dtype, None if extra is None else extra.dtype
    return d.shape[1:], *dtypes, layout(weight), _tile(weight, d, groups)


def _tile(weight: Tensor, d: Tensor, groups: int) -> Tile:
    channels, positions, slots = d.shape
    return triton_kernels.product_tile(weight.shape[0] // groups, channels * positions, slots, together=True)


def _launch(members: Sequence[Factors], results: Sequence[Tensor]) -> None:
    weight, d, extra, groups = members[0]
    (_, positions, slots), tile = d.shape, _tile(weight, d, groups)
    rows: list[int] = []
    owners: list[int] = []
    for index, ((w, matrices, e, g), out) in enumerate(zip(members, results, strict=True)):
        q, columns = w.shape[0] // g, matrices.shape[0] * positions
        addresses = out.data_ptr(), w.data_ptr(), matrices.data_ptr(), 0 if e is None else e.data_ptr()
        rows += [*addresses, q, w.shape[1], columns, len(owners)]
        owners += [index] * (triton.cdiv(columns, tile.columns) * triton.cdiv(q, tile.rows))
    numbers = torch.tensor(rows + owners, dtype=torch.int64, pin_memory=weight.is_cuda)
    numbers = numbers.to(weight.device, non_blocking=True)
    _compose_many[(len(owners),)](
        numbers,
        numbers[len(rows) :],
        positions * slots,
        slots,
        X=positions,
        EXTRA=slots - positions,
        LAST=layout(weight) != torch.contiguous_format,
        W=_TYPES[weight.dtype],
        D=_TYPES[d.dtype],
        E=_TYPES[weight.dtype if extra is None else extra.dtype],
        FIELDS=_FIELDS,
        BLOCK_R=tile.rows,
        BLOCK_M=tile.columns,
        BLOCK_T=tile.numbers,
        num_warps=tile.warps,
    )
