"""What the tests of product.c share: what can be loaded, tensors to compose, and a count of calls."""

from typing import Any

import pytest
import torch
from torch import Tensor

from doconv_convert.nn import native

REAL = {torch.float32: "float", torch.float64: "double"}
CAPABILITY = torch.backends.cpu.get_cpu_capability().lower()
PROCESSORS = {"avx512": ["avx512", "avx2"], "avx2": ["avx2"]}.get(CAPABILITY, [])


def drawn(shape: tuple[Any, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, int]:
    """W, D, a gradient of the kernel, and the groups."""
    c_out, c_in, groups, kernel = shape
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(c_out, c_in // groups, *kernel, generator=generator).to(dtype) for _ in range(2))
    positions = weight.shape[2:].numel()
    d = torch.randn(c_in, positions, positions, generator=generator).to(dtype) / positions**0.5
    return weight, d, gradient, groups


def count_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that every call of `compiled.<name>` adds to."""
    calls, function = [], getattr(native, name)

    def counted_function(*args: Any) -> Any:
        calls.append(name)
        return function(*args)

    monkeypatch.setattr(native, name, counted_function)
    return calls
