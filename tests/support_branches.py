"""Blocks of linear over-parameterizations, rebuilt from their papers' descriptions, and a few steps of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm(inputs: int, out: int, size: int | tuple[int, int], **arguments: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, out, size, bias=False, **arguments), nn.BatchNorm2d(out))


class RepVGG(nn.Module):
    """RepVGG (arXiv 2101.03697): 3x3, 1x1 and identity, each with its batch norm. YOLOv7's RepConv is the same."""

    def __init__(self, channels: int, out: int | None = None, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        out = out or channels
        self.dense = conv_norm(channels, out, 3, padding=1, stride=stride, groups=groups)
        self.one = conv_norm(channels, out, 1, stride=stride, groups=groups)
        self.skip = nn.BatchNorm2d(channels) if channels == out and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.skip is None else self.skip(x)
        return F.silu(self.dense(x) + self.one(x) + skip)


class ACNet(nn.Module):
    """ACNet (arXiv 1908.03930): a square, a flat and an upright kernel, each with its batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.square = conv_norm(channels, channels, 3, padding=1, stride=2)
        self.flat = conv_norm(channels, channels, (1, 3), padding=(0, 1), stride=2)
        self.upright = conv_norm(channels, channels, (3, 1), padding=(1, 0), stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.square(x) + self.flat(x) + self.upright(x))


class DBB(nn.Module):
    """Diverse Branch Block (arXiv 2103.13425): 3x3, 1x1, 1x1-3x3, and 1x1-average, all with batch norms.

    The paper pads behind the inner batch norm by what it makes of zeros, which is to pad before the 1x1 kernel. The
    `wrong` variant pads the 3x3 kernel's input with zeros: its border is none of one convolution.
    """

    def __init__(self, channels: int, *, wrong: bool = False) -> None:
        super().__init__()
        before, behind = (0, 1) if wrong else (1, 0)
        self.origin = conv_norm(channels, channels, 3, padding=1)
        self.one = conv_norm(channels, channels, 1)
        self.sequence = nn.Sequential(
            *conv_norm(channels, channels, 1, padding=before), *conv_norm(channels, channels, 3, padding=behind)
        )
        self.average = nn.Sequential(
            *conv_norm(channels, channels, 1, padding=before),
            nn.AvgPool2d(3, stride=1, padding=behind),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.origin(x) + self.one(x) + self.sequence(x) + self.average(x))


class ExpandNet(nn.Module):
    """ExpandNets (arXiv 1811.10495): 1x1, 3x3, 1x1 kernels in a row, wider inside, padded at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 4 * channels, 1, padding=1)
        self.kernel = nn.Conv2d(4 * channels, 4 * channels, 3, stride=2)
        self.project = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.project(self.kernel(self.expand(x))))


class UniRepLKNet(nn.Module):
    """UniRepLKNet's dilated reparam block (arXiv 2311.15599): a large kernel and dilated small ones, all depthwise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.large = conv_norm(channels, channels, 9, padding=4, groups=channels)
        self.small = nn.ModuleList(
            conv_norm(channels, channels, k, padding=d * (k - 1) // 2, dilation=d, groups=channels)
            for k, d in ((5, 1), (5, 2), (3, 3), (3, 4))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x)
        for branch in self.small:
            y = y + branch(x)
        return F.gelu(y)


class OREPA(nn.Module):
    """Online re-parameterization (arXiv 2204.00826): the branches' kernels are summed before they convolve, each with a
    scale a channel in its batch norm's place; one batch norm follows."""

    class Kernels(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.origin = nn.Parameter(torch.randn(channels, channels, 3, 3) * 0.2)
            self.one = nn.Parameter(torch.randn(channels, channels, 1, 1) * 0.2)
            self.average = nn.Parameter(torch.randn(channels, channels, 1, 1) * 0.2)
            self.scales = nn.Parameter(torch.rand(3, channels) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.scales[:, :, None, None, None]
            kernel = self.origin * scale[0] + F.pad(self.one, (1, 1, 1, 1)) * scale[1]
            kernel = kernel + (self.average / 9).expand(-1, -1, 3, 3) * scale[2]
            return F.conv2d(x, kernel, None, padding=1)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernels = OREPA.Kernels(channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.kernels(x)))


class Net(nn.Module):
    """Two blocks between a stem and a head that no merge is about."""

    def __init__(self, block: Callable[[int], nn.Module], channels: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(block(channels), block(channels))
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def trained(model: nn.Module, steps: int = 3, shape: tuple[int, ...] = (4, 3, 12, 12)) -> nn.Module:
    """A few steps, so that weights, scales and the statistics of batch norms have moved; in eval mode then."""
    generator = torch.Generator().manual_seed(0)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0.0, 0.5, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        x = torch.randn(shape, generator=generator, dtype=next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
