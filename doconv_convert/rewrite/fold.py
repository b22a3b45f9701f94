"""`fold`: from over-parameterized layers back to the plain model."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from doconv_convert.rewrite.convert import copy_model
from doconv_convert.rewrite.folding import assign_folded, folded_kernel, layer_factors, restore_layers
from doconv_convert.rewrite.passes import FoldPass


def fold(
    model: nn.Module, *, example_inputs: Any = None, constant_kernels: bool = False, inplace: bool = False
) -> nn.Module:
    model = model if inplace else copy_model(model)
    fold_in_place(model, check_first=inplace)
    return model


def fold_in_place(model: nn.Module, check_first: bool) -> bool:
    """Fold our own layers; whether there were any. `check_first` composes every kernel once more up front, so
    that an error leaves the model untouched."""
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    layers = layer_factors(model)
    if check_first:
        for factors in layers:
            folded_kernel(factors)
    modified = False
    for graph in graphs:
        modified |= FoldPass()(graph).modified
    assign_folded(layer_factors(model))
    return restore_layers(model) or modified
