"""Nets that compute another kernel from a convolution's, share it between layers, or keep what they computed."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT_SHAPE = (1, 3, 16, 16)


def conv(c_in: int, c_out: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


class Computed(nn.Conv2d):
    """Convolves with `kernel()`, where torch.fx can follow."""

    def __init__(self, c_in: int = 3, c_out: int = 8) -> None:
        super().__init__(c_in, c_out, 3, padding=1)

    def kernel(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.kernel(), self.bias)


class Standardized(Computed):
    def kernel(self) -> Tensor:
        w = self.weight
        return (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)


class Normalized(Computed):
    """A spectral norm written by hand: one power iteration from a fixed vector."""

    def kernel(self) -> Tensor:
        matrix = self.weight.flatten(1)
        u = F.normalize(matrix @ torch.ones_like(matrix[0]), dim=0)
        v = F.normalize(u @ matrix, dim=0)
        return self.weight / (u @ matrix @ v)


class Rounded(Computed):
    """Fake quantization to 16 steps a unit, straight through."""

    def kernel(self) -> Tensor:
        return self.weight + (torch.round(self.weight * 16) / 16 - self.weight).detach()


class Binary(Computed):
    def kernel(self) -> Tensor:
        return torch.sign(self.weight) * self.weight.abs().mean()


class TopHalf(Computed):
    """Only entries above the mean count."""

    def kernel(self) -> Tensor:
        return self.weight * (self.weight.abs() >= self.weight.abs().mean())


class CachedForever(Computed):
    """A plain attribute keeps the normalized kernel from the first forward on."""

    cache: Tensor | None = None

    def kernel(self) -> Tensor:
        if self.cache is None:
            self.cache = (self.weight / self.weight.norm()).detach()
        return self.cache.to(self.weight.dtype)


class CachedInEval(Computed):
    """The same, forgotten in training."""

    cache: Tensor | None = None

    def kernel(self) -> Tensor:
        normalized = self.weight / self.weight.norm()
        if self.training:
            self.cache = None
            return normalized
        if self.cache is None:
            self.cache = normalized.detach()
        return self.cache


class CachedInBuffer(Computed):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros_like(self.weight))

    def kernel(self) -> Tensor:
        if not self.cache.any():
            with torch.no_grad():
                self.cache.copy_(self.weight / self.weight.norm())
        return self.cache


class AveragedInBuffer(Computed):
    """Eval mode convolves with the running average of the kernels seen in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", self.weight.detach().clone())

    def kernel(self) -> Tensor:
        if self.training:
            self.average.lerp_(self.weight.detach(), 0.5)
            return self.weight
        return self.average


_KEPT: dict[int, Tensor] = {}


class CachedGlobally(Computed):
    """A dictionary of the module file, by the layer's identity."""

    def kernel(self) -> Tensor:
        return _KEPT.setdefault(id(self), self.weight.detach().clone()).to(self.weight.dtype)


def behind(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Tanh(), conv(8, 4))


def standardized() -> nn.Module:
    return behind(Standardized())


def normalized() -> nn.Module:
    return behind(Normalized())


def rounded() -> nn.Module:
    return behind(Rounded())


def binary() -> nn.Module:
    return behind(Binary())


def top_half() -> nn.Module:
    return behind(TopHalf())


def cached_forever() -> nn.Module:
    return behind(CachedForever())


def cached_in_eval() -> nn.Module:
    return behind(CachedInEval())


def cached_in_buffer() -> nn.Module:
    return behind(CachedInBuffer())


def averaged_in_buffer() -> nn.Module:
    return behind(AveragedInBuffer())


def cached_globally() -> nn.Module:
    return behind(CachedGlobally())


class Shared(nn.Module):
    """Two layers with one Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.left, self.right = conv(3, 8), conv(8, 8), conv(8, 8)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.enc(x))
        return self.left(y) - self.right(y.flip(-1))


class SharedByGroups(nn.Module):
    """The same with different group counts: the kernel's channels mean two things."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.narrow, self.wide = conv(3, 4), conv(4, 8), conv(8, 8, groups=2)
        self.wide.weight = self.narrow.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.tanh(self.narrow(torch.tanh(self.enc(x)))))


class SharedByLinear(nn.Module):
    """The kernel is a linear layer's matrix, too."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.enc(x))
        patch = x[:, :, :3, :3].flatten(1)
        return self.head(y * torch.sigmoid(F.linear(patch, self.enc.weight.flatten(1)))[:, :, None, None])


class SharedByTransposedLayer(nn.Module):
    """An autoencoder whose decoder layer holds the encoder's Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.dec = nn.ConvTranspose2d(8, 3, 3, padding=1)
        self.enc, self.head = conv(3, 8), conv(3, 4)
        self.dec.weight = self.enc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dec(torch.tanh(self.enc(x))))


class SharedByParent(nn.Module):
    """The parent registers the layer's Parameter under a name of its own and reads it there."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)
        self.kernel = self.enc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.enc(x)) * (1 + self.kernel.square().mean()))
