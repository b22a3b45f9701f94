"""A net whose forward branches and loops in Python, so that torch.fx cannot trace it as a whole.

A converter that rewrites one traced graph, or that enters only traceable children, misses
`stem` and `refine.mix`: they belong to the untraceable modules themselves. The conditions depend
on the image size only, so torch.export, which knows it, can follow them.
"""

import torch
from torch import Tensor, nn

INPUT_SHAPE: tuple[int, ...] = (1, 3, 32, 32)


class Refine(nn.Module):
    """Applies its one convolution as often as the map is large."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[-1] // 4):
            x = x + torch.tanh(self.mix(x))
        return x


class ControlFlowNet(nn.Module):
    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.reduce = self._reduce(width)
        self.again = self._reduce(width)
        self.refine = Refine(width)
        self.head = nn.Linear(width, classes)

    @staticmethod
    def _reduce(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"expected a batch of images (N, C, H, W), got shape {tuple(x.shape)}")
        x = self.reduce(torch.relu(self.stem(x)))
        if x.shape[-1] > 8:
            x = self.again(x)
        y: Tensor = self.head(self.refine(x).mean((2, 3)))
        return y


def control_flow(*, width: int = 64, classes: int = 10) -> ControlFlowNet:
    return ControlFlowNet(width, classes)
