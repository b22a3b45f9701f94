"""The arithmetic with which exporters compute sizes, on small constants, as onnxruntime does it.

Only what has one result on every machine is evaluated: integers, booleans and finite float32. What onnxruntime and
others compute differently (a cast of infinity or of what does not fit, a division by zero, an overflow of float32)
stays unknown, and so does every operator that is not listed. `tests/check/macs/test_constants.py` holds each against
onnxruntime.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from doconv_convert.check.macs.rules import Shape, attribute

Array: TypeAlias = np.ndarray[Any, Any]
Operator: TypeAlias = Callable[[onnx.NodeProto, Sequence[Array | None]], Array]

_KINDS = {
    TensorProto.BOOL: "bool",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.FLOAT: "float32",
}


def evaluate(node: onnx.NodeProto, constants: Mapping[str, Array], shape: Shape) -> Array | None:
    """The value of the node's only output, of that shape, from those of its inputs; None where it is not known."""
    operator = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    values = [constants[name] if name else None for name in node.input]
    if operator is None or any(value is not None and value.dtype.name not in _KINDS.values() for value in values):
        return None
    try:
        with np.errstate(all="ignore"):
            result = np.asarray(operator(node, values))
    except (LookupError, ValueError, TypeError, ArithmeticError, MemoryError):
        return None
    known = result.dtype.name in _KINDS.values() and result.shape == shape and bool(np.isfinite(result).all())
    return result if known else None


def _given(values: Sequence[Array | None], index: int) -> Array | None:
    return values[index] if index < len(values) else None


def _need(values: Sequence[Array | None], index: int) -> Array:
    value = values[index]
    if value is None:
        raise LookupError
    return value


