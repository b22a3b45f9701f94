"""`product.c`, where the package was built with a C compiler: product.py's arithmetic for plain tensors on the CPU.

torch's own products of 9 x 9 matrices leave a processor mostly idle, and they need copies; docs/benchmarks.md has both.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

logger = logging.getLogger(__name__)

LANES = 16  # product.c's: the most kernel positions it takes
_SOURCE = Path(__file__).with_name("product.c")
_SIZE, _ADDRESS = ctypes.c_ssize_t, ctypes.c_void_p
# product.c's functions: how many addresses and sizes each takes; the number of threads comes last.
_FUNCTIONS = {
    "compose": (4, 4),
    "differentiate": (6, 4),
    "compose_depthwise": (3, 2),
    "differentiate_depthwise": (5, 2),
}


def load(processor: str, real: str) -> ctypes.CDLL | None:
    """The library for `processor` ("avx512", "avx2") and `real`, C's name of a dtype; None where hatch_build.py has
    built none from this very product.c."""
    try:
        digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:8]
    except OSError:  # a bundle of Python files alone
        return None
    path = _SOURCE.with_name("libraries") / f"product_{processor}_{real}_{digest}.so"
    if not path.exists():
        logger.info("no '%s': torch's own operations compose kernels", path.name)
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(f"'{path.name}' cannot be loaded ({error}); compositions take longer.", stacklevel=2)
        return None
    for name, (addresses, sizes) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [*[_ADDRESS] * addresses, *[_SIZE] * sizes, ctypes.c_int], None
    return library


_PROCESSOR = torch.backends.cpu.get_cpu_capability().lower()
_NAMES = {torch.float32: "float", torch.float64: "double"}
LIBRARIES = {dtype: library for dtype, real in _NAMES.items() if (library := load(_PROCESSOR, real))}


def is_supported(d: Tensor, groups: int, *kernels: Tensor) -> bool:
    """Whether `compose` takes D and W (`is_supported(d, groups, first)`), or `differentiate` these and a gradient:
    shapes that belong together, (C_out, C_in/g, *size) of K positions and (C_in, K, K) with K <= 16 or depthwise, of
    ordinary tensors on the CPU that nobody is looking at. Everything else is torch's, its errors too."""
    if is_being_traced() or d.dtype not in LIBRARIES or groups < 1 or d.dim() != 3:
        return False
    shape, (in_channels, positions, slots) = kernels[0].shape, d.shape
    if (
        len(shape) < 3
        or shape[0] % groups
        or (shape[1] * groups, slots) != (in_channels, positions)
        or kernels[0].numel() != shape[0] * shape[1] * positions
        or (positions > LANES and not shape[0] == groups == in_channels)
    ):
        return False
    for tensor in kernels:
        if tensor.shape != shape or not _is_ordinary(tensor, d.dtype):
            return False
    return _is_ordinary(d, d.dtype)


def _is_ordinary(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Numbers in the process's own memory, as they are: none of a subclass, batched by vmap, to be read with the other
    sign, or not there (a zero tensor, a storage that was freed)."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype == dtype
        and tensor.is_cpu
        and torch._C._has_storage(tensor)
        and not tensor.is_neg()
        and tensor.data_ptr() != 0
    )


def is_being_traced() -> bool:
    """By a compiler, an exporter, a dispatch mode (fake tensors, make_fx), torch.func or forward-mode gradients: all
    follow torch's operations, and would not see what happens in C. Modes of torch functions do not count: a default
    device is one."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def compose(first: Tensor, d: Tensor, groups: int) -> Tensor:
    """first + D first: (C_out, C_in/g, *size) of K positions and (C_in, K, K) give first's shape."""
    first, d = first.contiguous(), d.contiguous()
    out, library, threads = torch.empty_like(first), LIBRARIES[first.dtype], torch.get_num_threads()
    (out_channels, per_group, *_), (in_channels, positions, _) = first.shape, d.shape
    pointers = first.data_ptr(), d.data_ptr(), out.data_ptr()
    if out_channels == groups == in_channels:
        library.compose_depthwise(*pointers, in_channels, positions, threads)
    else:
        sizes, room = (groups, out_channels // groups, per_group, positions), torch.empty_like(d)
        library.compose(*pointers, room.data_ptr(), *sizes, threads)
    return out


def differentiate(gradient: Tensor, first: Tensor, d: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The gradients of first and D from the kernel's, in the shapes of `compose`: both, in one go over the memory."""
    gradient, first, d = gradient.contiguous(), first.contiguous(), d.contiguous()
    for_first, for_d = torch.empty_like(first), torch.empty_like(d)
    library, threads = LIBRARIES[first.dtype], torch.get_num_threads()
    (out_channels, per_group, *_), (in_channels, positions, _) = first.shape, d.shape
    pointers = gradient.data_ptr(), first.data_ptr(), d.data_ptr(), for_first.data_ptr(), for_d.data_ptr()
    if out_channels == groups == in_channels:
        library.differentiate_depthwise(*pointers, in_channels, positions, threads)
    else:
        sizes, room = (groups, out_channels // groups, per_group, positions), d.new_empty(in_channels, positions, LANES)
        library.differentiate(*pointers, room.data_ptr(), *sizes, threads)
    return for_first, for_d
