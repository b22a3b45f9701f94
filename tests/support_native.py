"""What the tests of product.c share: what can be loaded, tensors to compose, and a count of calls."""

import ctypes
import mmap
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


def at_the_end_of_memory(tensor: Tensor) -> Tensor:
    """A copy whose last number is the last before a page that must not be touched."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size).view(tensor.shape)
    return copy.copy_(tensor)
