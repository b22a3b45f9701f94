"""What torch's exporter leaves out: outputs named by their keys; Python's numbers, where a model is float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from torch import fx
from torch.utils import _pytree as pytree


def name_by_key(model: ir.Model, structure: pytree.TreeSpec | None) -> None:
    """Outputs that the model returns in a dict are named by their keys, which say more than an operator's name."""
    outputs = model.graph.outputs
    if structure is None or structure.num_leaves != len(outputs):
        return
    taken = {value.name for value in model.graph.inputs} | {
        value.name for node in model.graph for value in node.outputs
    }
    try:
        paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(outputs, structure))[0]
    except ValueError:  # paths are optional for classes that a library registers
        return
    for path, value in paths:
        name = "_".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path)
        if path and isinstance(path[0], pytree.MappingKey) and value.producer() and name not in taken:
            value.name = name
            taken.add(name)


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
