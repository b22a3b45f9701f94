"""The names in an ONNX file: text, unless somebody wrote other bytes, which protobuf hands on as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto


def undecodable_name(model: ModelProto) -> bytes | None:
    """The first name of a node, an operator, a value or a dimension in the file that is no UTF-8; None if all are."""
    return next((name for name in _names(model) if isinstance(name, bytes)), None)


def _names(model: ModelProto) -> Iterator[str | bytes]:
    for opset in model.opset_import:
        yield opset.domain
    yield from _graph(model.graph)
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output, *function.attribute)
        yield from _nodes(function.node)


def _graph(graph: GraphProto) -> Iterator[str | bytes]:
    yield from (tensor.name for tensor in graph.initializer)
    yield from (tensor.values.name for tensor in graph.sparse_initializer)
    for values in (graph.input, graph.output, graph.value_info):
        yield from _values(values)
    yield from _nodes(graph.node)


def _values(values: Iterable[ValueInfoProto]) -> Iterator[str | bytes]:
    for value in values:
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)


def _nodes(nodes: Iterable[NodeProto]) -> Iterator[str | bytes]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name
            if attribute.type == AttributeProto.GRAPH:
                yield from _graph(attribute.g)
            for graph in attribute.graphs:
                yield from _graph(graph)
