"""The outputs of an exported graph: values of their own, with names that say what they are."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch import nn
from torch.utils import _pytree as pytree

from doconv_convert.rewrite.observe import run_model


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


def own_outputs(model: ir.Model) -> None:
    """An input that the model returns as it is has a value and a name of its own among the outputs: the exporter names
    the output, or the Identity before it, like the input, which onnxruntime refuses (pytorch#167848)."""
    graph = model.graph
    inputs = {value.name for value in graph.inputs}
    taken = inputs | {value.name for node in graph for value in node.outputs}
    for index, value in enumerate(graph.outputs):
        if value.name not in inputs:
            continue
        names = (f"{value.name}_out{number or ''}" for number in range(len(taken) + 1))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        if value in graph.inputs:
            own = ir.Value(name=name, shape=value.shape, type=value.type)
            graph.append(ir.Node("", "Identity", [value], outputs=[own]))
            graph.outputs[index] = own
        else:
            value.name = name


def plain_outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[str]:
    """Python's own values among the outputs, which no exporter can write: "the int 3", "the str 'cat'"."""
    try:
        leaves = pytree.tree_leaves(run_model(model, inputs))
    except Exception:  # the model's own error says more
        return []
    return [
        f"the {type(leaf).__name__} {leaf!r}"[:80] for leaf in leaves if isinstance(leaf, int | float | str | bytes)
    ]
