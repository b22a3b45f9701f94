"""Nets that differ from themselves in eval mode, or from run to run of another kind: they have no reference."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT_SHAPE = (1, 3, 16, 16)


class Two(nn.Module):
    """Two convolutions; the subclass says what happens to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def change(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.change(torch.tanh(self.enc(x))))


class Dropout(Two):
    def change(self, y: Tensor) -> Tensor:
        return F.dropout(y, 0.1, training=True)


class Noise(Two):
    def change(self, y: Tensor) -> Tensor:
        return y + 1e-3 * torch.randn_like(y)


class RareNoise(Two):
    """One run in twenty is disturbed: two runs that agree show nothing, that a number was drawn does."""

    def change(self, y: Tensor) -> Tensor:
        return y * (1.25 if random.random() < 0.05 else 1.0)


class PythonNoise(Two):
    """Its generators are not torch's."""

    def change(self, y: Tensor) -> Tensor:
        return y * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()))


class OwnGenerator(Two):
    """A generator of the instance's own; a copy of the net draws the same numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def change(self, y: Tensor) -> Tensor:
        return y * (1 + 0.1 * float(self.generator.random()))


class CallCount(Two):
    """Every forward scales more; the count is a plain number."""

    calls = 0

    def change(self, y: Tensor) -> Tensor:
        self.calls += 1
        return y * (1 + 0.1 * self.calls)


class CallCountBuffer(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def change(self, y: Tensor) -> Tensor:
        self.calls += 1
        return y * (1 + 0.1 * self.calls)


class Warmup(Two):
    """The first two forwards of an instance are not the others'."""

    calls = 0

    def change(self, y: Tensor) -> Tensor:
        self.calls += 1
        return y if self.calls > 2 else 2 * y


class ByPrecision(Two):
    """float64 takes another branch: no float64 run shows what float32 computes."""

    def change(self, y: Tensor) -> Tensor:
        return y if y.dtype == torch.float32 else y.relu()


class ReadsInFloat32(Two):
    """Only float32 reads the stored kernel, and it moves the outputs by less than a rough float32 error."""

    def change(self, y: Tensor) -> Tensor:
        norm = dict(self.named_parameters())["enc.weight"].square().sum()
        return y if y.dtype == torch.float64 else y * (1 + 2e-4 * norm)


class ByGradMode(Two):
    """What runs depends on whether gradients are recorded."""

    def change(self, y: Tensor) -> Tensor:
        return y.relu() if torch.is_grad_enabled() else y


class ByExport(Two):
    """An exporter gets another net."""

    def change(self, y: Tensor) -> Tensor:
        return y.relu() if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() else y


class ByTraining(nn.Module):
    """Training and eval mode use different kernels, as re-parameterized blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.side = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enc(x) + (self.side(x) if self.training else 0)
        return self.head(torch.tanh(y))


class RebuiltInEval(ByTraining):
    """Training adds two branches; eval mode convolves with the sum of their kernels, SPAN's way."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.head(torch.tanh(self.enc(x) + self.side(x)))
        self.fused.weight.data = self.enc.weight.data + self.side.weight.data
        self.fused.bias.data = self.enc.bias.data + self.side.bias.data
        return self.head(torch.tanh(self.fused(x)))


class Control(Two):
    """Nothing is wrong with it."""

    def change(self, y: Tensor) -> Tensor:
        return y
