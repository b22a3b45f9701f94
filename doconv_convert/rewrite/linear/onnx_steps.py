"""An ONNX graph, read as steps: what each node does to its input, as far as it is affine. This needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from doconv_convert.rewrite.linear.affine import AffineConv, Array
from doconv_convert.rewrite.linear.operations import AveragePool, Combination, ZeroPad, batch_norm, by_constant
from doconv_convert.rewrite.linear.reasons import Declined, Reason
from doconv_convert.rewrite.linear.steps import PASSES_ON, Kind, Operation, Step

OUTPUTS = "<outputs>"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MAIN = ("", "ai.onnx")


@dataclass(frozen=True)
class OnnxNode:
    """What is read of a node: the operation, what it is, the values it reads, and its parameters."""

    operation: Operation
    kind: Kind
    data: tuple[ir.Value, ...]
    parameters: tuple[tuple[str, int], ...] = ()


def read_steps(graph: ir.Graph) -> list[Step]:
    """Every value of the graph as a step of its name, in order; the last step reads the graph's outputs.

    A node with several outputs is a step for each of them; values that subgraphs read count as read by their node.
    """
    steps = [Step(_name(value), ()) for value in graph.inputs]
    steps += [Step(name, ()) for name in graph.initializers if name not in {step.name for step in steps}]
    constants = {step.name for step in steps if step.name in graph.initializers}
    for node in graph:
        inputs = tuple(dict.fromkeys(_name(value) for value in _read_by(node)))
        outputs = [_name(value) for value in node.outputs if value.name]
        if node.op_type == "Constant":
            constants.update(outputs)
        steps += [_step(node, name, inputs, constants) for name in outputs]
    known = {step.name for step in steps}
    steps.append(Step(OUTPUTS, tuple(dict.fromkeys(_name(value) for value in graph.outputs))))
    return [Step(s.name, tuple(i for i in s.inputs if i in known), *_rest(s)) for s in steps]


def _rest(step: Step) -> tuple[Any, ...]:
    return step.operation, step.kind, step.parameters, step.refused, step.writes


def _step(node: ir.Node, name: str, inputs: tuple[str, ...], constants: set[str]) -> Step:
    try:
        read = _read(node) if node.domain in _MAIN and len(node.outputs) == 1 else None
    except Declined as declined:
        return Step(name, inputs[:1], refused=declined.reason)
    if read is None:
        return Step(name, tuple(one for one in inputs if one not in constants))
    return Step(name, tuple(_name(value) for value in read.data), read.operation, read.kind, read.parameters)


def _name(value: ir.Value) -> str:
    return value.name or ""


def _read_by(node: ir.Node) -> Iterator[ir.Value]:
    """The values that a node reads, those that its subgraphs take from outside among them."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        for graph in _graphs(attribute):
            for inner in graph:
                yield from _read_by(inner)
            yield from graph.outputs


def _graphs(attribute: Any) -> Sequence[ir.Graph]:
    if not isinstance(attribute, ir.Attr) or attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else ()


def _read(node: ir.Node) -> OnnxNode | None:
    """Raises Declined."""
    reader = _READERS.get(node.op_type)
    data = node.inputs[0] if node.inputs else None
    if reader is None or data is None or any(attribute.is_ref() for attribute in node.attributes.values()):
        return None
    return reader(node, data)


def _attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    found = node.attributes.get(name)
    value = default if found is None else found.value
    return tuple(value) if isinstance(value, list | tuple) else value


def constant(value: ir.Value | None) -> Array | None:
    """A floating-point value that is known before the graph runs, in float64."""
    tensor = _tensor(value)
    if tensor is None or tensor.dtype not in _FLOATS:
        return None
    return np.asarray(tensor.numpy()).astype(np.float64)


def _tensor(value: ir.Value | None) -> Any:
    if value is None or (value.is_graph_input() and not value.is_initializer()):
        return None
    return ir.convenience.get_const_tensor(value)


def _integers(value: ir.Value | None) -> tuple[int, ...] | None:
    tensor = _tensor(value)
    return None if tensor is None else tuple(int(one) for one in np.asarray(tensor.numpy()).reshape(-1))


def _parameters(values: Sequence[ir.Value | None]) -> tuple[tuple[str, int], ...]:
    known = [(value, constant(value)) for value in values if value is not None]
    return tuple((_name(value), array.size) for value, array in known if array is not None)


def _conv(node: ir.Node, data: ir.Value) -> OnnxNode:
    kernel = constant(node.inputs[1])
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant(bias_value)
    if kernel is None or (bias_value is not None and bias is None):
        raise Declined(Reason.INPUT_DEPENDENT)
    rank = kernel.ndim - 2
    transposed, groups = node.op_type == "ConvTranspose", _attribute(node, "group", 1)
    if transposed:  # its layout is (C_in, C_out/groups, *K)
        kernel = kernel.reshape(groups, -1, *kernel.shape[1:]).swapaxes(1, 2)
        kernel = kernel.reshape(-1, *kernel.shape[2:])
    stride, dilation = (_attribute(node, name, (1,) * rank) for name in ("strides", "dilations"))
    extent = tuple((k - 1) * d + 1 for k, d in zip(kernel.shape[2:], dilation, strict=True))
    padding = _padding(node, rank, extent, stride)
    if transposed:
        if _attribute(node, "output_shape") is not None:
            raise Declined(Reason.PADDING_MODE)
        more = _attribute(node, "output_padding", (0,) * rank)
        padding = tuple((before, after - extra) for (before, after), extra in zip(padding, more, strict=True))
    shift = np.zeros(kernel.shape[0]) if bias is None else bias
    conv = AffineConv(kernel, shift, stride, padding, dilation, groups, transposed)
    return OnnxNode(conv, "convolution", (data,), _parameters(node.inputs[1:]))


