"""Compositions on a CUDA device: by the Triton kernels, differentiable, and as one operator to a compiler.

`compose_kernel` asks here where W lies on such a device; nothing imports this module before. In an ordinary run the
kernels are launched at once, since an operator's way through torch's dispatcher costs more than a small composition.
torch.compile records the operator `doconv_convert::compose`. Exporters, torch.func, dispatch modes and forward-mode
gradients follow torch's own operations, as on a CPU; so does whatever the kernels do not take.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doconv_convert.nn import native

kernels: ModuleType | None
try:
    from doconv_convert.nn import triton_batch as kernels
except ImportError:  # torch comes without Triton on some systems
    kernels = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE_TYPES = ("cuda",)
_MOST = 2**31 - 1  # the kernels' offsets have 32 bits
Factors = tuple[Tensor, Tensor, Tensor | None, int]


def composed(weight: Tensor, d: Tensor, weight_extra: Tensor | None, groups: int) -> Tensor | None:
    """`compose_kernel`'s result, or None where torch's operations are to compute it."""
    if kernels is None or not _fit(weight, d, weight_extra, groups):
        return None
    if torch.compiler.is_compiling():
        return None if _is_for_others() else compose(weight, d, weight_extra, groups)
    if native.is_being_traced() or not _are_ordinary(weight, d, weight_extra):
        return None
    return _Compose.apply(weight, d, weight_extra, groups, None)  # type: ignore[no-any-return]


def composed_together(factors: Sequence[Factors]) -> list[Tensor] | None:
    """`composed` of each (weight, D, weight_extra, groups) in one launch a kind of kernel, or None where each is to be
    composed alone: in a CUDA graph too, since the table of addresses is copied from the host, and gone at a replay."""
    if kernels is None or torch.compiler.is_compiling() or native.is_being_traced():
        return None
    device = factors[0][0].device
    served = all(_fit(*each) and _are_ordinary(*each[:3]) and each[0].device == device for each in factors)
    if not served or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    made = _launch("compose_many", factors)
    return [_Compose.apply(*each, (kernel,)) for each, kernel in zip(factors, made, strict=True)]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_for_others() -> bool:
    """Whether what is compiled is an exported program, which must run where this package is not, or inside one of
    torch.func's transforms, which want a rule for every operation. Asked while a compiler traces, as it runs in Python:
    traced itself, the first answer was wrong (torch 2.11) and the second part of the graph (torch 2.14)."""
    return torch.compiler.is_exporting() or torch._C._functorch.maybe_current_level() is not None


def _fit(weight: Tensor, d: Tensor, extra: Tensor | None, groups: int) -> bool:
    """Shapes that belong together, of tensors that the kernels take; everything else is torch's, its errors too."""
    if d.dim() != 3 or weight.dim() < 3 or groups < 1 or weight.shape[0] % groups:
        return False
    (in_channels, positions, slots), (out_channels, per_group) = d.shape, weight.shape[:2]
    if per_group * groups != in_channels or weight.numel() != out_channels * per_group * positions:
        return False
    if extra is None:
        return slots == positions and _are_taken(weight, d)
    return tuple(extra.shape) == (out_channels, per_group, slots - positions) and _are_taken(weight, d, extra)


def _are_taken(weight: Tensor, *others: Tensor) -> bool:
    return all(
        type(t) in (Tensor, nn.Parameter) and t.dtype in DTYPES and t.device == weight.device and t.numel() <= _MOST
        for t in (weight, *others)
    )


def _are_ordinary(*tensors: Tensor | None) -> bool:
    """Numbers in the device's memory, as they are: not to be read with the other sign, not freed."""
    return all(
        type(tensor) in (Tensor, nn.Parameter)  # the gradient's, too
        and tensor.device.type in DEVICE_TYPES
        and torch._C._has_storage(tensor)
        and not tensor.is_neg()
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)
        for tensor in tensors
        if tensor is not None
    )


