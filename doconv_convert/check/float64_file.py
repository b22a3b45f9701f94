"""An ONNX file in float64, evaluated by onnx's own reference implementations. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from doconv_convert.check.outputs.compare import Array
from doconv_convert.errors import DoconvError
from doconv_convert.rewrite.linear.affine import AffineConv

_NARROW = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


class Conv(OpRun):
    """In place of onnx's own, which takes minutes on a network. Pads by auto_pad are left to onnx's."""

    def _run(
        self,
        x: Array,
        w: Array,
        b: Array | None = None,
        auto_pad: str | None = None,
        dilations: Sequence[int] | None = None,
        group: int | None = None,
        kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        if auto_pad not in (None, "NOTSET", "VALID"):
            raise NotImplementedError(f"auto_pad {auto_pad}")
        rank = w.ndim - 2
        ones, sides = (1,) * rank, tuple(pads or (0,) * (2 * rank))
        padding = tuple(zip(sides[:rank], sides[rank:], strict=True))
        bias = np.zeros(w.shape[0]) if b is None else b
        return (AffineConv(w, bias, tuple(strides or ones), padding, tuple(dilations or ones), group or 1)(x),)


def widened(model: ModelProto) -> ModelProto:
    """A copy whose floats are all float64."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for graph in _graphs(copy.graph):
        del graph.value_info[:]
        for tensor in graph.initializer:
            _widen(tensor)
        for value in (*graph.input, *graph.output):
            _widen_type(value)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.TENSOR:
                    _widen(attribute.t)
                elif attribute.name in _DTYPE_ATTRIBUTES and attribute.i in _NARROW:
                    attribute.i = TensorProto.DOUBLE
    return copy


def evaluate(model: ModelProto, inputs: Sequence[Array]) -> list[Array]:
    """The outputs of a `widened` model. Raises DoconvError for what onnx's evaluator does not run."""
    known = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in known]
    feeds = {
        name: array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array
        for name, array in zip(names, inputs, strict=True)
    }
    try:
        with np.errstate(all="ignore"):
            values: Any = ReferenceEvaluator(model, new_ops=[Conv]).run(None, feeds)
    except Exception as error:  # onnx's reference has no class for its own errors
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DoconvError(f"onnx's reference evaluator does not run this model in float64 ({said})") from error
    return [np.asarray(value) for value in values]


def part_of(model: ModelProto, outputs: set[str], entry: str, result: str) -> ModelProto:
    """The nodes that make the values `outputs`, as a model from the value `entry` to `result`."""
    graph = model.graph
    inside = [node for node in graph.node if outputs & set(node.output)]
    read = {name for node in inside for name in node.input}
    constants = [node for node in graph.node if node.op_type == "Constant" and read & set(node.output)]
    part = ModelProto()
    part.ir_version = model.ir_version
    part.opset_import.extend(model.opset_import)
    part.graph.name = "region"
    part.graph.node.extend([*constants, *inside])
    part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    for values, name in ((part.graph.input, entry), (part.graph.output, result)):
        value = values.add()
        value.name = name
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return part


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    nodes: Sequence[NodeProto] = graph.node
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type in _NARROW:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def _widen_type(value: ValueInfoProto) -> None:
    if value.type.tensor_type.elem_type in _NARROW:
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
