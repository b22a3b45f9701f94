"""A small classifier for 8x8 handwritten digits, with the data beside it.

The net that is really trained: 3x3, grouped, depthwise and 1x1 convolutions in one stack, so that
D moves away from zero in each of them. Until it has moved, almost any wrong fold looks right.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SHAPE: tuple[int, ...] = (1, 1, 8, 8)

_MEAN, _STD = 0.3053, 0.3760
_BLANK = -_MEAN / _STD
_HELD_OUT = 360


def _conv(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class DigitsNet(nn.Module):
    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.stack = nn.Sequential(
            _conv(1, width // 2, 3),
            _conv(width // 2, width, 3),
            _conv(width, width, 3, stride=2),
        )
        self.grouped = _conv(width, width, 3, groups=4)
        self.expand = _conv(width, 2 * width, 1)
        self.depthwise = _conv(2 * width, 2 * width, 3, groups=2 * width)
        self.project = _conv(2 * width, width, 1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stack(x)
        x = x + self.grouped(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def digits(*, width: int = 64, classes: int = 10) -> DigitsNet:
    return DigitsNet(width, classes)


def load_digits() -> tuple[Tensor, Tensor]:
    """All 1,797 digits: standardised float images (N, 1, 8, 8) and int64 labels (N)."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as data:
        images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    return (images.unsqueeze(1) / 16 - _MEAN) / _STD, labels.long()


def split(images: Tensor, labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(train, held out): the last 360 digits are held out; they hold 33 to 37 of each class."""
    train, test = slice(None, -_HELD_OUT), slice(-_HELD_OUT, None)
    return (images[train], labels[train]), (images[test], labels[test])


def jitter(images: Tensor) -> Tensor:
    """The images moved by up to one pixel, all alike: without it training stalls near 97 % held out."""
    top, left = torch.randint(3, (2,)).tolist()
    height, width = images.shape[-2:]
    return F.pad(images, (1, 1, 1, 1), value=_BLANK)[..., top : top + height, left : left + width]
