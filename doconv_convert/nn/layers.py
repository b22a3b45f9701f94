"""DOConv1d, DOConv2d and DOConv3d: convolution layers whose kernel is the product of D and W."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from doconv_convert.errors import UsageError
from doconv_convert.nn.arguments import require_composition, resolve_d_mul
from doconv_convert.nn.composition import compose_kernel, convolve_features, draw_weight_extra, kind_of
from doconv_convert.nn.factors import StoredKernel, new_factors
from doconv_convert.nn.overlay import OverParameterized, first_slots, kernel_property


class _DOConv(OverParameterized, nn.modules.conv._ConvNd):
    """What the three layers share. Always mixed in before one of torch's own convolution classes."""

    plain_class: ClassVar[type[nn.modules.conv._ConvNd]]
    D: nn.Parameter | None
    weight_extra: nn.Parameter | None
    composition: str
    __jit_unused_properties__: ClassVar[list[str]] = [
        *OverParameterized.__jit_unused_properties__,
        *("weight", "weight_first_slots", "kind", "d_mul"),
    ]
    if not TYPE_CHECKING:  # a Tensor to mypy, as torch declares it
        weight = kernel_property("weight")

    @property
    def weight_first_slots(self) -> Tensor:
        """W's first K slots, (C_out, C_in/g, *kernel_size): the Parameter called `weight` in `parameters()`."""
        return first_slots(self, "weight")  # type: ignore[no-any-return]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        d_mul: int | str = "K",
        composition: str = "kernel",
        pointwise: bool = False,
    ) -> None:
        """Arguments up to `dtype` are the plain layer's own, in its order.

        Args:
            d_mul: D_mul >= K: a number, or "K", "2K", "K+3".
            composition: "kernel" (compose, then one convolution), "feature" (features of patches, then W), or "auto":
                in training the latter where outputs are few (`takes_features`), else the former.
            pointwise: give a 1x1 kernel (K = 1) a D too; by default it has none, as in the authors' code.

        Raises:
            UsageError: D_mul < K (the stored form starts at [I | 0]), or an unknown composition.
        """
        plain: Any = super()
        plain.__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
        )
        self.over_parameterize(d_mul, composition=composition, pointwise=pointwise)

    @classmethod
    def from_conv(
        cls,
        conv: nn.modules.conv._ConvNd,
        *,
        d_mul: int | str = "K",
        composition: str = "kernel",
        pointwise: bool = False,
        seed: int = 0,
        name: str = "",
    ) -> _DOConv:
        """A layer that computes exactly what `conv` does and shares its parameters, hooks and attributes.

        `conv` must be of exactly the plain class. `seed` and `name` draw weight_extra (D_mul > K).
        """
        if type(conv) is not cls.plain_class:
            raise UsageError(
                f"'{name or type(conv).__name__}': {cls.__name__}.from_conv takes exactly "
                f"{cls.plain_class.__name__}, got {type(conv).__name__}; use to_doconv, which serves subclasses."
            )
        layer = cls.__new__(cls)
        layer.__dict__.update(conv.__dict__)
        layer.__dict__["_parameters"] = dict(conv._parameters)
        layer.over_parameterize(d_mul, composition=composition, pointwise=pointwise, seed=seed, name=name)
        return layer

    def over_parameterize(
        self,
        d_mul: int | str = "K",
        *,
        composition: str = "kernel",
        pointwise: bool = False,
        seed: int = 0,
        name: str = "",
    ) -> None:
        """Add a fresh D (zero) and, where D_mul > K, weight_extra to the plain parameters."""
        weight = self.weight_first_slots
        positions = weight.shape[2:].numel()
        resolved = resolve_d_mul(d_mul, positions)
        require_composition(composition)
        if resolved < positions:
            shape = "x".join(map(str, weight.shape[2:]))
            where = f"'{name}': " if name else ""
            raise UsageError(f"{where}d_mul must be at least {positions} ({shape} kernel), got {resolved}.")
        d, extra = None, None
        if positions > 1 or pointwise:
            d, extra = new_factors(weight, self.groups, resolved, seed, name)
        self.composition = composition
        self.register_parameter("D", d)
        self.register_parameter("weight_extra", extra)

    def to_conv(self) -> nn.modules.conv._ConvNd:
        """A plain layer with the folded kernel (composed in float64 on the CPU, cast once)."""
        conv = self.plain_class.__new__(self.plain_class)
        conv.__dict__.update(self.__dict__)
        conv.__dict__["_parameters"] = dict(self._parameters)
        del conv._parameters["D"], conv._parameters["weight_extra"], conv.__dict__["composition"]
        weight = self.weight_first_slots
        kernel = fold_kernel(weight, self.D, self.weight_extra, self.groups).to(weight)
        conv._parameters["weight"] = nn.Parameter(kernel, requires_grad=weight.requires_grad)
        return conv

    @property
    def kind(self) -> str:
        """The paper's name: "DO-Conv", "DO-GConv" or "DO-DConv"."""
        return kind_of(self.in_channels, self.groups)

    @property
    def d_mul(self) -> int:
        """D_mul; 1 for a 1x1 kernel without D."""
        return 1 if self.D is None else self.D.shape[2]

    @property
    def stored_kernels(self) -> tuple[StoredKernel, ...]:  # type: ignore[override]
        has_d = self._parameters.get("D") is not None or self.__dict__.get("D") is not None  # the latter in a replica
        return (StoredKernel("weight", self.groups),) if has_d else ()

    def effective_kernel(self) -> Tensor:
        """The ordinary kernel this layer convolves with, (C_out, C_in/g, *kernel_size), differentiable: `weight` as
        an ordinary tensor."""
        if self._cached_kernels is not None:
            return self._cached_kernels["weight"].read()
        weight, d = self.weight_first_slots, self.D
        return weight if d is None else compose_kernel(weight, d, self.weight_extra, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C_in, *size) or (C_in, *size), as the plain layer does."""
        if isinstance(input, fx.Proxy):  # an fx leaf in anybody's tracer, though not in torch.nn
            tracer: Any = input.tracer
            path = tracer.path_of_module(self)
            if path:  # empty where the trace starts here: there is no module to call then
                return tracer.create_proxy("call_module", path, (input,), {})
        d = self.D
        if d is None:
            return self._conv_forward(input, self.weight_first_slots, self.bias)
        if self.composition != "kernel" and self.takes_features(input):
            return self._convolve_features(input, d)
        return self._conv_forward(input, self.effective_kernel(), self.bias)

    def takes_features(self, x: Tensor) -> bool:
        """Whether `forward` composes features of `x`. With "auto" it does in training, outside of `cached`, where
        the outputs of a channel, B*V, are at most C_out / 2g: D then multiplies half as often (`feature_macs`), and
        W is not rearranged. From C_out / g on it measured slower, between the two now one, now the other.
        """
        if self.composition != "auto":
            return self.composition == "feature"
        if not self.training or self._cached_kernels is not None or isinstance(x, fx.Proxy):
            return False
        spatial = len(self.kernel_size)
        outputs = x.shape[0] if x.dim() == 2 + spatial else 1
        pads = self._pads()
        for axis in range(1, spatial + 1):  # from the last, as the pads are
            padded = x.shape[-axis] + pads[2 * axis - 2] + pads[2 * axis - 1]
            outputs *= (padded - self.dilation[-axis] * (self.kernel_size[-axis] - 1) - 1) // self.stride[-axis] + 1
        return 0 < 2 * outputs * self.groups <= self.out_channels

    def _pads(self) -> list[int]:
        """What F.pad takes."""
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            return list(self._reversed_padding_repeated_twice)
        return [pad for pad in reversed(self.padding) for _ in range(2)]

    def _convolve_features(self, x: Tensor, d: Tensor) -> Tensor:
        pads = self._pads()
        if any(pads):
            x = F.pad(x, pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        return convolve_features(
            x, self.weight_first_slots, d, self.weight_extra, self.bias, self.stride, self.dilation, self.groups
        )

    def reset_parameters(self) -> None:
        """The plain layer's initialization; D becomes zero and weight_extra is drawn anew (seed 0, no name)."""
        super().reset_parameters()
        extra = self._parameters.get("weight_extra")
        if extra is not None:
            with torch.no_grad():
                extra.copy_(draw_weight_extra(extra.shape, self.weight_first_slots.shape[2:].numel(), 0, ""))

    def extra_repr(self) -> str:
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, d_mul={self.d_mul}, kind={self.kind}"


