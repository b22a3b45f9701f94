"""Python's numbers in a float64 export, which torch's exporter rounds to float32 on their way into the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from torch import fx
from torch.utils import _pytree as pytree


def restore_numbers(model: ir.Model, graph: fx.Graph) -> None:
    """Give each float64 scalar of `model` that is a number of the traced `graph`, rounded to float32, that number (an
    attention's 32 ** -0.5 comes as 0.1767766922712326)."""
    numbers: dict[float, set[float]] = {}
    for node in graph.nodes:
        for leaf in pytree.tree_leaves((node.args, node.kwargs)):
            if isinstance(leaf, float) and abs(leaf) < np.finfo(np.float32).max:
                numbers.setdefault(float(np.float32(leaf)), set()).add(leaf)
    for part in model.graphs():
        for value in part.initializers.values():
            _restore(value, numbers)


def _restore(value: Any, numbers: dict[float, set[float]]) -> None:
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.DOUBLE or tensor.size != 1:
        return
    array = tensor.numpy()
    meant = numbers.get(float(array.reshape(())), set())
    if len(meant) == 1:
        value.const_value = ir.tensor(np.full(array.shape, min(meant)), name=value.name)