def _launch(name: str, *arguments: Any) -> Any:
    """A function of `kernels` on the device of its tensors: Triton launches on the current one."""
    device = (arguments[0] if isinstance(arguments[0], Tensor) else arguments[0][0][0]).device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        return getattr(kernels, name)(*arguments)


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, d: Tensor, weight_extra: Tensor | None, groups: int, made: tuple[Tensor] | None
    ) -> Tensor:
        """`made`: the kernel, where it was composed with others."""
        ctx.save_for_backward(weight, d, weight_extra)
        ctx.groups = groups
        return made[0] if made else _launch("compose", weight, d, weight_extra, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, (weight, d, extra) = gradients[0], ctx.saved_tensors
        serves = (
            not torch.is_grad_enabled()  # else this gradient will be differentiated itself
            and not native.is_being_traced()
            and gradient.dtype == weight.dtype
            and _are_ordinary(gradient, weight, d, extra)
        )
        if serves:
            return *_launch("differentiate", weight, gradient, d, extra, ctx.groups), None, None
        return *differentiated(weight, gradient, d, extra, ctx.groups), None, None


def differentiated(
    weight: Tensor, gradient: Tensor, d: Tensor, weight_extra: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of W, D and W's extra slots in torch's own operations, which can be differentiated again:

    dL/dW^ = [G | 0] + D^T G for all slots of W, dL/dD = G W^ summed over the outputs of a group.
    """
    (in_channels, positions, slots), q, per_group = d.shape, weight.shape[0] // groups, weight.shape[1]
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(gradient.device.type, enabled=False):
        parts = [tensor.flatten(2).to(wide) for tensor in (weight, weight_extra) if tensor is not None]
        w, g = (
            tensor.reshape(groups, q, per_group, -1).transpose(1, 2).reshape(in_channels, q, -1)
            for tensor in (torch.cat(parts, 2), gradient.to(wide))
        )
        for_d = torch.bmm(g.transpose(1, 2), w)
        for_slots = F.pad(g, (0, slots - positions)) + torch.bmm(g, d.to(wide))
        for_slots = for_slots.reshape(groups, per_group, q, slots).transpose(1, 2).reshape(-1, per_group, slots)
        for_weight = for_slots.narrow(2, 0, positions).reshape(weight.shape)
    if weight_extra is None:
        return for_weight.to(weight.dtype), for_d.to(d.dtype), None
    for_extra = for_slots.narrow(2, positions, slots - positions).to(weight_extra.dtype)
    return for_weight.to(weight.dtype), for_d.to(d.dtype), for_extra


@torch.library.custom_op(
    "doconv_convert::compose",
    mutates_args=(),
    schema="(Tensor weight, Tensor d, Tensor? weight_extra, int groups) -> Tensor",
)
def compose(weight: Tensor, d: Tensor, weight_extra: Tensor | None, groups: int) -> Tensor:
    """weight + D [weight | weight_extra]: `compose_kernel` as an operator, for torch.compile."""
    return _launch("compose", weight, d, weight_extra, groups)  # type: ignore[no-any-return]


@torch.library.custom_op(
    "doconv_convert::compose_backward",
    mutates_args=(),
    schema="(Tensor weight, Tensor gradient, Tensor d, Tensor? weight_extra, int groups) -> (Tensor, Tensor, Tensor)",
)
def compose_backward(
    weight: Tensor, gradient: Tensor, d: Tensor, weight_extra: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of weight, D and weight_extra; the last is empty where there is none."""
    for_weight, for_d, for_extra = _launch("differentiate", weight, gradient, d, weight_extra, groups)
    return for_weight, for_d, weight.new_empty(0) if for_extra is None else for_extra


@compose.register_fake
def _(weight: Tensor, d: Tensor, weight_extra: Tensor | None, groups: int) -> Tensor:
    return _new_like(weight)


@compose_backward.register_fake
def _(
    weight: Tensor, gradient: Tensor, d: Tensor, weight_extra: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    extra = weight.new_empty(0) if weight_extra is None else weight_extra.new_empty(weight_extra.shape)
    return _new_like(weight), d.new_empty(d.shape), extra


def _new_like(weight: Tensor) -> Tensor:
    return kernels.new_like(weight)  # type: ignore[union-attr,no-any-return]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, d, weight_extra, ctx.groups = inputs
    ctx.save_for_backward(weight, d, weight_extra)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight, d, extra = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *differentiated(weight, gradient, d, extra, ctx.groups), None
    for_weight, for_d, for_extra = compose_backward(weight, gradient, d, extra, ctx.groups)
    return for_weight, for_d, None if extra is None else for_extra, None


compose.register_autograd(_backward, setup_context=_remember)
