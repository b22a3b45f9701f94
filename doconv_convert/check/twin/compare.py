"""The twin's graph against the shipped file's: the same nodes, attributes and wiring, and each float32 initializer the
twin's float64 one, rounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, TensorProto, TypeProto, numpy_helper

from doconv_convert.check.onnx_files.graph_diff import compare_graphs
from doconv_convert.check.onnx_files.model import read_model
from doconv_convert.check.onnx_files.tensors import differing
from doconv_convert.check.outputs.compare import Array
from doconv_convert.check.twin.evaluate import all_graphs, all_nodes

# What the exporter computes itself (a batch norm merged into a convolution) it computes in float32: three roundings.
# Its kernels and biases were off by up to 1.4e-7 of their largest value.
COMPUTED = 4 * 2.0**-23
_FLOAT32, _FLOAT64 = np.finfo(np.float32), np.finfo(np.float64)
# Limits of the dtype itself: an attention mask's least number, a division's guard.
_LIMITS = [(getattr(_FLOAT64, name), getattr(_FLOAT32, name)) for name in ("min", "max", "eps", "tiny")]


@dataclass
class Rounding:
    """Float initializers' elements: how many there are, how many are the twin's correctly rounded, and how far the
    others are from that, relative to the largest of their tensor."""

    elements: int = 0
    exact: int = 0
    worst: float = 0.0
    tensors: int = field(default=0)  # with an element that is not exact


def compare_twin(twin: Path, candidate: Path) -> tuple[tuple[str, ...], Rounding]:
    """What differs between the two graphs, beyond float64 and rounding, and how the initializers are rounded."""
    rounding = Rounding()

    def compare(exact: Array, shipped: Array) -> Iterator[str]:
        if exact.dtype != np.float32 or not exact.size:
            yield from differing(exact, shipped)
            return
        distance = _distance(exact, shipped)
        rounding.elements += exact.size
        rounding.exact += int((distance == 0).sum())
        worst = float(distance.max())
        rounding.tensors += worst > 0
        rounding.worst = max(rounding.worst, worst)
        if not worst <= COMPUTED:
            yield f"is off by {worst:.1e} of its largest value from the float64 one"

    # limits of a dtype overflow where they are narrowed
    with np.errstate(over="ignore"):
        expected = _narrowed(onnx.load(twin))
        shipped = read_model(candidate)
        got = _narrowed(shipped) if _holds_doubles(shipped) else candidate
        return compare_graphs(expected, got, values=compare).differences, rounding


def _distance(exact: Array, shipped: Array) -> Array:
    """Per element, relative to the largest: zero where the bits are equal or both are the same limit of their dtype."""
    same = (exact == shipped) | (np.isnan(exact) & np.isnan(shipped))
    if exact.size == 1:
        pair = float(exact[0]), float(shipped[0])
        same |= any(pair == (float(np.float32(wide)), float(narrow)) for wide, narrow in _LIMITS)
    distance = np.zeros(exact.shape)
    scale = float(np.abs(shipped).max()) or 1.0
    distance[~same] = np.abs(exact[~same].astype(np.float64) - shipped[~same]) / scale
    return distance


def _holds_doubles(model: ModelProto) -> bool:
    tensors = (tensor for graph in all_graphs(model.graph) for tensor in graph.initializer)
    return any(tensor.data_type == TensorProto.DOUBLE for tensor in tensors)


def _narrowed(model: ModelProto) -> ModelProto:
    """The model itself, which says float32 wherever it said float64 then, its tensors rounded."""
    for graph in all_graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.value_info):
            _narrow_type(value.type)
        for tensor in graph.initializer:
            _narrow_tensor(tensor)
    for node in all_nodes(model.graph):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _narrow_tensor(attribute.t)
            elif attribute.name in ("to", "dtype", "output_dtype") and attribute.i == TensorProto.DOUBLE:
                attribute.i = TensorProto.FLOAT
    return model


def _narrow_type(value: TypeProto) -> None:
    if value.tensor_type.elem_type == TensorProto.DOUBLE:
        value.tensor_type.elem_type = TensorProto.FLOAT


def _narrow_tensor(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.DOUBLE:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
