"""first + D slots, the one product of a composition: by torch's operations anywhere, by compiled code where it serves.

`first` is (C_out, C_in/g, *size) of K positions, `slots` that or (C_out, C_in/g, S), D (C_in, K, S); the result has
first's shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from doconv_convert.nn import native


def plus_product(first: Tensor, slots: Tensor, d: Tensor, groups: int) -> Tensor:
    """first[o, j, p] + sum_s D[c, p, s] slots[o, j, s], with c the input channel that slot j of output o reads."""
    if slots is first and native.is_supported(d, groups, first):
        return compiled_product(first, d, groups)
    return by_torch(first, slots, d, groups)


def compiled_product(first: Tensor, d: Tensor, groups: int) -> Tensor:
    """first + D first, differentiable, where `native.is_supported` these."""
    return _Compiled.apply(first, d, groups)  # type: ignore[no-any-return]


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, d: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(first, d)
        ctx.groups = groups
        return native.compose(first, d, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (first, d), groups, gradient = ctx.saved_tensors, ctx.groups, gradients[0]
        # Where gradients are on, this gradient will be differentiated itself.
        supported = not torch.is_grad_enabled() and native.is_supported(d, groups, gradient, first)
        return *(native.differentiate if supported else differentiated)(gradient, first, d, groups), None


def differentiated(gradient: Tensor, first: Tensor, d: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The gradients of first and D from the kernel's, in torch's own operations."""
    rows, positions = first.shape[0] // groups, d.shape[1]
    w, g = (
        tensor.reshape(groups, rows, -1, positions).transpose(1, 2).reshape(-1, rows, positions)
        for tensor in (first, gradient)
    )
    return by_torch(gradient, gradient, d.transpose(1, 2), groups), torch.bmm(g.transpose(1, 2), w)


def by_torch(first: Tensor, slots: Tensor, d: Tensor, groups: int) -> Tensor:
    """`plus_product` in torch's own operations: few and large, so a compiler or a GPU has them as they are."""
    (out_channels, per_group), positions = first.shape[:2], d.shape[1]
    if out_channels == groups and per_group == 1:  # one vector a channel, in memory as the product needs it
        vectors, more = (tensor.reshape(groups, 1, -1) for tensor in (first, slots))
        return torch.baddbmm(vectors, more, d.transpose(1, 2)).reshape(first.shape)
    width = _channels_a_block(out_channels // groups, per_group, positions)
    shape = groups, out_channels // groups, per_group // width, -1
    base = first.reshape(shape)
    # One view for both where it can be: the gradients that meet there are summed without a copy.
    rows = base if slots is first else slots.reshape(shape)
    matrices = rows.transpose(1, 2).reshape(-1, shape[1], rows.shape[3])
    product = torch.bmm(matrices, _block_diagonal(d, width).transpose(1, 2))
    return (base + product.view(groups, -1, *product.shape[1:]).transpose(1, 2)).reshape(first.shape)


def _channels_a_block(rows: int, per_group: int, positions: int) -> int:
    """How many input channels (a divisor of C_in/g) one matrix product of a composition takes; each has `rows` rows.

    A channel's own product has rows of K = 9 numbers, which fill neither a vector register nor a cache line.
    Neighbors in memory share one, with a block-diagonal D, until a row has 16: more arithmetic, and less time at
    512x512x3x3 (docs/benchmarks.md). With few rows the larger D would cost more than it saves, in time and in
    memory until the backward.
    """
    width = 1
    while rows > 64 and width * positions < 16 and per_group % (2 * width) == 0:
        width *= 2
    return width


def _block_diagonal(d: Tensor, width: int) -> Tensor:
    """(C_in, K, S) -> (C_in/width, width*K, width*S), with a channel's D in each diagonal block."""
    if width == 1:
        return d
    _, positions, slots = d.shape
    blocks = d.reshape(-1, width, positions, slots).permute(0, 2, 3, 1)
    return torch.diag_embed(blocks, dim1=1, dim2=3).reshape(-1, width * positions, width * slots)
