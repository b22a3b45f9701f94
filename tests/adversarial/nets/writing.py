"""Nets whose forward writes a convolution's kernel: over-parameterized, the write is lost or restarts D."""

import torch
from torch import Tensor, nn

INPUT_SHAPE = (1, 3, 16, 16)


def conv(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class Masked(nn.Conv2d):
    """PixelCNN's layer: it sees what lies above and to the left."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 3, padding=1)
        mask = torch.ones_like(self.weight)
        mask[:, :, 2:] = 0
        mask[:, :, 1, 2:] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(self.mask)
        return super().forward(x)


class DataMasked(Masked):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return nn.Conv2d.forward(self, x)


class MaxNorm(nn.Conv2d):
    """EEGNet's constraint on every output's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(torch.renorm(self.weight, 2, 0, 0.5))
        return super().forward(x)


class IndexWrite(nn.Conv2d):
    """No center: a blind-spot kernel."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight[:, :, 1, 1] = 0
        return super().forward(x)


def behind(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), conv(8, 4))


def masked() -> nn.Module:
    return behind(Masked(3, 8))


def data_masked() -> nn.Module:
    return behind(DataMasked(3, 8))


def max_norm() -> nn.Module:
    return behind(MaxNorm(3, 8, 3, padding=1))


def index_write() -> nn.Module:
    return behind(IndexWrite(3, 8, 3, padding=1))


class Writer(nn.Module):
    """Plain convolutions; the subclass says how their parent writes the first one's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)

    def write(self) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.write()
        return self.head(torch.tanh(self.enc(x)))


class ParentAssigns(Writer):
    def write(self) -> None:
        self.enc.weight.data = torch.renorm(self.enc.weight.data, 2, 0, 0.5)


class ParentNormalizes(Writer):
    def write(self) -> None:
        with torch.no_grad():
            self.enc.weight.div_(self.enc.weight.norm())


class ParentClips(Writer):
    """WGAN's clipping of all parameters, D too."""

    def write(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(-0.1, 0.1)


class WritesStateDict(Writer):
    """A state dict's tensors share the parameters' memory."""

    def write(self) -> None:
        self.state_dict()["enc.weight"].clamp_(-0.1, 0.1)


class WritesAlias(Writer):
    def __init__(self) -> None:
        super().__init__()
        self.alias = [self.enc.weight]

    def write(self) -> None:
        with torch.no_grad():
            self.alias[0].clamp_(-0.1, 0.1)


def clip(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        layer.weight.clamp_(-0.1, 0.1)


def writing_hook() -> nn.Module:
    net = behind(conv(3, 8))
    net[0].register_forward_pre_hook(clip)
    return net


class PrunesInEval(Writer):
    """Going to eval mode zeroes what is small."""

    def write(self) -> None:
        pass

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if not mode:
            with torch.no_grad():
                self.enc.weight.mul_(self.enc.weight.abs() > 0.1)
        return self
