"""Other people's DO-Conv layers, written from the shapes of their checkpoints, and networks made of them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Authors(nn.Module):
    """The published layer: W (C_out, C_in/g, D_mul), D and a stored identity (C_in, K, D_mul); 1x1 layers have W alone.

    Output o is made with the rows of D of group o % g. D_mul = 2K stores [I | I], anything else [I | 0].
    """

    identity_name = "d_diag"

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: tuple[int, int] = (3, 3),
        *,
        d_mul: int | None = None,
        groups: int = 1,
        bias: bool = True,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self.size, self.groups, self.stride, self.dilation = size, groups, stride, dilation
        self.padding, self.padding_mode = padding, padding_mode
        positions = size[0] * size[1]
        slots = positions if d_mul is None or positions == 1 else d_mul
        self.W = nn.Parameter(torch.randn(c_out, c_in // groups, slots) / (c_in // groups * positions) ** 0.5)
        if positions > 1:
            self.D = nn.Parameter(torch.randn(c_in, positions, slots) / positions**0.5)
            eye, whole = torch.eye(positions), slots // positions
            identity = torch.cat([eye.repeat(1, whole), torch.zeros(positions, slots - whole * positions)], dim=1)
            identity = identity.repeat(c_in, 1, 1)
            self.register_parameter(self.identity_name, nn.Parameter(identity, requires_grad=False))
        self.bias = nn.Parameter(torch.randn(c_out)) if bias else None

    def kernel(self) -> Tensor:
        c_out, per_group, _ = self.W.shape
        if self.size == (1, 1):
            return self.W.reshape(c_out, per_group, 1, 1)
        d = self.D + self._parameters[self.identity_name]  # type: ignore[operator]
        made = []
        for o in range(c_out):
            first = (o % self.groups) * per_group
            made.append(torch.einsum("jps,js->jp", d[first : first + per_group], self.W[o]))
        return torch.stack(made).reshape(c_out, per_group, *self.size)

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            pads = [padding, padding] if isinstance(padding, int) else list(padding)
            x, padding = F.pad(x, (pads[1], pads[1], pads[0], pads[0]), mode=self.padding_mode), 0
        return F.conv2d(x, kernel, bias, self.stride, padding, self.dilation, self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.kernel(), self.bias)


class Older(Authors):
    """Before 2022-07, and most copies."""

    identity_name = "D_diag"


class Scaled(Authors):
    """Kernel and bias times a learned number; an eval convolution that may be stale."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.mul = nn.Parameter(torch.tensor([1.5]))
        self.eval_conv = nn.Conv2d(self.W.shape[1] * self.groups, self.W.shape[0], self.size, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.kernel() * self.mul, None if self.bias is None else self.bias * self.mul)


class Gated(Older):
    """Keys of `Older`; the kernel goes through a gate without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel()
        return self.convolve(x, kernel * torch.sigmoid(kernel), self.bias)


class Summed(Authors):
    """Keys of `Authors`; a copy whose sum goes over all channels of D."""

    def kernel(self) -> Tensor:
        c_out, per_group, _ = self.W.shape
        d = (self.D + self.d_diag).sum(0)  # type: ignore[operator]
        return torch.einsum("ps,ojs->ojp", d, self.W).reshape(c_out, per_group, *self.size)


class Main(nn.Module):
    """A layer of somebody's own around the foreign one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.main = nn.Sequential(layer)
        self.__conv = layer  # mangled, as in the wild

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def rebuild(model: nn.Module, cls: type[Authors] = Authors, **options: Any) -> nn.Module:
    """`model` with every Conv2d replaced, in place, by a foreign layer with random W and D."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if type(child) is nn.Conv2d:
                conv: Any = child
                module._modules[name] = cls(
                    conv.in_channels,
                    conv.out_channels,
                    conv.kernel_size,
                    groups=conv.groups,
                    bias=conv.bias is not None,
                    stride=conv.stride,
                    padding=conv.padding,
                    dilation=conv.dilation,
                    padding_mode=conv.padding_mode,
                    **options,
                ).train(conv.training)
    return model


def wrapped(model: nn.Module, prefix: str = "module.") -> dict[str, Any]:
    """As a training script saves it."""
    return {"state_dict": {prefix + key: value for key, value in model.state_dict().items()}, "epoch": 90}
