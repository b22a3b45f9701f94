"""A network with a branch in the Fourier domain, as image restorers have (DeepRFT's and FFC's kind)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Spectral(nn.Module):
    """A convolution beside two 1x1 ones on the real and imaginary parts of the spectrum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1)
        self.first, self.second = (nn.Conv2d(2 * channels, 2 * channels, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        wave = torch.fft.rfft2(x)
        parts = self.second(torch.relu(self.first(torch.cat([wave.real, wave.imag], 1))))
        wave = torch.complex(*parts.chunk(2, 1))
        return x + self.spatial(x) + torch.fft.irfft2(wave, s=x.shape[-2:])


def fourier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Spectral(8), Spectral(8), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3, padding=1)
    )
