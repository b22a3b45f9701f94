"""Eval mode without calling the model's own `eval()`: exported programs refuse it, other classes do more in it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def in_eval(model: M) -> M:
    """`model` itself with every module in eval mode."""
    for module in model.modules():
        module.training = False
    return model
