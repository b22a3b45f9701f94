"""What a model computes with and no state dict holds: of two models built alike, it has to be the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from doconv_convert.artifacts.sources.source import build
from doconv_convert.errors import DoconvError

if TYPE_CHECKING:
    from doconv_convert.artifacts.sources.source import Source

_TORCHS_OWN = frozenset(vars(nn.Module()))


def require_reproducible(source: Source, model: nn.Module) -> None:
    """Raises DoconvError where a fresh `model` of the user's own code holds random tensors that no state dict has: the
    checkpoint then tells a part only of the network that was trained."""
    if source.kind not in ("file", "module"):
        return
    mine = dict(unsaved_tensors(model))
    if not mine:
        return
    other = dict(unsaved_tensors(build(source, seed=1)))
    for name, value in mine.items():
        if name not in other or not _equal(value, other[name]):
            raise DoconvError(
                f"'{source.text}': '{name}' is drawn at random when the model is built, and no state dict holds it, so "
                "the checkpoint does not say what was trained; make it a parameter or a persistent buffer."
            )


def unsaved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By their names: buffers that are not persistent, plain attributes, and what stands in lists, tuples and dicts,
    layers included."""
    saved = model.state_dict(keep_vars=True).values()
    # a view of a saved tensor has its values, whatever holds it
    registered = {id(module) for module in model.modules()} | {_memory(tensor) for tensor in saved}
    for path, module in model.named_modules():
        places = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        places |= {name: value for name, value in vars(module).items() if name not in _TORCHS_OWN}
        for name, value in places.items():
            yield from _tensors_in(value, f"{path}.{name}".lstrip("."), registered)


def _tensors_in(value: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if id(value) in seen or (isinstance(value, Tensor) and _memory(value) in seen):
        return
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, nn.Module):
        for key, tensor in value.state_dict(keep_vars=True).items():
            yield f"{name}.{key}", tensor
        for key, tensor in unsaved_tensors(value):
            yield f"{name}.{key}", tensor
    elif isinstance(value, list | tuple | dict):
        inner: dict[Any, Any] = value if isinstance(value, dict) else dict(enumerate(value))
        for key, one in inner.items():
            yield from _tensors_in(one, f"{name}[{key}]", seen | {id(value)})


def _memory(tensor: Tensor) -> int:
    """Where its values lie; an empty tensor, or one without memory, is its own place."""
    if not isinstance(tensor, Tensor) or not torch._C._has_storage(tensor):
        return id(tensor)
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point() and b.is_floating_point():
        a, b = a.nan_to_num(), b.nan_to_num()
    return a.dtype == b.dtype and torch.equal(a, b)
