"""Grouped and depthwise convolutions in many shapes, mixed by channel shuffle.

With groups, output `o` reads only its own group's input channels, so a converter that pairs rows
of D with the wrong channels still gets every shape right. Depthwise with multiplier 2 is where the
two usual pairings differ. Dilation, a 1x7/7x1 pair and padding='same' (a string where a converter
may expect numbers) come along.
"""

import torch
from torch import Tensor, nn

INPUT_SHAPE: tuple[int, ...] = (1, 3, 32, 32)


class ChannelShuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(x.chunk(self.groups, 1), 2).flatten(1, 2)


class GroupedNet(nn.Module):
    def __init__(self, width: int = 64, groups: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        self.shuffle = ChannelShuffle(groups)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.multiplier = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, groups=width, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.pointwise = nn.Conv2d(2 * width, width, 1, groups=groups)
        self.dilated = nn.Conv2d(width, width, 3, padding="same", dilation=2, groups=groups)
        self.row = nn.Conv2d(width, width, (1, 7), padding="same", groups=2)
        self.column = nn.Conv2d(width, width, (7, 1), padding=(3, 0), groups=width)
        self.norm3 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shuffle(self.grouped(torch.relu(self.stem(x))))
        x = torch.relu(self.norm1(self.depthwise(x)))
        x = torch.relu(self.norm2(self.multiplier(x)))
        x = self.shuffle(self.pointwise(x))
        x = x + torch.relu(self.dilated(x))
        x = torch.relu(self.norm3(self.column(self.row(x))))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def grouped(*, width: int = 64, groups: int = 4, classes: int = 10) -> GroupedNet:
    return GroupedNet(width, groups, classes)
