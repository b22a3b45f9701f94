"""The layer of the authors' own PyTorch file, which foreign checkpoints were trained with.

    k[o, j, p] = sum_s (D + I)[c, p, s] * W[o, j, s],    c = (o mod g) * (C_in / g) + j

The paper, and this package, pair output o with the rows of its own group, o // (C_out / g). That is the same
where g = 1 or C_out = g; elsewhere a checkpoint is read by the formula that it was trained with. `I` is the
stored identity, never a fresh one: at D_mul = 2K theirs is [I | I].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def authors_kernel(w: Tensor, d: Tensor, identity: Tensor) -> Tensor:
    """The composed kernel, (C_out, C_in/g, K), in the tensors' dtype.

    `w` is W (C_out, C_in/g, D_mul); `d` and `identity` are (C_in, K, D_mul).
    """
    # Row-major, (C_out, C_in/g) and (C_out/g, C_in) are one order: output o's slots are then the rows of o mod g.
    slots = w.reshape(-1, d.shape[0], w.shape[2])
    composed = torch.bmm(d + identity, slots.permute(1, 2, 0))
    return composed.permute(2, 0, 1).reshape(*w.shape[:2], d.shape[1])


def authors_features(x: Tensor, w: Tensor, d: Tensor, identity: Tensor) -> Tensor:
    """What `authors_kernel` gives on one window, by features and by group: (B, C_in/g, K) -> (B, C_out).

    First every slot's D_mul features, then W on them; output o takes the rows of group o mod g by slicing.
    """
    per_group, groups = w.shape[1], d.shape[0] // w.shape[1]
    result = x.new_empty(x.shape[0], w.shape[0])
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        features = torch.einsum("bjp,jps->bjs", x, (d + identity)[rows])
        result[:, group::groups] = features.flatten(1) @ w[group::groups].flatten(1).T
    return result


def pairing_is_ours(out_channels: int, groups: int) -> bool:
    """Whether the authors' rows of D are the paper's."""
    return groups == 1 or out_channels == groups


class AuthorsKernel(nn.Module):
    """A parametrization (`torch.nn.utils.parametrize`) from W to the kernel, with D, the identity and, in one
    variant of the layer, a factor `mul` (1,). Without D it only reshapes W and multiplies."""

    def __init__(
        self, d: Tensor | None, identity: Tensor | None, mul: Tensor | None, size: Sequence[int], order: Sequence[str]
    ) -> None:
        """`size` is the kernel's own; `order` are the owner's parameters in the order to restore."""
        super().__init__()
        self.size, self.order = tuple(size), tuple(order)
        self.D = None if d is None else nn.Parameter(d)
        self.register_buffer("identity", identity)
        self.mul = None if mul is None else nn.Parameter(mul)
        self.identity: Tensor | None

    def forward(self, w: Tensor) -> Tensor:
        kernel = w if self.D is None or self.identity is None else authors_kernel(w, self.D, self.identity)
        kernel = kernel.reshape(*w.shape[:2], *self.size)
        return kernel if self.mul is None else kernel * self.mul


class Scaled(nn.Module):
    """A parametrization that multiplies by `mul` (1,): the bias of that variant."""

    def __init__(self, mul: Tensor) -> None:
        super().__init__()
        self.mul = nn.Parameter(mul)

    def forward(self, value: Tensor) -> Tensor:
        return value * self.mul
