"""An ONNX model evaluated in float64, node by node, by onnx's own reference implementations and `operators`.

Every float is a float64 here: values and casts to a narrower type stay wide, as in the reference run. Attributes are
float32 in every ONNX file; they stand for the simplest number that rounds to them (1e-5, 1/6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from doconv_convert.check.outputs.compare import Array
from doconv_convert.check.twin.operators import OPERATORS
from doconv_convert.errors import DoconvError

Run = Callable[[Sequence[Any]], list[Any]]
Visit = Callable[[int, Sequence[Any], Run], None]
# How onnx's reference computes operators that are of no use here: GridSample's coordinates are float32 inside.
UNFIT = {"GridSample": "in float32", "DeformConv": "one number at a time", "RoiAlign": "one number at a time"}
_NARROW = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def evaluate(model: ModelProto, inputs: Sequence[Array], visit: Visit | None = None) -> list[Array]:
    """The outputs of `model`, whose floats are all float64 (`widened`), on `inputs`. `visit` is called for each
    node of the graph with its index, its inputs and what runs it on others. Values are dropped after their last use.

    Raises DoconvError for an operator, or a form of one, that there is no implementation of.
    """
    try:
        evaluator = ReferenceEvaluator(model, new_ops=OPERATORS)
    except Exception as error:  # onnx's reference has no class for its own errors
        raise DoconvError(f"onnx's reference evaluator has no implementation of it ({_said(error)})") from error
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    names = [value.name for value in graph.input if value.name not in weights]
    values: dict[str, Any] = {"": None, **evaluator.rt_inits_}
    values.update((name, _wide(array)) for name, array in zip(names, inputs, strict=True))
    last = _last_uses(graph)
    for index, (node, runs) in enumerate(zip(graph.node, evaluator.rt_nodes_, strict=True)):
        given = [values[name] for name in node.input]
        _restore_attributes(node, runs)
        run = partial(_run, node, runs, values)
        values.update(zip(node.output, run(given), strict=False))
        if visit is not None:
            visit(index, given, run)
        for name in last[index]:
            del values[name]
    return [np.asarray(values[value.name]) for value in graph.output]


def _not_evaluated(node: NodeProto, how: str) -> DoconvError:
    return DoconvError(f"onnx's reference evaluator computes the node '{node.name}' ({node.op_type}) {how}")


def _run(node: NodeProto, runs: Any, context: Mapping[str, Any], inputs: Sequence[Any]) -> list[Any]:
    if node.op_type in UNFIT:
        raise _not_evaluated(node, UNFIT[node.op_type])
    try:
        with np.errstate(all="ignore"):
            made = runs.run(*inputs, context=context) if runs.need_context() else runs.run(*inputs)
    except Exception as error:
        raise DoconvError(
            f"onnx's reference evaluator cannot run the node '{node.name}' ({node.op_type}): {_said(error)}"
        ) from error
    if any(map(_is_narrow, made)) and not any(map(_is_narrow, inputs)):
        raise _not_evaluated(node, "in float32")
    return [_wide(value) for value in made]


def widened(model: ModelProto) -> ModelProto:
    """The model itself, its float tensors made float64, and its nodes to make no narrower ones."""
    for node in all_nodes(model.graph):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            elif attribute.name in ("to", "dtype", "output_dtype") and attribute.i in _NARROW:
                attribute.i = TensorProto.DOUBLE
    for graph in all_graphs(model.graph):
        for tensor in graph.initializer:
            _widen_tensor(tensor)
        del graph.value_info[:]
    return model


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in _NARROW:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def _is_narrow(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "fV" and value.dtype != np.float64


def _wide(value: Any) -> Any:
    return value.astype(np.float64) if _is_narrow(value) else value


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and its nodes' subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from all_graphs(attribute.g)


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for part in all_graphs(graph):
        yield from part.node


def _last_uses(graph: GraphProto) -> list[list[str]]:
    """Per node the values that nothing after it reads; a value that a subgraph reads is kept to the end."""
    inner = {name for part in all_graphs(graph) if part is not graph for node in part.node for name in node.input}
    inner |= {value.name for part in all_graphs(graph) if part is not graph for value in part.output}
    last: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        last.update((name, index) for name in (*node.input, *node.output) if name)
    kept = inner | {value.name for value in graph.output}
    ending: list[list[str]] = [[] for _ in graph.node]
    for name, index in last.items():
        if name not in kept:
            ending[index].append(name)
    return ending


def _restore_attributes(node: NodeProto, runs: Any) -> None:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.FLOAT and hasattr(runs, attribute.name):
            setattr(runs, attribute.name, meant(attribute.f))


def meant(value: float) -> float:
    """The simplest number that a float32 attribute may have been: a short decimal, or a fraction, that rounds to it."""
    narrow = np.float32(value)
    if not np.isfinite(narrow):
        return float(value)
    short = float(str(narrow))
    fraction = float(Fraction(value).limit_denominator(1000))
    digits = len(str(narrow).strip("-0.").replace(".", "").partition("e")[0])
    return fraction if digits > 6 and np.float32(fraction) == narrow else short


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
