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
from doconv_convert.nn.composition import compose_kernels
from doconv_convert.nn.factors import CachedKernel, read_factors, refuse_shards
from doconv_convert.nn.overlay import stored_kernels

_Factors = tuple[Tensor, Tensor, Tensor | None, int]


@dataclass
class _Entry:
    """One shared kernel of the scope and who reads it."""

    name: str
    factors: _Factors
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
    with precomposed(model) as entries:
        yield
        _require_unchanged(entries)
        _require_backward(entries)


@contextmanager
def precomposed(model: nn.Module) -> Iterator[dict[int, _Entry]]:
    """As `cached`, without its questions: every kernel by the id of its W."""
    found: dict[int, tuple[str, _Factors]] = {}
    readers: list[tuple[nn.Module, str, int]] = []
    for path, module in model.named_modules():
        for kernel in stored_kernels(module):
            weight, d, extra = read_factors(module, kernel)
            found.setdefault(id(weight), (f"{path}.{kernel.name}".lstrip("."), (weight, d, extra, kernel.groups)))
            readers.append((module, kernel.name, id(weight)))
    composed = compose_kernels([factors for _, factors in found.values()])
    entries = {
        key: _Entry(name, factors, CachedKernel(kernel))
        for (key, (name, factors)), kernel in zip(found.items(), composed, strict=True)
    }
    for module, name, key in readers:
        module.__dict__.setdefault("_cached_kernels", {})[name] = entries[key].cached
    try:
        yield entries
    finally:
        for module, _, _ in readers:
            module.__dict__.pop("_cached_kernels", None)


def _refuse(model: nn.Module) -> None:
    refuse_shards(model, "train it without cached()")
    for path, module in model.named_modules():
        if "_cached_kernels" in module.__dict__:
            name = path or type(model).__name__
            raise DoconvError(f"'{name}' is inside a cached() scope already; leave that one first.")


def _require_unchanged(entries: dict[int, _Entry]) -> None:
    with torch.no_grad():
        again = compose_kernels([entry.factors for entry in entries.values()])
        same = _are_equal(zip(again, (entry.cached.kernel for entry in entries.values()), strict=True))
    changed = [entry.name for entry, equal in zip(entries.values(), same, strict=True) if not equal]
    if changed:
        raise DoconvError(
            f"{len(changed)} kernels changed inside cached() ('{changed[0]}', ...): outputs after the change used the "
            "old ones. Step the optimizer after the scope."
        )


def _are_equal(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[bool]:
    """`torch.equal` of each; the answers of a GPU are waited for once, together."""
    answers = [(a == b).all() if a.is_cuda else torch.tensor(torch.equal(a, b)) for a, b in pairs]
    if not answers:
        return []
    equal: list[bool] = torch.stack([answer.to(answers[0].device) for answer in answers]).tolist()
    return equal


def _require_backward(entries: dict[int, _Entry]) -> None:
    waiting = [e.name for e in entries.values() if e.cached.checkpointed and not e.cached.has_gradient]
    if waiting:
        raise DoconvError(
            f"'{waiting[0]}' ran in a checkpointed forward whose backward has not run inside cached(); the "
            "recomputation would not find its kernel. Put the backward into the scope."
        )
