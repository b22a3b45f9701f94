"""One walk over an ONNX graph, which learns its values' types and counts its products.

A node's output types come from ONNX's own shape inference on that node alone (ort_operators knows onnxruntime's own
operators); small constants, the arithmetic with which exporters compute sizes, are evaluated on the way. Weights
stay unread.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, TypeProto, helper, numpy_helper, shape_inference

from doconv_convert.check.macs.ort_operators import CONTRIB
from doconv_convert.check.macs.result import MacCount, NodeMacs, merged, repeated
from doconv_convert.check.macs.rules import NOT_COUNTED, OUTPUT, RANDOM, RULES, Shape, attribute, unknown
from doconv_convert.check.macs.scope import SMALL, Scope, bound_type
from doconv_convert.check.onnx_files.model import CARRIERS


@dataclass(frozen=True)
class Walk:
    """One pass over a graph in its order; `sizes` are those of the dynamic dimensions."""

    opsets: Sequence[onnx.OperatorSetIdProto]
    functions: Mapping[tuple[str, str, str], onnx.FunctionProto]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, model: onnx.ModelProto, sizes: Mapping[str, int]) -> "Walk":
        functions = {(one.domain, one.name, one.overload): one for one in model.functions}
        return cls(list(model.opset_import), functions, sizes)

    def graph(self, graph: onnx.GraphProto, scope: Scope) -> MacCount:
        for tensor in graph.initializer:
            scope.add_tensor(tensor.name, tensor)
        for sparse in graph.sparse_initializer:
            scope.add_sparse(sparse.values.name, sparse)
        return self.nodes(graph.node, [*graph.value_info, *graph.output], scope)

    def nodes(self, nodes: Iterable[onnx.NodeProto], values: Iterable[onnx.ValueInfoProto], scope: Scope) -> MacCount:
        declared = {value.name: bound_type(value, self.sizes) for value in values}
        counts = []
        for node in nodes:
            counts.append(self.node(node, scope))
            for name in node.output:
                # what the file states only fills gaps: it can be stale where its inputs have been resized
                if scope.shape(name) is None and name in declared:
                    scope.types[name] = declared[name]
        return merged(counts)

    def node(self, node: onnx.NodeProto, scope: Scope) -> MacCount:
        op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        function = self.functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            return self.call(node, function, scope)
        if op == "Constant":
            scope.add_constant(node)
            return MacCount()
        if op in ("If", "Loop", "Scan"):
            return {"If": self.branch, "Loop": self.loop, "Scan": self.scan}[op](node, scope)

        def shape(index: int) -> Shape:
            known = scope.shape(node.output[0] if index == OUTPUT else node.input[index])
            if known is None:
                raise LookupError
            return known

        contrib = CONTRIB.get(op)
        if contrib is None:
            self.infer(node, scope)
        else:
            with suppress(LookupError, ArithmeticError, ValueError):  # an input's shape is unknown
                for name, known in zip(node.output, contrib.outputs(node, shape), strict=False):
                    scope.set_shape(name, known, node.input[contrib.like])
        if op in CARRIERS and node.input[0] in scope.weights:
            scope.weights[node.output[0]] = scope.weights[node.input[0]]
        if op == "ConstantOfShape" and (known := scope.shape(node.output[0])) is not None:
            scope.weights[node.output[0]] = prod(known)  # how onnx's light models stand in for weights
        counted = RULES.get(op) if contrib is None else contrib.macs
        if op in NOT_COUNTED or (contrib is not None and counted is None):
            return MacCount()
        if op == "Einsum" and len(node.input) == 1:
            return MacCount()
        rule, positions = counted or (unknown, ())
        try:
            macs = rule(node, shape)
        except (LookupError, ArithmeticError, ValueError):  # a shape is unknown or does not fit the operator
            return MacCount((), {op: 1})
        parameters = sum(scope.weights.get(node.input[i], 0) for i in positions if i < len(node.input))
        if contrib is not None and contrib.packed:
            parameters += contrib.packed(node)
        return MacCount((NodeMacs(_label(node), op, node.output[0], macs, parameters),))

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
        with suppress(shape_inference.InferenceError):  # raised for an operator that onnx does not know
            inferred = shape_inference.infer_shapes(model, data_prop=True)
            scope.types.update((value.name, value.type) for value in inferred.graph.output)
        if node.op_type in ("Shape", "Size") and (shape := scope.shape(node.input[0])) is not None:
            cut = slice(attribute(node, "start", 0), attribute(node, "end", None))
            value = prod(shape) if node.op_type == "Size" else shape[cut]
            scope.constants[node.output[0]] = np.array(value, np.int64)
            return
        shapes = [scope.shape(name) for name in outputs]
        foldable = node.op_type in NOT_COUNTED - RANDOM and len(constants) == len(set(names))
        if foldable and all(shape is not None and prod(shape) <= SMALL for shape in shapes):
            _evaluate(model, scope)

    def call(self, node: onnx.NodeProto, function: onnx.FunctionProto, scope: Scope) -> MacCount:
        """A function's body knows its arguments only, and has opsets of its own."""
        inner = Scope()
        for formal, actual in zip(function.input, node.input, strict=False):
            inner.take(formal, scope, actual)
        given = {one.name: one for one in (*function.attribute_proto, *node.attribute)}
        body = replace(self, opsets=list(function.opset_import))
        count = body.nodes([_with_attributes(one, given) for one in function.node], function.value_info, inner)
        for formal, actual in zip(function.output, node.output, strict=False):
            scope.take(actual, inner, formal)
        return repeated(count, _label(node), 1)

    def branch(self, node: onnx.NodeProto, scope: Scope) -> MacCount:
        branches: dict[str, onnx.GraphProto] = {one.name: one.g for one in node.attribute}
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
        every = merged(counts)
        count = repeated(counts[costliest], f"{_label(node)}/{taken[costliest]}", 1)
        said = [f"If '{_label(node)}' takes its costlier branch, {taken[costliest]}"]
        differs = len(taken) > 1 and every.nodes
        return MacCount(count.nodes, every.uncounted, (*(said if differs else ()), *every.assumed))

    def loop(self, node: onnx.NodeProto, scope: Scope) -> MacCount:
        """A loop counts if its number of turns is a constant and what it carries keeps its shape."""
        body: onnx.GraphProto = attribute(node, "body")
        turns = scope.constant(node.input[0]) if node.input[0] else None
        inner = scope.inner()
        inner.types[body.input[0].name] = helper.make_tensor_type_proto(TensorProto.INT64, [])
        if len(node.input) < 2 or not node.input[1] or scope.constant(node.input[1]):
            inner.constants[body.input[1].name] = np.array(True)
        for value, name in zip(body.input[2:], node.input[2:], strict=True):
            inner.types[value.name] = scope.types.get(name, TypeProto())
        carried = [(before.name, after.name) for before, after in zip(body.input[2:], body.output[1:], strict=False)]
        count = self.graph(body, inner)
        if not inner.constant(body.output[0].name):  # the body decides when to stop
            turns = None
        return self.turns(node, scope, inner, count, carried, body.output[1 + len(carried) :], turns)

    def scan(self, node: onnx.NodeProto, scope: Scope) -> MacCount:
        """A scan's body runs once for every slice of its scanned inputs."""
        body: onnx.GraphProto = attribute(node, "body")
        if len(body.input) != len(node.input):  # opset 8, which scans a batch of sequences of different lengths
            return MacCount((), {"Scan": 1})
        states = len(node.input) - attribute(node, "num_scan_inputs", 0)
        axes = attribute(node, "scan_input_axes", None) or [0] * (len(node.input) - states)
        inner, turns = scope.inner(), None
        for value, name in zip(body.input[:states], node.input[:states], strict=True):
            inner.types[value.name] = scope.types.get(name, TypeProto())
        for value, name, axis in zip(body.input[states:], node.input[states:], axes, strict=True):
            if shape := scope.shape(name):
                axis %= len(shape)
                turns = shape[axis]
                inner.set_shape(value.name, (*shape[:axis], *shape[axis + 1 :]), name)
        count = self.graph(body, inner)
        carried = [(before.name, after.name) for before, after in zip(body.input[:states], body.output, strict=False)]
        moved = any(attribute(node, "scan_output_axes", None) or ())  # stacked elsewhere: left to the declared shape
        return self.turns(node, scope, inner, count, carried, [] if moved else body.output[states:], turns)

    def turns(
        self,
        node: onnx.NodeProto,
        scope: Scope,
        inner: Scope,
        count: MacCount,
        carried: Sequence[tuple[str, str]],
        stacked: Sequence[onnx.ValueInfoProto],
        turns: int | None,
    ) -> MacCount:
        """The count of `turns` turns (None: not known) of a body. What it carries must keep its shape; `stacked`
        values are collected along a new dimension 0."""
        stable = all(inner.shape(before) == inner.shape(after) for before, after in carried)
        if stable:
            scope.types.update(
                (output, inner.types[before]) for output, (before, _) in zip(node.output, carried, strict=False)
            )
        if stable and turns is not None:
            for output, value in zip(node.output[len(carried) :], stacked, strict=False):
                if (shape := inner.shape(value.name)) is not None:
                    scope.set_shape(output, (turns, *shape), value.name)
            times = f"{node.op_type} '{_label(node)}' takes {turns} turns"
            made = repeated(count, f"{_label(node)}/body", turns)
            return MacCount(made.nodes, made.uncounted, (*([times] if made.nodes else ()), *made.assumed))
        return MacCount((), {node.op_type: 1} if count.nodes or count.uncounted else {})


def _evaluate(model: onnx.ModelProto, scope: Scope) -> None:
    from onnx.reference import ReferenceEvaluator  # slow to import, and most graphs need none

    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(model).run(None, {})
    except Exception:  # any failure inside onnx's evaluator only means that the value stays unknown
        return
    for output, result in zip(model.graph.output, results, strict=True):
        if isinstance(result, np.ndarray | np.generic):
            scope.constants[output.name] = np.asarray(result)


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


def _label(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]
