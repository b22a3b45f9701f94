"""One walk over an ONNX graph, which learns its values' types and counts its products.

A node's output types come from ONNX's own shape inference on that node alone (ort_operators knows onnxruntime's own
operators); small constants, the arithmetic with which exporters compute sizes, are evaluated on the way. Weights
stay unread.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from doconv_convert.check.macs.constants import evaluate
from doconv_convert.check.macs.ort_operators import CONTRIB
from doconv_convert.check.macs.result import MacCount, NodeMacs, merged, repeated
from doconv_convert.check.macs.rules import NOT_COUNTED, OUTPUT, RULES, Shape, ShapeOf, attribute, equation, unknown
from doconv_convert.check.macs.scope import SMALL, Scope, bound_type
from doconv_convert.check.macs.subgraphs import count_if, count_loop, count_scan, label
from doconv_convert.check.macs.work import CannotCountError, Work
from doconv_convert.check.onnx_files.model import CARRIERS, in_runtime_domain
from doconv_convert.words import clipped

_CONTROL = {"If": count_if, "Loop": count_loop, "Scan": count_scan}
# what a shape that is unknown raises, or an attribute that is missing or of another kind
_UNKNOWN = (LookupError, ArithmeticError, AttributeError, ValueError, TypeError)
_Called: TypeAlias = tuple[MacCount, Scope]


@dataclass(frozen=True)
class Walk:
    """One pass over a graph in its order; `sizes` are those of the dynamic dimensions, `open_inputs` the inputs whose
    default value a caller may replace."""

    opsets: Sequence[onnx.OperatorSetIdProto]
    functions: Mapping[tuple[str, str, str], onnx.FunctionProto]
    sizes: Mapping[str, int]
    open_inputs: frozenset[str] = frozenset()
    work: Work = field(default_factory=Work)
    called: dict[tuple[Any, ...], _Called] = field(default_factory=dict)

    @classmethod
    def of(cls, model: onnx.ModelProto, sizes: Mapping[str, int], open_inputs: Iterable[str] = ()) -> "Walk":
        functions = {(one.domain, one.name, one.overload): one for one in model.functions}
        # what onnxruntime has an operator of its own for, it never looks up among the file's functions
        looked_up = {key: one for key, one in functions.items() if not in_runtime_domain(key[0])}
        return cls(list(model.opset_import), looked_up, sizes, frozenset(open_inputs))

    def graph(self, graph: onnx.GraphProto, scope: Scope) -> MacCount:
        bound = {value.name for value in graph.input}
        for tensor in graph.initializer:
            if tensor.name not in bound or tensor.name not in self.open_inputs:
                scope.add_tensor(tensor.name, tensor)
        for sparse in graph.sparse_initializer:
            if sparse.values.name not in bound or sparse.values.name not in self.open_inputs:
                scope.add_sparse(sparse.values.name, sparse)
        return self.nodes(graph.node, [*graph.value_info, *graph.output], scope)

    def nodes(self, nodes: Iterable[onnx.NodeProto], values: Iterable[onnx.ValueInfoProto], scope: Scope) -> MacCount:
        declared = {value.name: bound_type(value, self.sizes) for value in values}
        counts = []
        for node in nodes:
            self.work.visit()
            counts.append(self.node(node, scope))
            for name in node.output:
                # what the file states only fills gaps: it can be stale where its inputs have been resized
                if name in declared and scope.size(name) is None:
                    scope.types[name] = declared[name]
                    if scope.size(name) is not None:
                        scope.claims.setdefault(name, clipped(name))
        return merged(counts)

    def node(self, node: onnx.NodeProto, scope: Scope) -> MacCount:
        op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        function = self.functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            return self.call(node, function, scope)
        if op == "Constant":
            scope.add_constant(node)
            return MacCount()
        if op in _CONTROL:
            return self.work.keep(_CONTROL[op](self.graph, node, scope))
        claim = scope.claim(node.input)
        if claim is not None:
            scope.claims.update((name, claim) for name in node.output if name)
        self.learn(node, op, scope)
        return self.product(node, op, scope, claim)

    def learn(self, node: onnx.NodeProto, op: str, scope: Scope) -> None:
        """What follows for a node's outputs: their types, and of weights that are handed on their number."""
        contrib = CONTRIB.get(op)
        with suppress(*_UNKNOWN):
            if contrib is None:
                self.infer(node, scope)
            else:
                for name, known in zip(node.output, contrib.outputs(node, shapes(node, scope)), strict=False):
                    scope.set_shape(name, known, node.input[contrib.like])
        if op in CARRIERS and node.input[0] in scope.weights:
            scope.weights[node.output[0]] = scope.weights[node.input[0]]
        if op == "ConstantOfShape" and (known := scope.shape(node.output[0])) is not None:
            scope.weights[node.output[0]] = prod(known)  # how onnx's light models stand in for weights

    def product(self, node: onnx.NodeProto, op: str, scope: Scope, claim: str | None) -> MacCount:
        contrib = CONTRIB.get(op)
        counted = RULES.get(op) if contrib is None else contrib.macs
        if op in NOT_COUNTED or (contrib is not None and counted is None):
            return MacCount()
        if op == "Einsum" and len(node.input) == 1:
            return MacCount()
        rule, positions = counted or (unknown, ())
        try:
            macs = rule(node, shapes(node, scope))
            if macs < 0:
                raise ArithmeticError
        except _UNKNOWN:
            return MacCount((), {clipped(op): 1})
        parameters = sum(scope.weights.get(node.input[i], 0) for i in positions if i < len(node.input))
        if contrib is not None and contrib.packed:
            parameters += contrib.packed(node)
        made = NodeMacs(label(node), op, clipped(node.output[0]), macs, parameters)
        return self.work.keep(MacCount((made,), claimed=() if claim is None else (claim,)))

    def infer(self, node: onnx.NodeProto, scope: Scope) -> None:
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
        if node.op_type == "Einsum":
            equation(node)
        scope.types.update(_inferred(model))
        if node.op_type in ("Shape", "Size") and (shape := scope.shape(node.input[0])) is not None:
            cut = slice(attribute(node, "start", 0), attribute(node, "end", None))
            value = prod(shape) if node.op_type == "Size" else shape[cut]
            scope.constants[node.output[0]] = np.array(value, np.int64)
            return
        if len(outputs) != 1 or len(constants) != len(set(names)):
            return
        shape = scope.shape(outputs[0])
        if shape is not None and prod(shape) <= SMALL and (found := evaluate(node, constants, shape)) is not None:
            scope.constants[outputs[0]] = found

    def call(self, node: onnx.NodeProto, function: onnx.FunctionProto, scope: Scope) -> MacCount:
        """A function's body knows its arguments only, and has opsets of its own. The same call is counted once."""
        inner = Scope(folder=scope.folder)
        for formal, actual in zip(function.input, node.input, strict=False):
            inner.take(formal, scope, actual)
        given = {one.name: one for one in (*function.attribute_proto, *node.attribute)}
        key = (node.domain, node.op_type, node.overload, *_facts(inner, function.input), *_bytes(given))
        found = self.called.get(key)
        if found is None:
            found = self.called[key] = self._body(node, function, inner, given), inner
        count, known = found
        for formal, actual in zip(function.output, node.output, strict=False):
            scope.take(actual, known, formal)
        return self.work.keep(repeated(count, label(node), 1))

    def _body(
        self,
        node: onnx.NodeProto,
        function: onnx.FunctionProto,
        inner: Scope,
        given: Mapping[str, onnx.AttributeProto],
    ) -> MacCount:
        name = (node.domain, node.op_type, node.overload)
        if name in self.work.active:
            raise CannotCountError(f"the function '{node.op_type}' calls itself")
        self.work.active.append(name)
        try:
            body = replace(self, opsets=list(function.opset_import))
            return body.nodes([_with_attributes(one, given) for one in function.node], function.value_info, inner)
        finally:
            self.work.active.pop()


