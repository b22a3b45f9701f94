"""A copy of an ONNX graph with some operators in float64, which tells the runtime's rounding from a fault.

onnxruntime adds up a float32 sum one number after the other, and its float32 Sigmoid is a rough approximation. Weights
and convolutions stay float32: what is wrong with them is as wrong in the copy. Where there is a float64 twin, it tells
which operators those are (`twin/runtime.py`); LOOSE are those known. Importing this needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

# How far off onnxruntime 1.23 is in float32 (torch in brackets). Of 300 x 300 normal values of mean 0.5, relative:
# ReduceMean and ReduceSum 5e-7 (6e-8), ReduceSumSquare 1e-5 (5e-8), ReduceL2 7e-6 (4e-7), ReduceLogSumExp 3e-7 (4e-8);
# Sigmoid up to 3e-4 of a single value (1e-7). GlobalAveragePool (1e-6) would belong here, but has no float64 kernel.
LOOSE = frozenset({"ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Sigmoid"})
# The first with CastLike, by which a value returns to a dtype that need not be known.
_FIRST_OPSET = 15


def in_float64(model: ModelProto, operators: Collection[str] = LOOSE) -> ModelProto:
    """A copy with these operators in float64, those of subgraphs too; before opset 15 as it was."""
    copy = ModelProto()
    copy.CopyFrom(model)
    opset = max((item.version for item in model.opset_import if item.domain in ("", "ai.onnx")), default=0)
    if opset >= _FIRST_OPSET:
        _widen(copy.graph, operators)
    return copy


def _widen(graph: GraphProto, operators: Collection[str]) -> None:
    nodes = [one for node in graph.node for one in _widened(node, operators)]
    del graph.node[:]
    graph.node.extend(nodes)


def _widened(node: NodeProto, operators: Collection[str]) -> Iterator[NodeProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            _widen(attribute.g, operators)
    if node.op_type not in operators or node.domain not in ("", "ai.onnx"):
        yield node
        return
    value, result = node.input[0], node.output[0]
    wide, narrow = f"{result}.float64", f"{result}.result"
    yield helper.make_node("Cast", [value], [wide], to=TensorProto.DOUBLE)
    node.input[0], node.output[0] = wide, narrow
    yield node
    yield helper.make_node("CastLike", [narrow, value], [result])
