"""How many multiply-accumulates (MACs) an ONNX graph performs, as exact integers; one MAC is two FLOPs.

The convention is that of torch.utils.flop_counter: convolutions and matrix products count, without their
biases. What works element by element, reduces, normalises, pools or resizes does not: `NOT_COUNTED` lists those
operators. Every other operator, and a product whose shape is not known before the graph runs, is reported as
uncounted: nothing is silently zero. Recurrent layers count at the full sequence length, attention its two
products without a discount for masks, an If its costlier branch where its condition is not a constant.

The graph is walked once. A node's output types come from ONNX's own shape inference on that node alone; small
constants (the arithmetic with which exporters compute sizes) are evaluated on the way. Weights stay unread.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, TypeProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from doconv_convert.check.mac_rules import NOT_COUNTED, OUTPUT, RANDOM, RULES, Shape, unknown
from doconv_convert.check.onnx_model import CARRIERS, ModelSource, read_model
from doconv_convert.errors import DoconvError

_SMALL = 1024
"""Constants of up to this many elements are evaluated; shapes, scales and sizes are far smaller."""


@dataclass(frozen=True)
class NodeMacs:
    """One multiplying node: its MACs, and the elements of the weight and bias initializers it reads.

    `name` is the node's own, or its first output where it has none; in a subgraph it follows the names of the
    nodes around it.
    """

    name: str
    op: str
    output: str
    macs: int
    parameters: int


@dataclass(frozen=True)
class MacCount:
    """The multiplying nodes in the graph's order, and the number of nodes left uncounted, by operator."""

    nodes: tuple[NodeMacs, ...] = ()
    uncounted: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The MACs of all counted nodes; complete only if `uncounted` is empty."""
        return sum(node.macs for node in self.nodes)


def count_macs(model: ModelSource, dims: Mapping[str, int] | None = None) -> MacCount:
    """Count the MACs of one run of an ONNX model (a path or a ModelProto).

    `dims` gives sizes to dynamic dimensions by name (`input[axis]` for one that has no name). A dimension 0 that
    is not given is a batch of 1. Raises DoconvError if another one is not given, if `dims` names a dimension
    that the model does not have or gives less than 1, or if the file is not a valid ONNX model.
    """
    proto = read_model(model)
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    sizes = _sizes(inputs, dims or {})
    scope = _Scope(types={value.name: _bound(value, sizes) for value in inputs})
    try:
        return _Walk(list(proto.opset_import), sizes).graph(proto.graph, scope)
    except LookupError as error:
        raise DoconvError("a node lacks an input or attribute: see what onnx.checker says of the model") from error


def format_macs(macs: int) -> str:
    """'1.814 GMACs', '312.4 MMACs', '123 MACs': four digits, and always the unit (FLOPs are 2 x MACs)."""
    for prefix, unit in (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if macs * 100_000 >= unit * 99_995:  # what rounds to 1.000 of a unit is written in it
            return f"{macs / unit:#.4g} {prefix}MACs"
    return f"{macs} MACs"


def compare_counts(a: MacCount, b: MacCount) -> list[str]:
    """A sentence for every difference in MACs, `a` being what was expected; nodes are compared by position.

    Parameters are not compared: an exporter drops a bias that happens to be zero.
    """
    found = []
    if a.total != b.total:
        found.append(f"total: expected {_exact(a.total)} got {_exact(b.total)}")
    if len(a.nodes) != len(b.nodes):
        found.append(f"multiplying nodes: expected {len(a.nodes)} got {len(b.nodes)}")
    for index, (x, y) in enumerate(zip(a.nodes, b.nodes, strict=False)):
        if (x.op, x.macs) != (y.op, y.macs):
            expected, got = (f"{n.op} '{n.name}', {_exact(n.macs)}" for n in (x, y))
            found.append(f"multiplying node {index}: expected {expected}; got {got}")
    for op in sorted(a.uncounted.keys() | b.uncounted.keys()):
        expected_nodes, got_nodes = a.uncounted.get(op, 0), b.uncounted.get(op, 0)
        if expected_nodes != got_nodes:
            found.append(f"uncounted {op} nodes: expected {expected_nodes} got {got_nodes}")
    return found


def _exact(macs: int) -> str:
    return f"{format_macs(macs)} ({macs:,})"


def _sizes(inputs: Sequence[onnx.ValueInfoProto], dims: Mapping[str, int]) -> dict[str, int]:
    """A size for every dynamic dimension of the graph's inputs."""
    names = [
        (dim.dim_param or f"{value.name}[{axis}]", axis, value.name)
        for value in inputs
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        if dim.dim_value < 1
    ]
    known = sorted({name for name, _, _ in names})
    for name, size in dims.items():
        if name not in known:
            raise DoconvError(f"no dynamic dimension is named '{name}': the model has {known or 'none'}")
        if size < 1:
            raise DoconvError(f"dimension '{name}' must be at least 1, got {size}")
    sizes = {name: 1 for name, axis, _ in names if axis == 0} | dict(dims)
    for name, axis, value in names:
        if name not in sizes:
            raise DoconvError(
                f"dimension {axis} of input '{value}' is dynamic: give its size, as in --dim '{name}=224'"
            )
    return sizes