def _inferred(model: onnx.ModelProto) -> Iterable[tuple[str, onnx.TypeProto]]:
    """The types of a one-node model's outputs; none for an operator that onnx does not know, attributes that do not
    fit, types that contradict each other: its native code throws many kinds of errors."""
    try:
        inferred = shape_inference.infer_shapes(model)
    except (RecursionError, MemoryError):
        raise
    except Exception:
        return ()
    return [(value.name, value.type) for value in inferred.graph.output]


def shapes(node: onnx.NodeProto, scope: Scope) -> ShapeOf:
    """The shapes of the node's inputs by index, and of its first output. They raise LookupError where unknown."""

    def shape(index: int) -> Shape:
        known = scope.shape(node.output[0] if index == OUTPUT else node.input[index])
        if known is None:
            raise LookupError
        return known

    return shape


def _facts(scope: Scope, names: Iterable[str]) -> Iterable[object]:
    """All that is known of these values, to be compared."""
    for name in names:
        constant = scope.constants.get(name)
        value = None if constant is None else (constant.dtype.str, constant.shape, constant.tobytes())
        kind = scope.types.get(name)
        yield name, kind and kind.SerializeToString(deterministic=True), value
        yield scope.weights.get(name), scope.claims.get(name)


def _bytes(given: Mapping[str, onnx.AttributeProto]) -> Iterable[bytes]:
    return (one.SerializeToString(deterministic=True) for one in given.values())


def _with_attributes(node: onnx.NodeProto, given: Mapping[str, onnx.AttributeProto]) -> onnx.NodeProto:
    """A node of a function's body whose attributes that refer to the function's have the values of its call."""
    if not any(one.ref_attr_name or one.HasField("g") for one in node.attribute):
        return node
    made = onnx.NodeProto()
    made.CopyFrom(node)
    del made.attribute[:]
    for one in node.attribute:
        value = given.get(one.ref_attr_name) if one.ref_attr_name else one
        if value is None:  # left out by the call
            continue
        copy = made.attribute.add()
        copy.CopyFrom(value)
        copy.name = one.name
        if copy.HasField("g"):
            nodes = [_with_attributes(inner, given) for inner in copy.g.node]
            del copy.g.node[:]
            copy.g.node.extend(nodes)
    return made
