"""Torch's own layers and their arguments as operations of the algebra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from doconv_convert.rewrite.linear.affine import AffineConv, Array
from doconv_convert.rewrite.linear.operations import AveragePool, Scale, ZeroPad, batch_norm
from doconv_convert.rewrite.linear.reasons import Declined, Reason
from doconv_convert.rewrite.linear.steps import PASSES_ON, Kind, Operation

_CONVS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_TRANSPOSED: dict[type[nn.Module], int] = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_NORMS: dict[type[nn.Module], int] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
_POOLS: dict[type[nn.Module], int] = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}


def module_operation(module: nn.Module) -> tuple[Operation | None, Kind]:
    """What a leaf module does in eval mode, if it is affine. Raises Declined."""
    for classes, transposed in ((_CONVS, False), (_TRANSPOSED, True)):
        base = next((cls for cls in classes if isinstance(module, cls)), None)
        if base is not None and isinstance(module, _ConvNd) and _has_forward_of(module, base):
            if module.padding_mode != "zeros":
                raise Declined(Reason.PADDING_MODE)
            if not _is_real(module.weight):
                return None, "other"
            given = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
            if isinstance(module, _ConvTransposeNd):
                given["output_padding"] = module.output_padding
            return convolution(module.weight, module.bias, given, classes[base], transposed), "convolution"
    if isinstance(module, _BatchNorm) and type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return _norm_of(module), "batch norm"
    if isinstance(module, nn.Identity | _DropoutNd) and type(module).__module__.startswith("torch.nn."):
        return PASSES_ON, "other"
    if type(module) in _POOLS:
        return pool(vars(module), _POOLS[type(module)]), "other"
    if isinstance(module, nn.modules.padding._ConstantPadNd) and type(module).__module__.startswith("torch.nn."):
        return zero_pad(module.padding, "constant", module.value), "other"
    return None, "other"


def _has_forward_of(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a subclass computes what its base does."""
    names = ("forward", "_conv_forward", "__call__")
    return "forward" not in vars(module) and all(
        getattr(type(module), name, None) is getattr(base, name, None) for name in names
    )


def _norm_of(module: _BatchNorm) -> Scale | None:
    mean, variance = module.running_mean, module.running_var
    if mean is None or variance is None:
        raise Declined(Reason.BATCH_STATISTICS)
    if not _is_real(mean):
        return None
    rank = next((rank for cls, rank in _NORMS.items() if isinstance(module, cls)), None)
    return replace(norm(mean, variance, module.weight, module.bias, epsilon=module.eps), rank=rank)


def convolution(
    kernel: Tensor, bias: Tensor | None, given: Mapping[str, Any], rank: int, transposed: bool
) -> AffineConv:
    groups = int(given.get("groups", 1))
    dilation, stride = (_tuple(given.get(name, 1), rank) for name in ("dilation", "stride"))
    values = array(kernel)
    if transposed:  # torch's layout is (C_in, C_out/groups, *K)
        values = values.reshape(groups, -1, *values.shape[1:]).swapaxes(1, 2)
        values = values.reshape(-1, *values.shape[2:])
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        totals = [(k - 1) * d if padding == "same" else 0 for k, d in zip(values.shape[2:], dilation, strict=True)]
        sides = tuple((total // 2, total - total // 2) for total in totals)
    else:
        sides = tuple((pad, pad) for pad in _tuple(padding, rank))
    if transposed:
        extra = _tuple(given.get("output_padding", 0), rank)
        sides = tuple((before, after - more) for (before, after), more in zip(sides, extra, strict=True))
    shift = np.zeros(values.shape[0]) if bias is None else array(bias)
    return AffineConv(values, shift, stride, sides, dilation, groups, transposed)


def pool(given: Mapping[str, Any], rank: int) -> AveragePool | None:
    if given.get("ceil_mode", False) or given.get("divisor_override") is not None:
        return None
    size = _tuple(given["kernel_size"], rank)
    padding = _tuple(given.get("padding", 0), rank)
    if any(padding) and not given.get("count_include_pad", True):
        return None
    stride = given.get("stride")
    return AveragePool(size, size if stride in (None, ()) else _tuple(stride, rank), tuple((p, p) for p in padding))


def zero_pad(pads: Any, mode: str, value: Any) -> ZeroPad | None:
    if mode != "constant":
        raise Declined(Reason.PADDING_MODE)
    if not all(isinstance(pad, int) for pad in pads):
        return None
    if value not in (None, 0, 0.0):
        raise Declined(Reason.PADDING_MODE)
    pairs = list(zip(pads[::2], pads[1::2], strict=True))
    return ZeroPad(tuple(pairs[::-1]))


def _is_real(tensor: Tensor) -> bool:
    return not nn.parameter.is_lazy(tensor) and tensor.is_floating_point() and not tensor.is_meta


def array(tensor: Tensor) -> Array:
    values: Array = tensor.detach().cpu().double().numpy()
    return values


def norm(mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, *, epsilon: float) -> Scale:
    gamma, beta = (None if one is None else array(one) for one in (weight, bias))
    return batch_norm(array(mean), array(variance), gamma, beta, epsilon)


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    if isinstance(value, Sequence):
        return tuple(value) if len(value) == rank else tuple(value) * rank
    return (int(value),) * rank
