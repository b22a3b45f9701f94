"""Nets that read a convolution's kernel outside of its layer: folding may change what they read."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT_SHAPE = (1, 3, 16, 16)


def conv(c_in: int, c_out: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


class Reader(nn.Module):
    """Two convolutions; the subclass says what it does with the first one's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = conv(3, 8)
        self.head = conv(8, 4)

    def read(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(torch.tanh(self.enc(x))))


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's kernel, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv_transpose2d(torch.tanh(self.enc(x)), self.enc.weight, padding=1))


class UntraceableAutoencoder(TiedAutoencoder):
    """A branch on the batch keeps torch.fx out."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[0] > 10**6 else super().forward(x)


class DataAutoencoder(UntraceableAutoencoder):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.enc(x)) if x.shape[0] < 10**6 else x
        return self.head(F.conv_transpose2d(y, self.enc.weight.data, padding=1))


class NormPenalty(Reader):
    """The output carries the kernel's norm."""

    def read(self, y: Tensor) -> Tensor:
        return y * (1 + self.enc.weight.square().mean())


class TransposedKernel(nn.Module):
    """A second convolution with the first one's kernel, its channels swapped and its positions mirrored."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        back = self.enc.weight.transpose(0, 1).flip(2, 3)
        return self.head(F.conv2d(torch.tanh(self.enc(x)), back, padding=1))


class StatisticsGate(Reader):
    """The mean of each kernel opens its channel; read where torch.fx cannot follow."""

    def read(self, y: Tensor) -> Tensor:
        if y.shape[0] > 10**6:
            return y
        return y * torch.sigmoid(8 * self.enc.weight.mean((1, 2, 3)))[:, None, None]


class Hypernet(Reader):
    """A linear layer turns the kernel into the next one's bias."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(27, 1)

    def read(self, y: Tensor) -> Tensor:
        return y + self.make(self.enc.weight.flatten(1))[:, :, None]


class ByName(Reader):
    """The kernel by its name in the module tree."""

    def read(self, y: Tensor) -> Tensor:
        return y * dict(self.named_parameters())["enc.weight"].abs().mean((1, 2, 3))[:, None, None] * 8


class ByStateDict(Reader):
    def read(self, y: Tensor) -> Tensor:
        return y * self.state_dict()["enc.weight"].abs().mean((1, 2, 3))[:, None, None] * 8


class ByParameterDict(Reader):
    """The kernel from the layer's own dictionary, past any property."""

    def read(self, y: Tensor) -> Tensor:
        return y * self.enc._parameters["weight"].abs().mean((1, 2, 3))[:, None, None] * 8


class AllParameters(Reader):
    """The output is scaled by the norm of everything that is trained, D with it."""

    def read(self, y: Tensor) -> Tensor:
        return y / nn.utils.parameters_to_vector(self.parameters()).norm()


class ParameterCount(Reader):
    """The number of parameters scales the output: over-parameterizing changes it."""

    def read(self, y: Tensor) -> Tensor:
        return y * (1 + 1e-3 * sum(p.numel() for p in self.parameters()))


class ByType(Reader):
    """What the layer's exact class is decides the branch."""

    def read(self, y: Tensor) -> Tensor:
        return y.square() if type(self.enc) is nn.Conv2d else y


class UsesD(Reader):
    """Whatever has a D adds it to the output."""

    def read(self, y: Tensor) -> Tensor:
        d = getattr(self.enc, "D", None)
        return y if d is None else y * (1 + d.square().mean())


class Alias(Reader):
    """A list, which no module tree shows, holds the Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = [self.enc.weight]

    def read(self, y: Tensor) -> Tensor:
        return y * self.alias[0].abs().mean((1, 2, 3))[:, None, None] * 8


class DataAlias(Reader):
    """A view of the kernel's storage, taken when the layer was made."""

    def __init__(self) -> None:
        super().__init__()
        self.view = self.enc.weight.data.flatten(1)

    def read(self, y: Tensor) -> Tensor:
        return y * self.view.to(y.dtype).abs().mean(1)[:, None, None] * 8


class NumpyAlias(Reader):
    """The same through numpy's array."""

    def __init__(self) -> None:
        super().__init__()
        self.array = self.enc.weight.detach().numpy()

    def read(self, y: Tensor) -> Tensor:
        return y * (1 + float(abs(self.array).mean()))


class OtherModule(nn.Module):
    """A child that was given the other child's layer, in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)
        self.gate = Gate((self.enc,))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(torch.tanh(self.enc(x))))


class Gate(nn.Module):
    def __init__(self, layers: tuple[nn.Conv2d]) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, y: Tensor) -> Tensor:
        return y * torch.sigmoid(8 * self.layers[0].weight.sum((1, 2, 3)))[:, None, None]


class Holder(nn.Module):
    """The layer only holds its kernel, which a function convolves with where torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 10**6:
            return x
        return self.head(torch.tanh(F.conv2d(x, self.enc.weight.view(8, 3, 3, 3), self.enc.bias, padding=1)))
