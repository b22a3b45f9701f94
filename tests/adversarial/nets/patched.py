"""Nets that instances, hooks and closures change: what runs is not what the class says."""

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT_SHAPE = (1, 3, 16, 16)


def conv(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def plain() -> Any:
    return nn.Sequential(conv(3, 8), nn.Tanh(), conv(8, 4))


def scale_by_norm(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * layer.weight.norm()


def forward_hook() -> nn.Module:
    net = plain()
    net[0].register_forward_hook(scale_by_norm)
    return net


def shift_by_mean(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0] - 8 * layer.weight.mean(),)


def forward_pre_hook() -> nn.Module:
    net = plain()
    net[0].register_forward_pre_hook(shift_by_mean)
    return net


def closure() -> nn.Module:
    """The whole net's forward is a closure on the first instance's layers."""
    net = plain()
    net.forward = lambda x: net[2](torch.tanh(net[0](x)) * net[0].weight.norm())
    return net


def layer_closure() -> nn.Module:
    """One layer's forward is a closure: it convolves with something else than its kernel."""
    net = plain()
    layer = net[0]
    layer.forward = lambda x: F.conv2d(x, layer.weight / layer.weight.norm(), layer.bias, padding=1)
    return net


def _cubed(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, self.weight**3, self.bias, padding=1)


def layer_method() -> nn.Module:
    net = plain()
    net[0].forward = types.MethodType(_cubed, net[0])
    return net


def weight_from_neighbor() -> nn.Module:
    """A hook on one layer reads the other's kernel through a closure."""
    net = plain()
    net[2].register_forward_hook(lambda layer, inputs, output: output * net[0].weight.abs().mean() * 8)
    return net


class Unregistered(nn.Module):
    """A layer in a plain list: neither trained nor saved, and drawn anew wherever the net is built."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)
        self.extra = [conv(8, 8)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.extra[0].to(x.dtype)(torch.tanh(self.enc(x))))


class RandomFeatures(nn.Module):
    """A random projection in a plain attribute: no state dict has it."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)
        self.projection = torch.randn(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.enc(x)).movedim(1, -1) @ self.projection.to(x.dtype)
        return self.head(y.movedim(-1, 1))


class UnsavedBuffer(nn.Module):
    """The same in a buffer that is not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)
        self.register_buffer("order", torch.randperm(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.enc(x))[:, self.order])


class FixedFeatures(nn.Module):
    """Not saved either, and the same wherever it is built: nothing is wrong with it."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)
        self.projection = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
        self.register_buffer("order", torch.arange(7, -1, -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.enc(x))[:, self.order].movedim(1, -1) @ self.projection.to(x.dtype)
        return self.head(y.movedim(-1, 1))


class ExtraState(nn.Module):
    """Training moves a number that the state dict has as the module's extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)
        self.scale = 1.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.scale)

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = float(state)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale += 0.1
        return self.head(torch.tanh(self.enc(x)) * self.scale)


class LoadHook(nn.Module):
    """Loading halves a kernel and saving doubles it: the state dict's tensors are not the parameters'."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = conv(3, 8), conv(8, 4)
        self._register_state_dict_hook(_double)
        self.register_load_state_dict_pre_hook(_halve)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.enc(x)))


def _double(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    state[f"{prefix}head.weight"] = 2 * state[f"{prefix}head.weight"]


def _halve(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    if f"{prefix}head.weight" in state:
        state[f"{prefix}head.weight"] = state[f"{prefix}head.weight"] / 2
