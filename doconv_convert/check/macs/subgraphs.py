"""The operators that run graphs of their own: If, Loop and Scan."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, TypeProto, helper

from doconv_convert.check.macs.result import MacCount, merged, repeated
from doconv_convert.check.macs.rules import attribute
from doconv_convert.check.macs.scope import Scope
from doconv_convert.words import clipped

GraphCounter: TypeAlias = Callable[[onnx.GraphProto, Scope], MacCount]


def label(node: onnx.NodeProto) -> str:
    return clipped(node.name or node.output[0])


def count_if(count: GraphCounter, node: onnx.NodeProto, scope: Scope) -> MacCount:
    """The branch that a constant condition takes, else the costlier one."""
    branches: dict[str, onnx.GraphProto] = {name: attribute(node, name) for name in ("then_branch", "else_branch")}
    condition = scope.constant(node.input[0])
    taken = list(branches) if not isinstance(condition, bool) else ["then_branch" if condition else "else_branch"]
    scopes = [scope.inner(branches[name]) for name in taken]
    counts = [count(branches[name], inner) for name, inner in zip(taken, scopes, strict=True)]
    decided = scope.claim(node.input) if len(taken) == 1 else None
    for index, output in enumerate(node.output):
        names = [branches[name].output[index].name for name in taken]
        scope.take(output, scopes[0], names[0])
        if len({inner.size(name) for inner, name in zip(scopes, names, strict=True)}) > 1:
            scope.types.pop(output, None)
        if len(taken) > 1:
            scope.constants.pop(output, None)
            scope.weights.pop(output, None)
        claims = [inner.claim([name]) for inner, name in zip(scopes, names, strict=True)]
        _claim(scope, output, (*claims, decided))
    costliest = max(range(len(taken)), key=lambda index: counts[index].total)
    every = merged(counts)
    made = repeated(counts[costliest], f"{label(node)}/{taken[costliest]}", 1)
    said = (f"If '{label(node)}' takes its costlier branch, {taken[costliest]}",) if len(taken) > 1 else ()
    # a condition that follows from a claimed size may pick the cheaper branch
    claimed = dict.fromkeys((*every.claimed, *([decided] if decided is not None else ())))
    return replace(
        made,
        uncounted=every.uncounted,
        assumed=(*(said if every.nodes else ()), *every.assumed),
        claimed=tuple(claimed),
    )


def count_loop(count: GraphCounter, node: onnx.NodeProto, scope: Scope) -> MacCount:
    """A loop counts if its number of turns is a constant and what it carries keeps its shape."""
    body: onnx.GraphProto = attribute(node, "body")
    turns = scope.constant(node.input[0]) if node.input[0] else None
    inner = scope.inner(body)
    inner.types[body.input[0].name] = helper.make_tensor_type_proto(TensorProto.INT64, [])
    condition = node.input[1] if len(node.input) > 1 else ""
    if not condition or scope.constant(condition) is True:
        inner.constants[body.input[1].name] = np.array(True)
    starts = node.input[2:]
    for value, name in zip(body.input[2:], starts, strict=True):
        _carry(value.name, inner, name, scope)
    carried = [(before.name, after.name) for before, after in zip(body.input[2:], body.output[1:], strict=False)]
    counted = count(body, inner)
    if inner.constant(body.output[0].name) is not True:  # the body decides when to stop
        turns = None
    # onnxruntime takes no turn where the number is negative, or the condition false at the start
    turns = max(turns, 0) if isinstance(turns, int) and not isinstance(turns, bool) else None
    turns = 0 if condition and scope.constant(condition) is False else turns
    decided = scope.claim(node.input[:2])
    return _turns(node, scope, inner, counted, carried, body.output[1 + len(carried) :], turns, decided)


def count_scan(count: GraphCounter, node: onnx.NodeProto, scope: Scope) -> MacCount:
    """A scan's body runs once for every slice of its scanned inputs."""
    body: onnx.GraphProto = attribute(node, "body")
    if len(body.input) != len(node.input):  # opset 8, which scans a batch of sequences of different lengths
        return MacCount((), {"Scan": 1})
    states = len(node.input) - attribute(node, "num_scan_inputs", 0)
    axes = attribute(node, "scan_input_axes", None) or [0] * (len(node.input) - states)
    inner, turns = scope.inner(body), None
    for value, name in zip(body.input[:states], node.input[:states], strict=True):
        _carry(value.name, inner, name, scope)
    for value, name, axis in zip(body.input[states:], node.input[states:], axes, strict=True):
        _claim(inner, value.name, (scope.claim([name]),))
        if shape := scope.shape(name):
            axis %= len(shape)
            turns = max(turns or 0, shape[axis])
            inner.set_shape(value.name, (*shape[:axis], *shape[axis + 1 :]), name)
    counted = count(body, inner)
    carried = [(before.name, after.name) for before, after in zip(body.input[:states], body.output, strict=False)]
    moved = any(attribute(node, "scan_output_axes", None) or ())  # stacked elsewhere: left to the declared shape
    stacked = [] if moved else body.output[states:]
    return _turns(node, scope, inner, counted, carried, stacked, turns, scope.claim(node.input[states:]))


def _carry(name: str, inner: Scope, start: str, scope: Scope) -> None:
    """What a loop carries has its start's type, and no value or weight that stays."""
    inner.types[name] = scope.types.get(start, TypeProto())
    _claim(inner, name, (scope.claim([start]),))


def _claim(scope: Scope, name: str, claims: Sequence[str | None]) -> None:
    found = next((one for one in claims if one is not None), None)
    if found is not None:
        scope.claims[name] = found


def _turns(
    node: onnx.NodeProto,
    scope: Scope,
    inner: Scope,
    count: MacCount,
    carried: Sequence[tuple[str, str]],
    stacked: Sequence[onnx.ValueInfoProto],
    turns: int | None,
    decided: str | None,
) -> MacCount:
    """The count of `turns` turns (None: not known) of a body. What it carries must keep its type; `stacked`
    values are collected along a new dimension 0. `decided`: the claim on which the turns depend."""
    for output in node.output:
        scope.forget(output)
    if decided is None:  # a claim on what is carried is one on everything in the next turn
        decided = inner.claim(after for _, after in carried)
    stable = all(inner.size(before) == inner.size(after) for before, after in carried)
    made_by = [after for _, after in carried] + [value.name for value in stacked]
    for output, name in zip(node.output, made_by, strict=False):
        _claim(scope, output, (inner.claim([name]), decided))
    if stable:
        for output, (before, _) in zip(node.output, carried, strict=False):
            scope.types[output] = inner.types.get(before, TypeProto())
    if not stable or turns is None:
        return MacCount((), {node.op_type: 1} if count.nodes or count.uncounted else {})
    for output, value in zip(node.output[len(carried) :], stacked, strict=False):
        if (shape := inner.shape(value.name)) is not None:
            scope.set_shape(output, (turns, *shape), value.name)
    times = f"{node.op_type} '{label(node)}' takes {turns} turns"
    made = repeated(count, f"{label(node)}/body", turns)
    claimed = dict.fromkeys((*made.claimed, *([decided] if decided is not None and made.nodes else ())))
    return replace(made, assumed=(*([times] if made.nodes else ()), *made.assumed), claimed=tuple(claimed))
