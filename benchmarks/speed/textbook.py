"""The peer of the training benchmarks: DO-Conv as the paper's formula reads, and nothing clever.

    k[o, j, p] = sum_s (I + D)[c, p, s] * W[o, j, s]        (arXiv 2006.12030, equation of kernel composition)

The identity is a buffer, added in every forward; the product is an einsum. D_mul = K; a 1x1 convolution has no D.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class TextbookConv2d(nn.Conv2d):
    """A plain convolution made a textbook DO-Conv layer in place: it keeps `weight` as W and adds D."""

    def over_parameterize(self) -> None:
        positions = self.kernel_size[0] * self.kernel_size[1]
        self.D = nn.Parameter(torch.zeros(self.in_channels, positions, positions))
        self.register_buffer("identity", torch.eye(positions))

    def forward(self, x: Tensor) -> Tensor:
        outputs, per_group, *size = self.weight.shape
        d = (self.D + self.identity).view(self.groups, per_group, *self.D.shape[1:])
        w = self.weight.view(self.groups, outputs // self.groups, per_group, -1)
        kernel = torch.einsum("gjps,gojs->gojp", d, w).reshape(outputs, per_group, *size)
        return self._conv_forward(x, kernel, self.bias)


def to_textbook(model: nn.Module) -> nn.Module:
    """A copy of `model` with a textbook layer for every nn.Conv2d above 1x1."""
    made = copy.deepcopy(model)
    for layer in made.modules():
        if type(layer) is nn.Conv2d and layer.kernel_size != (1, 1):
            layer.__class__ = TextbookConv2d
            layer.over_parameterize()  # type: ignore[operator]
    return made