def _bound(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> TypeProto:
    """The value's type with the named dimensions replaced by their sizes."""
    bound = TypeProto()
    bound.CopyFrom(value.type)
    for axis, dim in enumerate(bound.tensor_type.shape.dim if bound.HasField("tensor_type") else ()):
        name = dim.dim_param or f"{value.name}[{axis}]"
        if dim.dim_value < 1 and name in sizes:
            dim.dim_value = sizes[name]
    return bound


@dataclass
class _Scope:
    """What is known of values by name: types, the elements of small constants, the number of weights."""

    types: dict[str, TypeProto] = field(default_factory=dict)
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    def inner(self) -> "_Scope":
        return _Scope(dict(self.types), dict(self.constants), dict(self.weights))

    def shape(self, name: str) -> Shape | None:
        kind = self.types.get(name, TypeProto()).tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
        return tuple(dims) if kind.HasField("shape") and min(dims, default=0) >= 0 else None

    def add_tensor(self, name: str, tensor: TensorProto) -> None:
        self.types[name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        self.weights[name] = prod(tensor.dims)
        if prod(tensor.dims) <= _SMALL and tensor.data_location != TensorProto.EXTERNAL:
            with suppress(ValueError):  # broken data: the type may still be all that is needed
                self.constants[name] = numpy_helper.to_array(tensor)

    def constant(self, name: str) -> Any:
        """The value of a constant of one element, else None."""
        value = self.constants.get(name)
        return value.item() if value is not None and value.size == 1 else None


@dataclass(frozen=True)
class _Walk:
    """One pass over a graph in its order, which learns the values' types and counts the products."""

    opsets: Sequence[onnx.OperatorSetIdProto]
    sizes: Mapping[str, int]

    def graph(self, graph: onnx.GraphProto, scope: _Scope) -> MacCount:
        declared = {value.name: _bound(value, self.sizes) for value in [*graph.value_info, *graph.output]}
        for tensor in graph.initializer:
            scope.add_tensor(tensor.name, tensor)
        counts = []
        for node in graph.node:
            counts.append(self.node(node, scope))
            for name in node.output:
                # what the file states only fills gaps: it can be stale where its inputs have been resized
                if scope.shape(name) is None and name in declared:
                    scope.types[name] = declared[name]
        return _merged(counts)

    def node(self, node: onnx.NodeProto, scope: _Scope) -> MacCount:
        standard = node.domain in ("", "ai.onnx")
        op = node.op_type if standard else f"{node.domain}.{node.op_type}"
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if op == "Constant" and "value" in attributes:
            scope.add_tensor(node.output[0], attributes["value"].t)
            return MacCount()
        if op == "If":
            return self.branch(node, {name: attribute.g for name, attribute in attributes.items()}, scope)
        if op == "Loop":
            return self.loop(node, attributes["body"].g, scope)
        self.infer(node, scope)
        if op in CARRIERS and node.input[0] in scope.weights:
            scope.weights[node.output[0]] = scope.weights[node.input[0]]
        if op in NOT_COUNTED or (op == "Einsum" and len(node.input) == 1):
            return MacCount()
        rule, positions = RULES.get(op, (unknown, ()))

        def shape(index: int) -> Shape:
            known = scope.shape(node.output[0] if index == OUTPUT else node.input[index])
            if known is None:
                raise LookupError
            return known

        try:
            macs = rule(node, shape)
        except (LookupError, ArithmeticError, ValueError):  # a shape is unknown or does not fit the operator
            return MacCount((), {op: 1})
        parameters = sum(scope.weights.get(node.input[i], 0) for i in positions if i < len(node.input))
        return MacCount((NodeMacs(_label(node), op, node.output[0], macs, parameters),))

    def infer(self, node: onnx.NodeProto, scope: _Scope) -> None:
        """Learn the types of a node's outputs, and their values if they are few and constant."""
        names = [name for name in node.input if name]
        constants = {name: scope.constants[name] for name in names if name in scope.constants}
        typed = [name for name in dict.fromkeys(names) if name in scope.types and name not in constants]
        outputs = [name for name in node.output if name]
        graph = helper.make_graph(
            [node],
            "node",
            [onnx.ValueInfoProto(name=name, type=scope.types[name]) for name in typed],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=self.opsets)
        with suppress(shape_inference.InferenceError):  # raised for an operator that onnx does not know
            inferred = shape_inference.infer_shapes(model, data_prop=True)
            scope.types.update((value.name, value.type) for value in inferred.graph.output)
        feeds: dict[str, np.ndarray[Any, Any]] = {}
        if node.op_type in ("Shape", "Size") and (shape := scope.shape(node.input[0])) is not None:
            feeds = {name: np.broadcast_to(np.float32(0), shape) for name in typed}
        shapes = [scope.shape(name) for name in outputs]
        foldable = node.op_type in NOT_COUNTED - RANDOM and len(constants) + len(feeds) == len(set(names))
        if foldable and all(shape is not None and prod(shape) <= _SMALL for shape in shapes):
            self.evaluate(model, feeds, scope)

    def evaluate(self, model: onnx.ModelProto, feeds: dict[str, np.ndarray[Any, Any]], scope: _Scope) -> None:
        try:
            with np.errstate(all="ignore"):
                results = ReferenceEvaluator(model).run(None, feeds)
        except Exception:  # any failure inside onnx's evaluator only means that the value stays unknown
            return
        for output, result in zip(model.graph.output, results, strict=True):
            if isinstance(result, np.ndarray | np.generic):
                scope.constants[output.name] = np.asarray(result)

    def branch(self, node: onnx.NodeProto, branches: Mapping[str, onnx.GraphProto], scope: _Scope) -> MacCount:
        condition = scope.constant(node.input[0])
        taken = list(branches) if condition is None else ["then_branch" if condition else "else_branch"]
        scopes = [scope.inner() for _ in taken]
        counts = [self.graph(branches[name], inner) for name, inner in zip(taken, scopes, strict=True)]
        for index, output in enumerate(node.output):
            names = [branches[name].output[index].name for name in taken]
            if len({inner.shape(name) for inner, name in zip(scopes, names, strict=True)}) == 1:
                scope.types[output] = scopes[0].types.get(names[0], TypeProto())
            if len(taken) == 1 and names[0] in scopes[0].constants:
                scope.constants[output] = scopes[0].constants[names[0]]
        costliest = max(range(len(taken)), key=lambda index: counts[index].total)
        nodes = _repeated(counts[costliest], f"{_label(node)}/{taken[costliest]}", 1).nodes
        return MacCount(nodes, _merged(counts).uncounted)

    def loop(self, node: onnx.NodeProto, body: onnx.GraphProto, scope: _Scope) -> MacCount:
        """A loop counts if its number of turns is a constant and what it carries keeps its shape."""
        turns = scope.constant(node.input[0])
        inner = scope.inner()
        inner.types[body.input[0].name] = helper.make_tensor_type_proto(TensorProto.INT64, [])
        if not node.input[1] or scope.constant(node.input[1]):
            inner.constants[body.input[1].name] = np.array(True)
        for value, name in zip(body.input[2:], node.input[2:], strict=True):
            inner.types[value.name] = scope.types.get(name, TypeProto())
        count = self.graph(body, inner)
        carried = list(zip(node.output, body.input[2:], body.output[1:], strict=False))
        stable = all(inner.shape(before.name) == inner.shape(after.name) for _, before, after in carried)
        if stable:
            scope.types.update((output, inner.types[before.name]) for output, before, _ in carried)
            if turns is not None and inner.constant(body.output[0].name):
                return _repeated(count, f"{_label(node)}/body", turns)
        return MacCount((), {"Loop": 1} if count.nodes or count.uncounted else {})


def _label(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _merged(counts: Iterable[MacCount]) -> MacCount:
    nodes: list[NodeMacs] = []
    uncounted: Counter[str] = Counter()
    for count in counts:
        nodes += count.nodes
        uncounted.update(count.uncounted)
    return MacCount(tuple(nodes), dict(uncounted))


def _repeated(count: MacCount, prefix: str, times: int) -> MacCount:
    """The count of a subgraph that runs `times` times, with its nodes named below `prefix`."""
    nodes = (replace(node, name=f"{prefix}/{node.name}", macs=node.macs * times) for node in count.nodes)
    return MacCount(tuple(nodes), count.uncounted)
