"""The weights of large models: how not to hold them twice."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from itertools import chain

from torch import nn

# Bytes of weights from which no two processes hold them at once.
LARGE = 2**30
# From here on, an export and a run in float64 would need more than everything else does.
NO_TWIN = 2**30


def is_large(model: nn.Module) -> bool:
    return _weight_bytes(model) >= LARGE


def has_twin(model: nn.Module) -> bool:
    """Whether there is room for its float64 twin."""
    return _weight_bytes(model) < NO_TWIN


def _weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def release_weights(*models: nn.Module) -> None:
    """Frees the memory of the models' values, whoever still holds the models, for other processes."""
    for model in models:
        for tensor in chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.new_empty(0)
    return_freed()


def restore_weights(model: nn.Module, same: nn.Module) -> None:
    """Values for a model that gave its own up, from one built alike."""
    for mine, its in zip(
        chain(model.parameters(), model.buffers()), chain(same.parameters(), same.buffers()), strict=True
    ):
        mine.data = its.data


def return_freed() -> None:
    """Hands freed memory to the system. glibc keeps it for itself: after a float64 run as much as the weights."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
