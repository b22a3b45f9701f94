"""DO-Conv's algebra (arXiv 2006.12030) as pure functions on tensors.

With K = the number of kernel positions, g = groups and D^ = [I | 0] + D,

    k[o, j, p] = sum_s D^[c, p, s] * W[o, j, s],    c = (o // (C_out / g)) * (C_in / g) + j

where c is the input channel that slot j of output o reads. `weight` holds the first K slots of W in an
ordinary kernel's shape and `weight_extra` the other D_mul - K, so the identity never has to be added:

    k = weight + D @ [weight | weight_extra]

At D = 0 that is `weight` itself, bit for bit, in every dtype.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from doconv_convert.nn import native
from doconv_convert.nn.product import compiled_product, plus_product

# Numbers in a piece of a kernel: 4 MiB of float64.
PIECE = 2**19
# Asked once: torch.compile of torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = [
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu", "xla") if torch.amp.is_autocast_available(name)
]


def compose_kernel(weight: Tensor, d: Tensor, weight_extra: Tensor | None = None, groups: int = 1) -> Tensor:
    """The ordinary kernel that W and D stand for.

    Args:
        weight: W's first K slots, (C_out, C_in/g, *kernel_size).
        d: the residual D = D^ - [I | 0], (C_in, K, D_mul).
        weight_extra: W's further slots, (C_out, C_in/g, D_mul - K), or None where D_mul = K.
        groups: g.

    Returns:
        (C_out, C_in/g, *kernel_size) in weight's dtype and memory format. It is computed in float32 or
        better (where D is float64, in that) with autocast off and cast once: half precision would lose most small
        entries of D. In float64 without gradients, as in a fold, torch's operations go piece by piece (`row_pieces`).
    """
    if isinstance(d, fx.Proxy):
        return _as_one_node(compose_kernel, weight, d, weight_extra, groups)
    if weight_extra is None and weight.is_contiguous() and native.is_supported(d, groups, weight):
        return compiled_product(weight, d, groups)  # nothing to cast, copy or switch off
    if _is_on_gpu(weight) and (kernel := _composed_on_gpu(weight, d, weight_extra, groups)) is not None:
        return kernel
    device = weight.device.type
    # A context manager costs more than a small composition: enter it only where there is something to switch off.
    autocast = device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        dtype = torch.promote_types(torch.promote_types(weight.dtype, d.dtype), torch.float32)
        # A jit trace is checked with gradients off, and must not become another then.
        whole = dtype != torch.float64 or _is_tracked(weight, d, weight_extra) or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not whole:
            pieces = [
                _composed(weight[rows], d[channels], _part(weight_extra, rows), number, dtype)
                for rows, channels, number in row_pieces(weight.shape, groups)
            ]
            kernel = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        else:
            kernel = _composed(weight, d, weight_extra, groups, dtype)
    return kernel.contiguous(memory_format=memory_format(weight))


def compose_kernels(factors: Sequence[tuple[Tensor, Tensor, Tensor | None, int]]) -> Iterator[Tensor]:
    """`compose_kernel` of each (weight, d, weight_extra, groups), one by one; on a GPU in one launch a kind."""
    if len(factors) > 1 and _is_on_gpu(factors[0][0]):
        from doconv_convert.nn import cuda

        together = cuda.composed_together(factors)
        if together is not None:
            return iter(together)
    return (compose_kernel(*each) for each in factors)


def row_pieces(shape: Sequence[int], groups: int) -> Iterator[tuple[slice, slice, int]]:
    """A kernel of `shape`, (C_out, C_in/g, *kernel_size), in pieces that can be composed one by one: rows of W, rows
    of D, and the groups they make. A piece's numbers stay in a processor's cache, the whole kernel's often do not."""
    rows, per_group = shape[0] // groups, shape[1]
    fitting = max(1, PIECE // max(1, math.prod(shape[1:])))
    if fitting >= rows:  # whole groups
        step = fitting // max(1, rows)
        for first in range(0, groups, step):
            last = min(first + step, groups)
            yield slice(first * rows, last * rows), slice(first * per_group, last * per_group), last - first
        return
    for group in range(groups):
        channels = slice(group * per_group, (group + 1) * per_group)
        for first in range(group * rows, (group + 1) * rows, fitting):
            yield slice(first, min(first + fitting, (group + 1) * rows)), channels, 1


def convolve_features(
    x: Tensor,
    weight: Tensor,
    d: Tensor,
    weight_extra: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Feature composition: D_mul features a channel from every patch (u + D^T u), then a pointwise grouped product
    with W.

    The same linear map as an ordinary convolution, without padding, with `compose_kernel`'s result; shapes as there,
    x is (B, C_in, *size) or (C_in, *size), the result contiguous in x's memory format.
    """
    if isinstance(d, fx.Proxy):
        return _as_one_node(convolve_features, x, weight, d, weight_extra, bias, stride, dilation, groups)
    if x.dim() < weight.dim():
        single = convolve_features(x.unsqueeze(0), weight, d, weight_extra, bias, stride, dilation, groups)
        return single.squeeze(0)
    (in_channels, positions, d_mul), spatial = d.shape, weight.dim() - 2
    patches = x
    for axis, (size, step, spread) in enumerate(zip(weight.shape[2:], stride, dilation, strict=True), 2):
        patches = patches.unfold(axis, spread * (size - 1) + 1, step)[..., ::spread]
    batch, volume = x.shape[0], patches.shape[2 : 2 + spatial]
    order = 1, *range(2 + spatial, 2 + 2 * spatial), 0, *range(2, 2 + spatial)
    columns = patches.permute(order).reshape(in_channels, positions, -1)  # (C_in, K, B*V)
    first = F.pad(columns, (0, 0, 0, d_mul - positions)) if d_mul > positions else columns
    features = torch.baddbmm(first, d.transpose(1, 2).to(columns.dtype), columns)
    rows = full_w(weight, weight_extra).reshape(groups, weight.shape[0] // groups, -1)
    product = torch.bmm(rows, features.reshape(groups, rows.shape[2], -1)).reshape(-1, batch, *volume).transpose(0, 1)
    if bias is not None:
        product = product + bias.to(product.dtype).view(-1, *[1] * spatial)
    return product.contiguous(memory_format=memory_format(x))


def _as_one_node(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """What any fx tracer records for a composition: a call of it, with W and D as its inputs."""
    proxy: Any = next(arg for arg in args if isinstance(arg, fx.Proxy))
    return proxy.tracer.create_proxy("call_function", function, args, {})  # type: ignore[no-any-return]


def full_d(d: Tensor) -> Tensor:
    """D^ = [I | 0] + D, (C_in, K, D_mul), in float32 or better."""
    wide = d.to(torch.promote_types(d.dtype, torch.float32))
    return wide + torch.eye(*d.shape[1:], dtype=wide.dtype, device=d.device)


def full_w(weight: Tensor, weight_extra: Tensor | None) -> Tensor:
    """W with all its slots, (C_out, C_in/g, D_mul)."""
    slots = weight.flatten(2)
    return slots if weight_extra is None else torch.cat([slots, weight_extra], dim=2)


def memory_format(weight: Tensor) -> torch.memory_format:
    """The memory format a kernel is stored in: channels last, or plain contiguous."""
    # The plain question comes first: functorch cannot answer the other one under vmap.
    if not weight.is_contiguous():
        for channels_last in (torch.channels_last, torch.channels_last_3d):
            if weight.dim() == (5 if channels_last is torch.channels_last_3d else 4) and weight.is_contiguous(
                memory_format=channels_last
            ):
                return channels_last
    return torch.contiguous_format


def draw_weight_extra(shape: Sequence[int], positions: int, seed: int, name: str) -> Tensor:
    """Initial `weight_extra` of the site called `name`, float32 on the CPU, as Conv2d draws its weights.

    `shape` is (C_out, C_in/g, D_mul - K). A generator of its own, seeded by `seed` and `name`, makes ranks
    and reruns agree and leaves the global random state alone.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = 1 / math.sqrt(max(1, shape[1] * positions))
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def kind_of(in_channels: int, groups: int) -> str:
    """The paper's name of the layer: DO-Conv (g = 1), DO-DConv (g = C_in) or DO-GConv (between)."""
    if groups == 1:
        return "DO-Conv"
    return "DO-DConv" if groups == in_channels else "DO-GConv"


def kernel_macs(
    *,
    in_channels: int,
    out_channels: int,
    kernel_positions: int,
    d_mul: int,
    groups: int = 1,
    batch: int = 1,
    output_volume: int = 1,
) -> int:
    """Multiply-accumulates (MACs; FLOPs are twice as many) of one training forward by kernel composition:
    D_mul*K*C_in*C_out/g + B*V*C_out*K*C_in/g (arXiv 2006.12030).

    `kernel_positions` is K (3x3: 9), `output_volume` V (height times width), `batch` B.

    >>> layer = dict(in_channels=64, out_channels=128, kernel_positions=9, d_mul=9)
    >>> kernel_macs(**layer, output_volume=56 * 56) < feature_macs(**layer, output_volume=56 * 56)
    True
    """
    product = in_channels * out_channels // groups * kernel_positions
    return d_mul * product + batch * output_volume * product


def feature_macs(
    *,
    in_channels: int,
    out_channels: int,
    kernel_positions: int,
    d_mul: int,
    groups: int = 1,
    batch: int = 1,
    output_volume: int = 1,
) -> int:
    """Multiply-accumulates (MACs; FLOPs are twice as many) of one training forward by feature composition:
    B*V*(D_mul*K*C_in + C_out*D_mul*C_in/g) (arXiv 2006.12030). Arguments are `kernel_macs`'s."""
    per_position = d_mul * kernel_positions * in_channels + out_channels * d_mul * in_channels // groups
    return batch * output_volume * per_position


def _is_on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda


def _composed_on_gpu(weight: Tensor, d: Tensor, weight_extra: Tensor | None, groups: int) -> Tensor | None:
    from doconv_convert.nn import cuda  # and with it Triton, only where there is such a device

    return cuda.composed(weight, d, weight_extra, groups)


def _is_tracked(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _composed(weight: Tensor, d: Tensor, weight_extra: Tensor | None, groups: int, dtype: torch.dtype) -> Tensor:
    first = weight.to(dtype)
    slots = first if weight_extra is None else torch.cat([first.flatten(2), weight_extra.to(dtype)], dim=2)
    return plus_product(first, slots, d.to(dtype), groups).to(weight.dtype)
