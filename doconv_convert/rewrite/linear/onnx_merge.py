"""Merging the linear regions of an ONNX model, each into one node. This needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from doconv_convert.rewrite.linear.affine import AffineConv
from doconv_convert.rewrite.linear.steps import LinearRegion


def merge_regions(model: ir.Model, regions: Sequence[LinearRegion]) -> list[str]:
    """Put a convolution in the place of each region of the main graph (`find_regions` of its `read_steps`), with
    weights of the region's own dtype; the new nodes' names. Inputs, outputs and dynamic dimensions stay."""
    return [_merge(model.graph, region) for region in regions]


def region_nodes(graph: ir.Graph, region: LinearRegion) -> list[ir.Node]:
    """The nodes of a region, in the graph's order."""
    names = {step.name for step in region.steps}
    return [node for node in graph if any(value.name in names for value in node.outputs)]


def attributes_of(conv: AffineConv) -> dict[str, Any]:
    """The attributes of the Conv or ConvTranspose node."""
    before, after = zip(*conv.padding, strict=True)
    attributes: dict[str, Any] = {
        "kernel_shape": list(conv.size),
        "strides": list(conv.stride),
        "dilations": list(conv.dilation),
        "group": conv.groups,
        "pads": [*before, *(max(side, 0) for side in after)],
    }
    if conv.transposed:
        attributes["output_padding"] = [max(-side, 0) for side in after]
    return attributes


def weights_of(conv: AffineConv) -> tuple[Any, Any]:
    """Kernel, in the node's layout, and bias, both in float64; None for a bias of zeros."""
    kernel = conv.kernel
    if conv.transposed:
        blocks = kernel.reshape(conv.groups, -1, *kernel.shape[1:]).swapaxes(1, 2)
        kernel = blocks.reshape(-1, *blocks.shape[2:])
    return np.ascontiguousarray(kernel), conv.bias if conv.bias.any() else None


def _merge(graph: ir.Graph, region: LinearRegion) -> str:
    nodes = region_nodes(graph, region)
    last, (old,) = nodes[-1], nodes[-1].outputs
    values = {value.name: value for node in nodes for value in node.inputs if value is not None}
    name = f"{old.name}.merged"
    kernel, bias = weights_of(region.conv)
    dtype = _dtype(nodes)
    inputs = [values[region.entry]]
    for part, array in (("weight", kernel), ("bias", bias)):
        if array is not None:
            inputs.append(_initializer(graph, f"{name}.{part}", array.astype(dtype.numpy())))
    attributes = ir.convenience.convert_attributes(attributes_of(region.conv))
    merged = ir.Node("", "ConvTranspose" if region.conv.transposed else "Conv", inputs, attributes, name=name)
    (new,) = merged.outputs
    new.name, new.shape, new.type = old.name, old.shape, old.type
    old.name = f"{name}.replaced"
    graph.insert_after(last, merged)
    ir.convenience.replace_all_uses_with(old, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
    weights = [value for node in nodes for value in node.inputs if value is not None]
    graph.remove(reversed(nodes), safe=True)
    for value in weights:
        if value.is_initializer() and not value.uses() and not value.is_graph_input() and value.name:
            graph.initializers.pop(value.name, None)
    return name


def _initializer(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _dtype(nodes: Sequence[ir.Node]) -> ir.DataType:
    """That of the region's first convolution's kernel."""
    kernels = [node.inputs[1] for node in nodes if node.op_type in ("Conv", "ConvTranspose")]
    tensor = next((ir.convenience.get_const_tensor(value) for value in kernels if value is not None), None)
    return ir.DataType.FLOAT if tensor is None else tensor.dtype