def _padding(node: ir.Node, rank: int, extent: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    mode = _attribute(node, "auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        if any(step != 1 for step in stride):
            raise Declined(Reason.PADDING_MODE)  # its pads depend on the input's size
        halves = [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in extent]
        return tuple(half if mode == "SAME_UPPER" else half[::-1] for half in halves)
    pads = (0,) * (2 * rank) if mode == "VALID" else _attribute(node, "pads", (0,) * (2 * rank))
    return tuple(zip(pads[:rank], pads[rank:], strict=True))


def _batch_norm(node: ir.Node, data: ir.Value) -> OnnxNode | None:
    if _attribute(node, "training_mode", 0):
        raise Declined(Reason.BATCH_STATISTICS)
    weight, bias, mean, variance = (constant(value) for value in node.inputs[1:5])
    if weight is None or bias is None or mean is None or variance is None:
        return None
    epsilon = float(_attribute(node, "epsilon", np.float32(1e-5)))  # as the file has it, in float32
    return OnnxNode(
        batch_norm(mean, variance, weight, bias, epsilon), "batch norm", (data,), _parameters(node.inputs[1:3])
    )


def _sum(node: ir.Node, data: ir.Value) -> OnnxNode | None:
    values = [value for value in node.inputs if value is not None]
    sign = -1.0 if node.op_type == "Sub" else 1.0
    known = [constant(value) for value in values]
    if all(one is None for one in known):
        return OnnxNode(Combination((1.0, *(sign,) * (len(values) - 1))), "other", tuple(values))
    if len(values) != 2 or not any(one is None for one in known):
        return None
    first, second = known
    if second is not None:
        return _scale(node, values[0], second, lambda c: (1.0, sign * c))
    return None if first is None else _scale(node, values[1], first, lambda c: (sign, c))


def _product(node: ir.Node, data: ir.Value) -> OnnxNode | None:
    first, second = (constant(value) for value in node.inputs)
    other = node.inputs[1]
    if second is not None and first is None:
        if node.op_type == "Div":
            return _scale(node, data, second, lambda c: (1.0 / c, 0.0))
        return _scale(node, data, second, lambda c: (c, 0.0))
    if node.op_type == "Mul" and first is not None and second is None and other is not None:
        return _scale(node, other, first, lambda c: (c, 0.0))
    return None


def _scale(node: ir.Node, data: ir.Value, values: Array, factors: Callable[[Any], tuple[Any, Any]]) -> OnnxNode | None:
    operation = by_constant(values, factors)
    return None if operation is None else OnnxNode(operation, "other", (data,), _parameters(node.inputs))


def _negative(node: ir.Node, data: ir.Value) -> OnnxNode:
    return OnnxNode(Combination((-1.0,)), "other", (data,))


def _same(node: ir.Node, data: ir.Value) -> OnnxNode | None:
    training = _tensor(node.inputs[2]) if len(node.inputs) > 2 else None
    if node.op_type == "Dropout" and len(node.inputs) > 2 and (training is None or bool(training.numpy())):
        return None
    return OnnxNode(PASSES_ON, "other", (data,))


def _average_pool(node: ir.Node, data: ir.Value) -> OnnxNode | None:
    size = _attribute(node, "kernel_shape")
    ones = (1,) * len(size)
    if _attribute(node, "ceil_mode", 0) or any(step != 1 for step in _attribute(node, "dilations", ones)):
        return None
    stride = _attribute(node, "strides", ones)
    padding = _padding(node, len(size), size, stride)
    if any(map(any, padding)) and not _attribute(node, "count_include_pad", 0):
        return None
    return OnnxNode(AveragePool(size, stride, padding), "other", (data,))


def _pad(node: ir.Node, data: ir.Value) -> OnnxNode | None:
    pads = _integers(node.inputs[1]) if len(node.inputs) > 1 else None
    value = node.inputs[2] if len(node.inputs) > 2 else None
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    if pads is None or axes is not None or len(pads) < 6:
        return None
    if _attribute(node, "mode", "constant") != "constant" or (value is not None and _nonzero(value)):
        raise Declined(Reason.PADDING_MODE)
    rank = len(pads) // 2
    sides = tuple(zip(pads[:rank], pads[rank:], strict=True))
    return OnnxNode(ZeroPad(sides[2:]), "other", (data,)) if not any(map(any, sides[:2])) else None


def _nonzero(value: ir.Value) -> bool:
    known = constant(value)
    return known is None or bool(known.any())


_READERS: dict[str, Callable[[ir.Node, ir.Value], OnnxNode | None]] = {
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    "BatchNormalization": _batch_norm,
    **dict.fromkeys(("Add", "Sub", "Sum"), _sum),
    **dict.fromkeys(("Mul", "Div"), _product),
    "Neg": _negative,
    **dict.fromkeys(("Identity", "Dropout"), _same),
    "AveragePool": _average_pool,
    "Pad": _pad,
}