class DOConv1d(_DOConv, nn.Conv1d):
    """`torch.nn.Conv1d` whose kernel is D^ W: DOConv2d's arguments, parameters and errors, for (B, C_in, L)."""

    plain_class = nn.Conv1d


class DOConv2d(_DOConv, nn.Conv2d):
    """`torch.nn.Conv2d` whose kernel is k = D^ W (arXiv 2006.12030, kernel composition). A new layer computes
    exactly what a plain one with its `weight` and `bias` does. Its parameters, for K kernel positions, in one dtype:

        weight        (C_out, C_in/g, height, width)   the first K slots of W
        D             (C_in, K, D_mul)                 zero at first: D^ = [I | 0] + D; None for a 1x1 kernel
        weight_extra  (C_out, C_in/g, D_mul - K)       W's other slots; None where D_mul = K
        bias          (C_out,)                         as in Conv2d

    As an *attribute*, `weight` is k, the kernel that convolves: a read composes it, whatever is written there becomes
    the kernel (W := it, D := 0). The Parameter of that name is read as `weight_first_slots`. `effective_kernel()` is k
    as an ordinary tensor, `kind` the layer's name in the paper. Conv2d's arguments in its order, then `d_mul`,
    `composition` and `pointwise`, by keyword.

    Raises UsageError where D_mul < K, or for an unknown composition; ValueError as Conv2d does.

    >>> import torch
    >>> layer = DOConv2d(8, 16, 3, padding=1, groups=2)
    >>> layer.kind, tuple(layer.D.shape), layer(torch.zeros(1, 8, 5, 5)).shape
    ('DO-GConv', (8, 9, 9), torch.Size([1, 16, 5, 5]))
    """

    plain_class = nn.Conv2d


class DOConv3d(_DOConv, nn.Conv3d):
    """`torch.nn.Conv3d` whose kernel is D^ W: DOConv2d's arguments, parameters and errors, for (B, C_in, depth,
    height, width)."""

    plain_class = nn.Conv3d


DOCONV_CLASSES: dict[type[nn.Module], type[_DOConv]] = {c.plain_class: c for c in (DOConv1d, DOConv2d, DOConv3d)}


def to_float64_cpu(tensor: Tensor) -> Tensor:
    """The values in float64 on the CPU, without gradients: itself where it is that already."""
    return tensor.detach().to("cpu", torch.float64)


def fold_kernel(weight: Tensor, d: Tensor | None, weight_extra: Tensor | None, groups: int) -> Tensor:
    """The folded kernel, composed in float64 on the CPU and not yet cast, (C_out, C_in/g, *kernel_size)."""

    if d is None:
        return to_float64_cpu(weight)
    return compose_kernel(
        to_float64_cpu(weight),
        to_float64_cpu(d),
        None if weight_extra is None else to_float64_cpu(weight_extra),
        groups,
    )