def _unary(function: Callable[[Array], Any], kinds: str = "if") -> Operator:
    def operator(_: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
        value = _need(values, 0)
        if value.dtype.kind not in kinds:
            raise TypeError
        return np.asarray(function(value)).astype(value.dtype)

    return operator


def _binary(function: Callable[[Array, Array], Any]) -> Operator:
    """Of two values of one type: onnxruntime casts neither."""

    def operator(_: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
        a, b = _need(values, 0), _need(values, 1)
        if a.dtype != b.dtype:
            raise TypeError
        return np.asarray(function(a, b))

    return operator


def _many(function: Callable[[Array, Array], Any]) -> Operator:
    def operator(_: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
        result = _need(values, 0)
        for index in range(1, len(values)):
            result = np.asarray(function(result, _need(values, index)))
        return result

    return operator


def _div(a: Array, b: Array) -> Array:
    """Integers are cut towards zero."""
    if a.dtype.kind == "f":
        return np.divide(a, b)
    least = np.iinfo(a.dtype).min  # has no opposite
    if not b.all() or (a == least).any() or (b == least).any():
        raise ZeroDivisionError
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def _mod(node: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
    a, b = _need(values, 0), _need(values, 1)
    if attribute(node, "fmod", 0) or a.dtype != b.dtype or a.dtype.kind != "i" or not b.all():
        raise ZeroDivisionError
    return np.mod(a, b)


def _cast(node: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
    value, kind = _need(values, 0), np.dtype(_KINDS[attribute(node, "to")])
    if kind.kind == "i" and value.size:
        limit = np.iinfo(kind)
        cut = np.trunc(value) if value.dtype.kind == "f" else value
        # as Python's integers, which compare exactly
        if int(cut.max()) > limit.max or int(cut.min()) < limit.min:
            raise OverflowError
        return cut.astype(kind)
    return value.astype(kind)


def _axes(node: onnx.NodeProto, values: Sequence[Array | None]) -> list[int] | None:
    """Attributes in old opsets, a second input in new ones."""
    given = _given(values, 1)
    if given is not None:
        return [int(axis) for axis in given.ravel()]
    axes = attribute(node, "axes", None)
    return None if axes is None else [int(axis) for axis in axes]


def _unsqueeze(node: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
    axes = _axes(node, values)
    if not axes:
        raise LookupError
    return np.expand_dims(_need(values, 0), tuple(axes))


def _squeeze(node: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
    axes = _axes(node, values)
    return np.squeeze(_need(values, 0), None if axes is None else tuple(axes))


def _reduce(function: Callable[..., Any]) -> Operator:
    def operator(node: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
        value, axes = _need(values, 0), _axes(node, values)
        if value.dtype.kind != "i" or not value.size or (not axes and attribute(node, "noop_with_empty_axes", 0)):
            raise TypeError
        keep = bool(attribute(node, "keepdims", 1))
        return np.asarray(function(value, axis=tuple(axes) if axes else None, keepdims=keep)).astype(value.dtype)

    return operator


def _slice(node: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
    value = _need(values, 0)
    if len(values) < 3:  # attributes, before opset 10
        starts, ends = list(attribute(node, "starts")), list(attribute(node, "ends"))
        axes, steps = list(attribute(node, "axes", range(len(starts)))), [1] * len(starts)
    else:
        starts, ends = _need(values, 1).ravel().tolist(), _need(values, 2).ravel().tolist()
        given, stepped = _given(values, 3), _given(values, 4)
        axes = list(range(len(starts))) if given is None else given.ravel().tolist()
        steps = [1] * len(starts) if stepped is None else stepped.ravel().tolist()
    cut = [slice(None)] * value.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = value.shape[axis]
        # backwards, an end before the first element means that it is taken: None in Python
        stop = None if step < 0 and end < -size else end
        cut[axis % value.ndim] = slice(start, stop, step)
    return value[tuple(cut)]


def _gather(node: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
    indices = _need(values, 1)
    if indices.dtype.kind != "i":
        raise TypeError
    return np.take(_need(values, 0), indices, axis=attribute(node, "axis", 0))


def _reshape(node: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
    value, wanted = _need(values, 0), _need(values, 1).ravel().tolist()
    if not attribute(node, "allowzero", 0):
        wanted = [value.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return value.reshape(wanted)


def _constant_of_shape(node: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
    tensor = attribute(node, "value", None)
    fill = np.zeros(1, np.float32) if tensor is None else numpy_helper.to_array(tensor)
    return np.full(_need(values, 0).ravel().tolist(), fill.reshape(())[()], fill.dtype)


def _concat(node: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
    parts = [_need(values, index) for index in range(len(values))]
    if len({part.dtype for part in parts}) > 1:
        raise TypeError
    return np.concatenate(parts, axis=attribute(node, "axis"))


def _range(_: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
    start, limit, step = (_need(values, index) for index in range(3))
    if start.dtype.kind != "i":
        raise TypeError
    return np.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


def _expand(_: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
    value, wanted = _need(values, 0), _need(values, 1).ravel().tolist()
    return np.broadcast_to(value, np.broadcast_shapes(value.shape, tuple(wanted)))


def _where(_: onnx.NodeProto, values: Sequence[Array | None]) -> Array:
    condition, a, b = (_need(values, index) for index in range(3))
    if a.dtype != b.dtype or condition.dtype != bool:
        raise TypeError
    return np.where(condition, a, b)


OPERATORS: Mapping[str, Operator] = {
    "Identity": lambda _, values: _need(values, 0),
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Div": _binary(_div),
    "Mod": _mod,
    "Min": _many(np.minimum),
    "Max": _many(np.maximum),
    "Neg": _unary(np.negative),
    "Abs": _unary(np.abs),
    "Floor": _unary(np.floor, "f"),
    "Ceil": _unary(np.ceil, "f"),
    "Round": _unary(np.rint, "f"),  # halves to the even neighbor, in both
    "Sqrt": _unary(np.sqrt, "f"),
    "Cast": _cast,
    "Equal": _binary(np.equal),
    "Less": _binary(np.less),
    "LessOrEqual": _binary(np.less_equal),
    "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal),
    "Not": _unary(np.logical_not, "b"),
    "And": _binary(np.logical_and),
    "Or": _binary(np.logical_or),
    "Where": _where,
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Transpose": lambda node, values: np.transpose(_need(values, 0), attribute(node, "perm", None)),
    "Tile": lambda _, values: np.tile(_need(values, 0), _need(values, 1).ravel().tolist()),
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
}
