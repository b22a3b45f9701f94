"""The second edition's nets for pictures: a denoiser, a small ESPCN, and one with Fourier branches as in DeepRFT."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def denoiser(channels: int, depth: int, kernel: int, batch_norm: bool) -> nn.Module:
    """DnCNN's stack: it predicts the noise. `depth` convolutions, the first and the last without batch norm."""
    layers: list[nn.Module] = [nn.Conv2d(1, channels, kernel, padding=kernel // 2), nn.ReLU()]
    for _ in range(depth - 2):
        layers.append(nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=not batch_norm))
        layers += [nn.BatchNorm2d(channels), nn.ReLU()] if batch_norm else [nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, kernel, padding=kernel // 2))


class ESPCN(nn.Module):
    """Twice the height and width: three convolutions and a pixel shuffle, added to the bicubic picture."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 32, 5, padding=2)
        self.second = nn.Conv2d(32, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        details = F.pixel_shuffle(self.last(F.relu(self.second(F.relu(self.first(x))))), 2)
        return details + F.interpolate(x, scale_factor=2, mode="bicubic")


class FourierBlock(nn.Module):
    """A residual block whose second branch mixes channels, frequency by frequency."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.mix = nn.Sequential(
            nn.Conv2d(2 * channels, 2 * channels, 1), nn.ReLU(), nn.Conv2d(2 * channels, 2 * channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        frequencies = torch.fft.rfft2(x, norm="ortho")
        real, imaginary = self.mix(torch.cat([frequencies.real, frequencies.imag], 1)).chunk(2, 1)
        mixed = torch.fft.irfft2(torch.complex(real, imaginary), s=x.shape[-2:], norm="ortho")
        return x + self.second(F.relu(self.first(x))) + mixed  # type: ignore[no-any-return]


def fourier() -> nn.Module:
    """Eight blocks of 32 channels between two convolutions; it predicts the noise."""
    blocks = [FourierBlock(32) for _ in range(8)]
    return nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), *blocks, nn.Conv2d(32, 1, 3, padding=1))


def resnet18() -> nn.Module:
    """torchvision's, for images of 28 x 28 in one channel: a 3x3 stem of stride 1, no pooling behind it."""
    from torchvision.models import resnet18 as of_torchvision

    net = of_torchvision(num_classes=10)
    net.conv1, net.maxpool = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Identity()
    return net
