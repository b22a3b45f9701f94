"""Three small networks, one a family: a plain stack, a ResNet, a depthwise-separable net. One channel in."""

from __future__ import annotations

from torch import Tensor, nn


def _conv(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def stack() -> nn.Module:
    """Six 3x3 convolutions, halved twice."""
    widths = [(1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    return nn.Sequential(*(_conv(*one) for one in widths), _head(64))


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut (a 1x1 convolution where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.second(self.first(x)) + self.shortcut(x))  # type: ignore[no-any-return]


def resnet() -> nn.Module:
    """A stem and three residual blocks."""
    return nn.Sequential(_conv(1, 16), Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), _head(64))


def separable() -> nn.Module:
    """Depthwise 3x3 and pointwise convolutions in turn, as in MobileNet."""

    def unit(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        return nn.Sequential(
            _conv(inputs, inputs, stride, inputs), pointwise, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    widths = [(16, 32, 2), (32, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    return nn.Sequential(_conv(1, 16), *(unit(*one) for one in widths), _head(128))


NETS = {"stack": stack, "resnet": resnet, "separable": separable}
