"""The lever of every kernel that is to be converted, measured on a converted copy (`nn/lever.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from doconv_convert.errors import UsageError
from doconv_convert.nn.lever import lever
from doconv_convert.rewrite.convert import convert_copy
from doconv_convert.rewrite.observe import run_model
from doconv_convert.rewrite.options import Options
from doconv_convert.rewrite.tracing import set_eval_mode

Loss = Callable[[Any], Tensor]

RANDOM_DIRECTION = "a random direction of the outputs, in eval mode"
OWN_LOSS = "your loss"


def measure_levers(
    model: nn.Module, example_inputs: Any, options: Options, loss: Loss | None = None
) -> dict[str, float]:
    """{layer: lever} at D = 0, by one backward of `loss(output)` in the model's own mode. Without a loss: of a random
    direction of the floating outputs, in eval mode; then a model that gives them no gradient has no levers.

    Raises UsageError where `loss` gives no scalar with a gradient, or no layer one.
    """
    copy = convert_copy(model, example_inputs, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if loss is not None:
            _require_scalar(loss(run_model(copy, example_inputs))).backward()  # type: ignore[no-untyped-call]
            return lever(copy)
        direction = _random_direction(set_eval_mode(copy), example_inputs)
    if direction is None:
        return {}
    direction.backward()  # type: ignore[no-untyped-call]
    try:
        return lever(copy)
    except UsageError:
        return {}


def _random_direction(model: nn.Module, example_inputs: Any) -> Tensor | None:
    """<r, output> for r ~ N(0, 1); None where no output has a gradient."""
    outputs = [
        leaf.double()
        for leaf in tree_leaves(run_model(model, example_inputs))
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
    ]
    return torch.stack([(one * torch.randn_like(one)).sum() for one in outputs]).sum() if outputs else None


def _require_scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UsageError(f"`loss`: got {got}, expected a function from the output to a scalar that has a gradient.")
    return value
