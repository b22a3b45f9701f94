"""Scaling a layer by what it gives: at its first call of one forward, by a hook on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from doconv_convert.nn.layers import DOConv1d, DOConv2d, DOConv3d

# Layers whose output is linear in their kernel, and classes that keep their forward; others may standardize theirs.
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, DOConv1d, DOConv2d, DOConv3d)
_FORWARDS = {(cls.forward, getattr(cls, "_conv_forward", None)) for cls in _LINEAR}

# From a layer's output to the factor that its kernel should take.
Factor = Callable[[Tensor], float]


# An output that varies less, of its size, is a constant with its rounding errors: csatv2 normalizes single channels.
_CONSTANT = 1e-5


def to_deviation(target: float) -> Factor:
    """The factor that gives the output the standard deviation `target`; a constant one, that size."""

    def factor(output: Tensor) -> float:
        if output.numel() <= 1:
            return 1.0
        deviation = float(output.std())
        size = math.hypot(deviation, float(output.mean()))
        return target / max(size if deviation < _CONSTANT * size else deviation, 1e-6)

    return factor


class Rescale:
    """A forward hook that multiplies the layer's kernel by `factor(output)`, once; with `redraw` the kernel is drawn
    anew before (N(0, 1/fan_in)) and the bias zeroed."""

    def __init__(self, factor: Factor, redraw: torch.Generator | None = None) -> None:
        self.factor, self.redraw, self.done = factor, redraw, False

    def __call__(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        weight = layer._parameters.get("weight")
        if self.done or weight is None:
            return None
        self.done = True
        if self.redraw is not None:
            drawn = torch.randn(weight.shape, generator=self.redraw) / math.sqrt(max(1, weight[0].numel()))
            weight.copy_(drawn)
            if layer.bias is not None:
                layer.bias.zero_()
            output = layer.forward(*args)
        factor = self.factor(output)
        for name in ("weight", "weight_extra"):
            if layer._parameters.get(name) is not None:
                layer._parameters[name].mul_(factor)
        if (type(layer).forward, getattr(type(layer), "_conv_forward", None)) in _FORWARDS:
            return _rescaled(layer, output, factor)
        return layer.forward(*args)  # type: ignore[no-any-return]


def _rescaled(layer: Any, output: Tensor, factor: float) -> Tensor:
    """What the layer gives with its kernel times `factor`, without computing it again."""
    if layer.bias is None:
        return output * factor
    bias = layer.bias if isinstance(layer, nn.Linear) else layer.bias.view(-1, *[1] * len(layer.kernel_size))
    return torch.lerp(bias.expand_as(output), output, factor)


@contextmanager
def rescaling(hooks: Mapping[nn.Module, Rescale]) -> Iterator[None]:
    """Run one forward inside; no gradients are recorded there."""
    handles = [layer.register_forward_hook(hook) for layer, hook in hooks.items()]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
