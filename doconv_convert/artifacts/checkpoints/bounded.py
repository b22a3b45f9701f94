"""A network from a recipe, no larger than the file that asks for it: two million classes are 4 GB in one line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from doconv_convert.artifacts.sources.source import Source, build
from doconv_convert.errors import DoconvError

# Of the file's own values. Builders of torchvision allocate less than half of that (test_bounded.py measures some).
_ONE_TENSOR, _ALL_TENSORS = 4, 8
# And so many more, for networks whose tables are larger than their weights.
_FREE = 2**24


class _Budget(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Holds what is about to be allocated against what the file has, before it is."""

    def __init__(self, held: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held, self.total = held, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = _values(args)
        self.total += asked
        if asked > _ONE_TENSOR * self.held + _FREE or self.total > _ALL_TENSORS * self.held + 4 * _FREE:
            raise _TooLarge(max(asked, self.total))
        return func(*args, **(kwargs or {}))


class _TooLarge(DoconvError):
    def __init__(self, values: int) -> None:
        super().__init__(f"{values:,} values")
        self.values = values


def build_within(source: Source, state: Mapping[str, Tensor], path: str) -> nn.Module:
    """The network that the recipe of the file at `path` names.

    Raises DoconvError where it would be many times larger than what the file holds (`state`), before it is made.
    """
    held = sum(tensor.numel() for tensor in state.values())
    budget = _Budget(held)
    try:
        with budget:
            return build(source)
    except DoconvError as error:
        if budget.total <= _ALL_TENSORS * held + _FREE and not isinstance(error, _TooLarge):
            raise
        raise DoconvError(
            f"'{path}': its recipe asks for a network of more than {held:,} values, which is all that the file holds "
            f"({source.text}, {dict(source.args)}); it is damaged, or made to fill your memory. Where you trust it, "
            "name the network: `model`, `model_args`."
        ) from error


def _values(args: Any) -> int:
    """How many values a factory function is asked for: torch.empty(sizes), torch.arange(end)."""
    if not args:
        return 0
    if isinstance(args[0], list | tuple) and all(isinstance(size, int) for size in args[0]):
        return math.prod(args[0])
    return max((int(one) for one in args[:3] if isinstance(one, int | float) and math.isfinite(one)), default=0)
