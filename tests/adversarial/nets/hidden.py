"""Nets whose outputs hide what a kernel does, or that are hard to compare: nothing shown is nothing proven."""

import torch
from torch import Tensor, nn

INPUT_SHAPE = (1, 3, 16, 16)


def conv(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


class MaxNorm(nn.Conv2d):
    """A kernel that folding changes, wherever it is not noticed."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(torch.renorm(self.weight, 2, 0, 0.5))
        return super().forward(x)


class Constrained(nn.Module):
    """A max-norm layer and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = MaxNorm(3, 8, 3, padding=1), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.enc(x)))


class ClosedRelu(nn.Module):
    """The gate opens on inputs far brighter than noise alone; its kernel is constrained."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.bright, self.head = conv(3, 8), MaxNorm(3, 8, 3, padding=1), conv(8, 4)
        nn.init.constant_(self.bright.bias, -20.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.enc(x)) + self.bright(x).relu())


class Scores(Constrained):
    """Only class numbers come out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3)).argmax(1)


class Steps(Constrained):
    """Eight steps a unit come out."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.round(super().forward(x).mean((2, 3)) * 8) / 8


class Offset(Constrained):
    """A thousand is added to every output, which makes errors small relative to it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e3


class SmallBesideLarge(Constrained):
    """The wrong output is the smaller one of two."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.enc(x) * 1e-4, self.head(torch.tanh(x.repeat(1, 3, 1, 1)[:, :8])) * 1e4


class Branch(nn.Module):
    """torch.cond: the inputs that are tried never take the second branch, which has a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dark, self.bright, self.head = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.enc(x))
        y = torch.cond(x.mean() < 50.0, self.dark, self.bright, (y,))
        return self.head(y)


class Constant(nn.Module):
    """The last layer is zero: the output is its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), nn.Conv2d(8, 4, 1)
        nn.init.zeros_(self.head.weight)
        self.head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.enc(x)))


class ConstantBeside(nn.Module):
    """One of two outputs is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(torch.tanh(self.enc(x))), self.enc(torch.zeros_like(x))


class NotANumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.enc(x)))
        return y * ((y - y) / (y - y))


class NotANumberBeside(NotANumber):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.enc(x)
        return self.head(torch.tanh(y)), super().forward(x)


class InPlace(nn.Module):
    """The caller's input is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        x *= 2
        return self.head(torch.tanh(self.enc(x)))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.norm, self.head = conv(3, 8), nn.BatchNorm2d(8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.enc(x))))


def half() -> nn.Module:
    return Plain().half()


def bfloat16() -> nn.Module:
    return Plain().bfloat16()


def float64() -> nn.Module:
    return Plain().double()


class Gated(nn.Module):
    """As ClosedRelu, with nothing wrong: a kernel that no usual input shows."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.bright, self.head = conv(3, 8), conv(3, 8), conv(8, 4)
        nn.init.constant_(self.bright.bias, -20.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.enc(x)) + self.bright(x).relu())


class ClosedRead(nn.Module):
    """Bright images alone are scaled by the stored kernel's norm, read by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        norm = dict(self.named_parameters())["enc.weight"].norm()
        y = torch.tanh(self.enc(x))
        return self.head(y * torch.where(x.mean() > 50.0, norm, torch.ones_like(norm)))


class BatchOfOne(nn.Module):
    """A single image is treated otherwise than the same image among others."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.enc(x))
        return self.head(y.relu() if x.shape[0] == 1 else y)


class SqueezedBatch(nn.Module):
    """The well-known slip: of a single image, the batch dimension goes too."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.enc(x))).mean((2, 3)).squeeze()
