"""Convolutions called as F.conv2d with kernels that are Parameters of the user's own modules.

There is no Conv2d to find: a search by type sees one convolution of four. One kernel is named
`weight`, one `kernel`; `kernel` is called twice, with different dilation, and must stay one
kernel with one D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SHAPE: tuple[int, ...] = (1, 3, 32, 32)


def _kernel(outputs: int, inputs: int, size: int) -> nn.Parameter:
    return nn.Parameter(nn.init.kaiming_normal_(torch.empty(outputs, inputs, size, size)))


class Stem(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = _kernel(outputs, inputs, 3)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=2, padding=1)


class TwoScales(nn.Module):
    """One kernel, two receptive fields."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernel = _kernel(channels, channels, 3)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        near = F.conv2d(x, self.kernel, padding=1)
        far = F.conv2d(x, self.kernel, padding=2, dilation=2)
        return torch.relu(x + self.norm(near + far))


class FunctionalNet(nn.Module):
    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stem = Stem(3, width)
        self.scales = TwoScales(width)
        self.last = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scales(torch.relu(self.stem(x)))
        y: Tensor = self.head(torch.relu(self.last(x)).mean((2, 3)))
        return y


def functional(*, width: int = 64, classes: int = 10) -> FunctionalNet:
    return FunctionalNet(width, classes)
