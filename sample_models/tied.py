"""An autoencoder whose kernels are shared in three ways.

`left` and `right` are two layers with one Parameter, `first` and `again` are one layer under two
names, and the kernel of `encode` is read once more by the decoder's transposed convolution. Each
must stay one kernel with one D, and the decoder must see the composed kernel, not its raw part.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SHAPE: tuple[int, ...] = (1, 3, 32, 32)


class TiedNet(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.left = nn.Conv2d(width, width, 3, padding=1)
        self.right = nn.Conv2d(width, width, 3, padding=1)
        self.right.weight = self.left.weight
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.encode(x))
        x = x + torch.relu(self.left(x)) - torch.relu(self.right(x.flip(-1))).flip(-1)
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.again(x))
        return F.conv_transpose2d(x, self.encode.weight, stride=2, padding=1, output_padding=1)


def tied(*, width: int = 64) -> TiedNet:
    return TiedNet(width)
