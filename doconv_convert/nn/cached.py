"""`cached(model)`: one explicit scope in which every kernel is composed once.

Modules that run many times in one forward (RetinaNet's heads: 5, RAFT's update block: 12) would compose their
kernels each time. Inside the scope they read what was composed on entry; outside there is no cache anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from doconv_convert.errors import DoconvError
from doconv_convert.nn.composition import compose_kernel
from doconv_convert.nn.overlay import read_factors, stored_kernels
from doconv_convert.nn.stored import CachedKernel, refuse_shards


@dataclass
class _Entry:
    """One shared kernel of the scope and who reads it."""

    name: str
    factors: tuple[Tensor, Tensor, Tensor | None, int]
    cached: CachedKernel


@contextmanager
def cached(model: nn.Module) -> Iterator[None]:
    """Compose every over-parameterized kernel of `model` once, for all forwards inside the scope.

    Open it around one forward and its backward (`with cached(model): loss = ...; loss.backward()`); the
    optimizer steps outside. Under `torch.no_grad()` it serves any number of forwards. On exit each kernel is
    composed again without gradient and compared (`torch.equal`): version counters do not see fused optimizers
    and writes to `.data`.

    >>> import torch
    >>> from doconv_convert import to_doconv
    >>> model = to_doconv(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)))
    >>> with cached(model):
    ...     loss = sum(model(torch.randn(1, 3, size, size)).square().mean() for size in (8, 16, 32))
    ...     loss.backward()

    Raises:
        DoconvError: on entry, for an FSDP2-wrapped model (its parameters are shards) or a scope inside a scope;
            on exit, where a parameter changed inside, or a checkpointed forward's backward has not run: it
            would recompute with other kernels.
    """
    _refuse(model)
    entries: dict[int, _Entry] = {}
    modules: list[nn.Module] = []
    for path, module in model.named_modules():
        for kernel in stored_kernels(module):
            weight, d, extra = read_factors(module, kernel)
            key = id(weight)
            if key not in entries:
                composed = compose_kernel(weight, d, extra, kernel.groups)
                name = f"{path}.{kernel.name}".lstrip(".")
                entries[key] = _Entry(name, (weight, d, extra, kernel.groups), CachedKernel(composed))
            module.__dict__.setdefault("_cached_kernels", {})[kernel.name] = entries[key].cached
            modules.append(module)
    try:
        yield
        _require_unchanged(entries)
        _require_backward(entries)
    finally:
        for module in modules:
            module.__dict__.pop("_cached_kernels", None)


def _refuse(model: nn.Module) -> None:
    refuse_shards(model, "train it without cached()")
    for path, module in model.named_modules():
        if "_cached_kernels" in module.__dict__:
            name = path or type(model).__name__
            raise DoconvError(f"'{name}' is inside a cached() scope already; leave that one first.")


def _require_unchanged(entries: dict[int, _Entry]) -> None:
    with torch.no_grad():
        changed = [
            entry.name for entry, same in zip(entries.values(), _are_equal(entries.values()), strict=True) if not same
        ]
    if changed:
        raise DoconvError(
            f"{len(changed)} kernels changed inside cached() ('{changed[0]}', ...): outputs after the change used the "
            "old ones. Step the optimizer after the scope."
        )


def _are_equal(entries: Iterable[_Entry]) -> list[bool]:
    """`torch.equal` of each kernel and its recomposition; a GPU's answers are waited for once, together."""
    answers: list[bool | Tensor] = []
    for entry in entries:
        again, kernel = compose_kernel(*entry.factors), entry.cached.kernel
        answers.append((again == kernel).all() if kernel.is_cuda else torch.equal(again, kernel))
    waiting = [answer for answer in answers if isinstance(answer, Tensor)]
    arrived = iter(torch.stack([answer.to(waiting[0].device) for answer in waiting]).tolist() if waiting else [])
    return [next(arrived) if isinstance(answer, Tensor) else answer for answer in answers]


def _require_backward(entries: dict[int, _Entry]) -> None:
    waiting = [e.name for e in entries.values() if e.cached.checkpointed and not e.cached.has_gradient]
    if waiting:
        raise DoconvError(
            f"'{waiting[0]}' ran in a checkpointed forward whose backward has not run inside cached(); the "
            "recomputation would not find its kernel. Put the backward into the scope."
        )
