"""Where the checks' torch runs are made, and in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from doconv_convert.errors import DoconvError, UsageError


def find_device(text: str) -> torch.device:
    """'cpu', 'cuda' or 'cuda:1'. Raises UsageError for another one, DoconvError where it is not there."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise UsageError(f"`device`: got '{text}', expected 'cpu', 'cuda' or 'cuda:1'.") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"`device`: got '{text}', expected 'cpu' or 'cuda': checks need float64 and real values.")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DoconvError(f"`device`: got '{text}', but torch {torch.__version__} finds {count} CUDA devices; use cpu.")
    return device


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors in any nesting, on the device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


@contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32 or bfloat16 in float32's place."""
    backends: Any = torch.backends
    places = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
