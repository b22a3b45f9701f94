"""A model in float64 while its kernels are folded and merged, so that each is rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from doconv_convert.errors import DoconvError


@dataclass
class Widened:
    """`model` is the one to narrow at the end, where another one than was widened."""

    model: nn.Module


@contextmanager
def in_float64(model: nn.Module) -> Iterator[Widened]:
    """The model itself in float64; at the end each tensor has its own dtype again, and new ones the dtype and device of
    the model's first floating-point parameter.

    Raises DoconvError where a new value is too large for that dtype.
    """
    tensors = [tensor for tensor in _tensors(model) if tensor.is_floating_point()]
    dtypes = {id(tensor): tensor.dtype for tensor in tensors}
    usual = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    dtype, device = usual.dtype, usual.device
    for tensor in tensors:
        tensor.data = tensor.data.double()
    widened = Widened(model)
    try:
        yield widened
    finally:
        for name, tensor in [("", one) for one in tensors] + [*_named(widened.model)]:
            if tensor.dtype != torch.float64:
                continue
            known = dtypes.get(id(tensor))
            exact, narrow = tensor.data, tensor.data.to(known or dtype)
            if bool(torch.isfinite(exact).all()) and not bool(torch.isfinite(narrow).all()):
                raise DoconvError(
                    f"'{name}': the merged kernel has values up to {float(exact.abs().max()):.1e}, beyond the largest "
                    f"finite number of {str(known or dtype).removeprefix('torch.')}; merge a float32 model instead."
                )
            tensor.data = narrow if known else narrow.to(device)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
