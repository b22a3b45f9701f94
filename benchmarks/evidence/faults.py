"""Faults to plant in an exported file, one at a time. Each edits a copy of the model in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

RELATIVE_CHANGE = 1e-3
Edit = Callable[[ModelProto], None]


@dataclass(frozen=True)
class Fault:
    """What is wrong (`kind`), where, and the edit. `kernel` is the site whose kernel changes, if one does;
    `fold` whether the per-site check of the fold refuses it."""

    kind: str
    where: str
    edit: Edit
    kernel: str | None = None
    fold: bool = False


def convolutions(model: ModelProto) -> list[NodeProto]:
    """The convolutions whose kernel is an initializer."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type == "Conv" and node.input[1] in stored]


def array(model: ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(_tensor(model, name))


def sites(model: ModelProto, kernels: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Initializer -> site. The exporter folds batch norms into the kernels, so a site's initializer is its kernel
    up to a factor per output channel; names are not relied on (TorchScript invents them)."""
    found = {}
    for name in dict.fromkeys(node.input[1] for node in convolutions(model)):
        rows = _directions(array(model, name))
        fits = [
            site
            for site, kernel in kernels.items()
            if kernel.size == rows.size
            and kernel.shape[0] == len(rows)
            and np.abs(np.abs((rows * _directions(kernel)).sum(1)) - 1).max() < 1e-4
        ]
        if len(fits) == 1:
            found[name] = fits[0]
    return found


def kernel_faults(model: ModelProto, places: Mapping[str, str], seed: int) -> Iterator[Fault]:
    """Every kernel in turn multiplied elementwise by 1 + 1e-3 N(0, 1)."""
    for index, (name, site) in enumerate(places.items()):
        noise = np.random.default_rng([seed, index]).standard_normal(array(model, name).shape)
        factor = (1 + RELATIVE_CHANGE * noise).astype(np.float32)
        yield Fault("kernel times 1 + 1e-3 N(0,1)", site, _changed(name, lambda a, f=factor: a * f), site)


def value_faults(model: ModelProto, places: Mapping[str, str], seed: int) -> Iterator[Fault]:
    """At a few convolutions spread over the net: a channel zeroed, two swapped, the bias shifted."""
    nodes = [node for node in convolutions(model) if node.input[1] in places]
    rng = np.random.default_rng(seed)
    for node in _spread(nodes):
        site, kernel = places[node.input[1]], array(model, node.input[1])
        strong = int(np.abs(kernel).reshape(len(kernel), -1).sum(1).argmax())
        other = int((strong + 1 + rng.integers(max(len(kernel) - 1, 1))) % len(kernel))
        yield Fault("channel zeroed", site, _changed(node.input[1], _zeroed(strong)), site)
        if other != strong:
            yield Fault("channels swapped", site, _changed(node.input[1], _swapped(strong, other)), site)
        if len(node.input) > 2 and any(t.name == node.input[2] for t in model.graph.initializer):
            bias = array(model, node.input[2])
            shift = np.float32(0.01 * (np.ptp(bias) or np.abs(bias).max() or 1.0))
            yield Fault("bias shifted by 1 %", site, _changed(node.input[2], lambda a, s=shift: a + s))


def attribute_faults(model: ModelProto) -> Iterator[Fault]:
    """Stride, pads, dilation and groups, at the first and the last convolution where each can be changed."""
    nodes = convolutions(model)
    wide = [node for node in nodes if max(array(model, node.input[1]).shape[2:]) > 1]
    dense = [n for n in nodes if _attribute(n, "group", 1) == 1 and not any(s % 2 for s in _channels(model, n))]
    grouped = [node for node in nodes if _attribute(node, "group", 1) > 1]
    for node in _ends(nodes):
        strides = _attribute(node, "strides", [1] * (array(model, node.input[1]).ndim - 2))
        yield _attribute_fault("stride changed", node, "strides", [1 if s > 1 else 2 for s in strides])
    for node in _ends(wide):
        rank = array(model, node.input[1]).ndim - 2
        pads = _attribute(node, "pads", [0] * 2 * rank)
        yield _attribute_fault("pad changed", node, "pads", [pad + 1 for pad in pads])
        dilations = _attribute(node, "dilations", [1] * rank)
        yield _attribute_fault("dilation changed", node, "dilations", [d + 1 for d in dilations])
    for node in _ends(dense):
        yield Fault("groups: half of the inputs unused", node.name, _halved(node))
    for node in _ends(grouped):  # computes the same, at many times the cost
        yield Fault("groups: written as a dense kernel", node.name, _dense(node))


def graph_faults(model: ModelProto) -> Iterator[Fault]:
    """A dead or doubled convolution, and everything that can happen to an output; the opset."""
    node = _spread(convolutions(model))[0]
    yield Fault("dead Conv added", node.name, _dead(node))
    yield Fault("doubled Conv", node.name, _doubled(node))
    outputs = model.graph.output
    floats = [o for o in outputs if o.type.tensor_type.elem_type == TensorProto.FLOAT]
    tensors = [o for o in floats if len(o.type.tensor_type.shape.dim) > 1]
    yield Fault("output dropped", outputs[-1].name, lambda m: m.graph.output.pop() and None)
    yield Fault("output renamed", outputs[0].name, _renamed)
    yield Fault("output made NaN", floats[0].name, _wrapped(floats[0].name, _times_nan))
    yield Fault("output broadcast (one sample's)", floats[0].name, _wrapped(floats[0].name, _first_sample))
    if tensors:
        rank = len(tensors[0].type.tensor_type.shape.dim)
        yield Fault("output transposed", tensors[0].name, _wrapped(tensors[0].name, _transposed(rank)))
    yield Fault("opset lowered", "model", _lower_opset)


def replaced(name: str, site: str, value: np.ndarray, *, fold: bool) -> Fault:
    """Rows of D swapped before the fold: the kernel that comes of it."""
    return Fault("D rows swapped before the fold", site, _changed(name, lambda _: value.astype(np.float32)), site, fold)


def _tensor(model: ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _directions(kernel: np.ndarray) -> np.ndarray:
    rows = kernel.reshape(len(kernel), -1).astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _spread(nodes: list[NodeProto]) -> list[NodeProto]:
    """The first, the middle and the last."""
    return [nodes[index] for index in sorted({0, len(nodes) // 2, len(nodes) - 1})] if nodes else []


def _ends(nodes: list[NodeProto]) -> list[NodeProto]:
    return [nodes[index] for index in sorted({0, len(nodes) - 1})] if nodes else []


def _changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    def edit(model: ModelProto) -> None:
        tensor = _tensor(model, name)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(array(model, name))), name))

    return edit


def _zeroed(channel: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(kernel: np.ndarray) -> np.ndarray:
        kernel = kernel.copy()
        kernel[channel] = 0
        return kernel

    return change


def _swapped(one: int, other: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(kernel: np.ndarray) -> np.ndarray:
        kernel = kernel.copy()
        kernel[[one, other]] = kernel[[other, one]]
        return kernel

    return change


def _attribute(node: NodeProto, name: str, default: object) -> object:
    found = [helper.get_attribute_value(one) for one in node.attribute if one.name == name]
    return found[0] if found else default


def _set(node: NodeProto, name: str, value: object) -> None:
    kept = [one for one in node.attribute if one.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def _same(model: ModelProto, node: NodeProto) -> NodeProto:
    return next(one for one in model.graph.node if one.output[0] == node.output[0])


def _attribute_fault(kind: str, node: NodeProto, name: str, value: object) -> Fault:
    return Fault(kind, node.name, lambda model: _set(_same(model, node), name, value))


def _channels(model: ModelProto, node: NodeProto) -> tuple[int, int]:
    return array(model, node.input[1]).shape[:2]


def _own_kernel(model: ModelProto, node: NodeProto, value: np.ndarray) -> None:
    """Give the node a kernel of its own, in the old one's place if nobody else reads that."""
    name = node.input[1]
    if sum(name in one.input for one in model.graph.node) > 1:
        name = node.input[1] = f"{name}_own"
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    else:
        _tensor(model, name).CopyFrom(numpy_helper.from_array(value, name))


def _halved(node: NodeProto) -> Edit:
    def edit(model: ModelProto) -> None:
        kernel, conv = array(model, node.input[1]), _same(model, node)
        _own_kernel(model, conv, np.ascontiguousarray(kernel[:, : kernel.shape[1] // 2]))
        _set(conv, "group", 2)

    return edit


def _dense(node: NodeProto) -> Edit:
    def edit(model: ModelProto) -> None:
        conv = _same(model, node)
        groups, kernel = int(_attribute(conv, "group", 1)), array(model, node.input[1])
        outputs, inputs = len(kernel) // groups, kernel.shape[1]
        dense = np.zeros((len(kernel), inputs * groups, *kernel.shape[2:]), np.float32)
        for index, row in enumerate(kernel):
            start = index // outputs * inputs
            dense[index, start : start + inputs] = row
        _own_kernel(model, conv, dense)
        _set(conv, "group", 1)

    return edit


def _twin(model: ModelProto, node: NodeProto) -> tuple[int, NodeProto]:
    index = next(i for i, one in enumerate(model.graph.node) if one.output[0] == node.output[0])
    twin = copy.deepcopy(model.graph.node[index])
    twin.name, twin.output[0] = f"{node.name}_twin", f"{node.output[0]}_twin"
    return index, twin


def _insert(model: ModelProto, index: int, *nodes: NodeProto) -> None:
    for offset, node in enumerate(nodes):
        model.graph.node.insert(index + offset, node)


def _dead(node: NodeProto) -> Edit:
    def edit(model: ModelProto) -> None:
        index, twin = _twin(model, node)
        _insert(model, index, twin)

    return edit


def _doubled(node: NodeProto) -> Edit:
    """Half the sum of twins: the outputs stay what they are."""

    def edit(model: ModelProto) -> None:
        index, twin = _twin(model, node)
        original, result = model.graph.node[index], node.output[0]
        original.output[0] = f"{result}_one"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "half"))
        total = helper.make_node("Add", [f"{result}_one", twin.output[0]], [f"{result}_sum"])
        half = helper.make_node("Mul", [f"{result}_sum", "half"], [result])
        _insert(model, index + 1, twin, total, half)

    return edit


def _renamed(model: ModelProto) -> None:
    output = model.graph.output[0]
    model.graph.node.append(helper.make_node("Identity", [output.name], ["renamed"]))
    output.name = "renamed"


def _wrapped(name: str, make: Callable[[ModelProto, str, str], NodeProto]) -> Edit:
    """The output keeps its name; a node behind it spoils its value."""

    def edit(model: ModelProto) -> None:
        inner = f"{name}_inner"
        for node in model.graph.node:
            for values in (node.input, node.output):
                for index, value in enumerate(values):
                    values[index] = inner if value == name else value
        model.graph.node.append(make(model, inner, name))
        output = next(one for one in model.graph.output if one.name == name)
        output.CopyFrom(helper.make_tensor_value_info(name, output.type.tensor_type.elem_type, None))

    return edit


def _times_nan(model: ModelProto, inner: str, name: str) -> NodeProto:
    model.graph.initializer.append(numpy_helper.from_array(np.float32(np.nan), "nan"))
    return helper.make_node("Mul", [inner, "nan"], [name])


def _first_sample(model: ModelProto, inner: str, name: str) -> NodeProto:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), "first"))
    return helper.make_node("Gather", [inner, "first"], [name], axis=0)


def _transposed(rank: int) -> Callable[[ModelProto, str, str], NodeProto]:
    order = [*range(rank - 2), rank - 1, rank - 2]
    return lambda model, inner, name: helper.make_node("Transpose", [inner], [name], perm=order)


def _lower_opset(model: ModelProto) -> None:
    entry = next(one for one in model.opset_import if one.domain in ("", "ai.onnx"))
    entry.version -= 1


def write(model: ModelProto, fault: Fault, path: str) -> None:
    damaged = ModelProto()
    damaged.CopyFrom(model)
    fault.edit(damaged)
    onnx.save(damaged, path)
