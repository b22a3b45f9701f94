"""Honest ONNX files with odd sizes, operators and opsets: they must be counted exactly (`hostile_nets.Case`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hostile_nets import CHANNELS, FLOAT, INT64, Case, Net, Rng, side_of, value
from onnx import helper


def resized(rng: Rng) -> Case:
    net = Net(side_of(rng), opset=int(rng.choice([11, 13, 18, 20])))
    mode = str(rng.choice(["nearest", "linear"]))
    if rng.random() < 0.5:
        size = [1, CHANNELS, *(int(n) for n in rng.integers(2, 40, 2))]
        return net.case(
            net.conv(net.add("Resize", "x", empty(net), empty(net), net.constant(size), mode=mode)), honest=True
        )
    scales = net.constant([1, 1, *(float(n) for n in rng.uniform(0.3, 2.7, 2).round(2))], np.float32)
    return net.case(net.conv(net.add("Resize", "x", empty(net), scales, mode=mode)), honest=True)


def empty(net: Net) -> str:
    """Left out; opset 11 and 12 want an empty tensor."""
    return net.constant([], np.float32) if net.opset < 13 else ""


def computed_size(rng: Rng) -> Case:
    """As exporters write it: half the input's size, through Shape, a division and a Cast."""
    net = Net(side_of(rng))
    whole = net.add("Slice", net.add("Shape", "x"), net.constant([2]), net.constant([4]))
    if rng.random() < 0.5:
        half = net.add("Div", whole, net.constant(2))
    else:
        real = net.add("Cast", whole, to=FLOAT)
        half = net.add("Cast", net.add("Floor", net.add("Mul", real, net.constant(0.5, np.float32))), to=INT64)
    size = net.add("Concat", net.constant([1, CHANNELS]), half, axis=0)
    return net.case(net.conv(net.add("Resize", "x", "", "", size, mode="nearest")), honest=True)


def convolution(rng: Rng) -> Case:
    net = Net(int(rng.integers(12, 24)))
    kernel = int(rng.integers(1, 5))
    attributes: dict[str, Any] = {"strides": [int(n) for n in rng.integers(1, 4, 2)]}
    attributes["dilations"] = [int(n) for n in rng.integers(1, 3, 2)]
    if rng.random() < 0.5:
        attributes["auto_pad"] = str(rng.choice(["SAME_UPPER", "SAME_LOWER", "VALID"]))
        attributes["dilations"] = [1, 1]
    else:
        attributes["pads"] = [int(n) for n in rng.integers(0, 3, 4)]
    weight = net.constant(
        np.ones((6, 1 if (depthwise := rng.random() < 0.5) else CHANNELS, kernel, kernel)), np.float32
    )
    y = net.add("Conv", "x", weight, group=CHANNELS if depthwise else 1, **attributes)
    return net.case(net.add("Relu", y), honest=True)


def transposed(rng: Rng) -> Case:
    net = Net(side_of(rng))
    weight = net.constant(np.ones((CHANNELS, 4, 3, 3)), np.float32)
    if rng.random() < 0.5:
        size = 2 * net.side + int(rng.integers(0, 2))
        y = net.add("ConvTranspose", "x", weight, strides=[2, 2], output_shape=[size, size])
    else:
        y = net.add(
            "ConvTranspose", "x", weight, strides=[2, 2], pads=[1] * 4, output_padding=[int(rng.integers(2))] * 2
        )
    return net.case(net.conv(y, channels=4), honest=True)


def pooled(rng: Rng) -> Case:
    net = Net(side_of(rng), opset=int(rng.choice([11, 13, 20])))
    op = str(rng.choice(["MaxPool", "AveragePool"]))
    step = int(rng.integers(1, 4))
    y = net.add(op, "x", kernel_shape=[3, 3], strides=[step, step], ceil_mode=int(rng.integers(2)), pads=[1] * 4)
    return net.case(net.conv(y), honest=True)


def moved(rng: Rng) -> Case:
    """Cut, padded, rearranged."""
    net = Net(2 * side_of(rng))
    kind = int(rng.integers(6))
    if kind == 0:
        step = int(rng.choice([-3, -2, -1, 2, 3]))
        ends = (net.constant([2**62]), net.constant([-(2**62)]))
        start, end = (net.constant([0]), ends[0]) if step > 0 else (net.constant([-1]), ends[1])
        y = net.add("Slice", "x", start, end, net.constant([2]), net.constant([step]))
    elif kind == 1:
        pads = [0, 0, *(int(n) for n in rng.integers(-2, 4, 2)), 0, 0, *(int(n) for n in rng.integers(-2, 4, 2))]
        y = net.add("Pad", "x", net.constant(pads))
    elif kind == 2:
        y = net.add("SpaceToDepth", "x", blocksize=2)
        y = net.add("DepthToSpace", y, blocksize=2, mode="CRD")
    elif kind == 3:
        half = net.side // 2
        parts = [f"p{index}" for index in range(2)]
        net.add("Split", "x", net.constant([half - 1, half + 1]), outputs=parts, axis=3)
        y = parts[1]
    elif kind == 4:
        y = net.add("CenterCropPad", "x", net.constant([int(n) for n in rng.integers(3, 50, 2)]), axes=[2, 3])
    else:
        flat = net.add("Reshape", "x", net.constant([0, CHANNELS, -1]))
        y = net.add("Reshape", flat, net.constant([1, -1, net.side // 2, net.side * 2]))
    return net.case(net.conv(y), honest=True)


def products(rng: Rng) -> Case:
    net = Net(side_of(rng))
    kind = int(rng.integers(5))
    if kind == 0:
        y = net.add("MatMul", "x", net.constant(np.ones((4, 1, net.side, 5)), np.float32))
    elif kind == 1:
        row = net.add("Flatten", "x")
        wide = net.constant(np.ones((7, CHANNELS * net.side**2)), np.float32)
        y = net.add("Gemm", row, wide, transB=1)
    elif kind == 2:
        y = net.add(
            "Gemm", net.add("Flatten", "x", axis=3), net.constant(np.ones((3 * net.side, 4)), np.float32), transA=1
        )
    elif kind == 3:
        y = net.add("MatMul", "x", net.constant(np.ones(net.side), np.float32))
    else:
        y = net.add("MatMul", net.add("Squeeze", "x", net.constant([0])), net.add("Squeeze", "x", net.constant([0])))
    return net.case(y, honest=True)


def recurrent(rng: Rng) -> Case:
    net = Net(side_of(rng))
    op, gates = [("LSTM", 4), ("GRU", 3), ("RNN", 1)][int(rng.integers(3))]
    steps = net.add("Squeeze", "x", net.constant([0]))
    directions = int(rng.integers(1, 3))
    w = net.constant(np.ones((directions, gates * 4, net.side)), np.float32)
    r = net.constant(np.ones((directions, gates * 4, 4)), np.float32)
    direction = "bidirectional" if directions == 2 else "forward"
    return net.case(net.add(op, steps, w, r, hidden_size=4, direction=direction), honest=True)


def integer(rng: Rng) -> Case:
    net = Net(side_of(rng))
    scale, zero = net.constant(0.1, np.float32), net.constant(3, np.uint8)
    weight = net.constant(np.ones((5, CHANNELS, 3, 3)), np.uint8)
    small = net.add("QuantizeLinear", "x", scale, zero)
    kind = int(rng.integers(3))
    if kind == 0:
        y = net.add("ConvInteger", small, weight, zero, zero)
    elif kind == 1:
        y = net.add("QLinearConv", small, scale, zero, weight, scale, zero, scale, zero, strides=[2, 2])
    else:
        y = net.add("Conv", "x", net.add("DequantizeLinear", weight, scale, zero))
    return net.case(y, honest=True)


def functions(rng: Rng) -> Case:
    """Functions of the file's own domain, called twice, one inside of the other, with attributes handed down."""
    net = Net(side_of(rng))
    inner = helper.make_node("Conv", ["a", "k"], ["r"], pads=[1] * 4)
    inner.attribute.add(name="strides", ref_attr_name="step", type=7)
    ops = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    net.functions.append(helper.make_function("own", "One", ["a", "k"], ["r"], [inner], ops, ["step"]))
    outer = [
        helper.make_node("One", ["a", "k"], ["t"], domain="own", step=[1, 1]),
        helper.make_node("Relu", ["t"], ["r"]),
    ]
    net.functions.append(helper.make_function("own", "Two", ["a", "k"], ["r"], outer, ops))
    weight = net.weight(CHANNELS)
    step = int(rng.integers(1, 3))
    y = net.add("One", net.add("Two", "x", weight, domain="own"), weight, domain="own", step=[step, step])
    return net.case(net.add("Two", y, weight, domain="own"), honest=True)


def scanned(rng: Rng) -> Case:
    net = Net(side_of(rng))
    nodes = [helper.make_node("MatMul", ["row", net.constant(np.ones((net.side, 5)), np.float32)], ["out"])]
    nodes.append(helper.make_node("Identity", ["state"], ["next"]))
    inner = helper.make_graph(
        nodes, "body", [value("state", [1]), value("row", None)], [value("next", [1]), value("out")]
    )
    rows = net.add("Squeeze", "x", net.constant([0]))
    axis = int(rng.integers(2))
    made = ["last", "stacked"]
    start = net.constant([0], np.float32)
    net.add("Scan", start, rows, outputs=made, body=inner, num_scan_inputs=1, scan_input_axes=[axis])
    return net.case(made[1], honest=True)


def batches(rng: Rng) -> Case:
    """A fixed batch, and one that stays open."""
    net = Net(side_of(rng))
    net.inputs.clear()
    batch = int(rng.integers(2, 5)) if (fixed := rng.random() < 0.5) else 1
    image = np.ones((batch, CHANNELS, net.side, net.side), np.float32)
    net.take("x", image, None if fixed else ["N", *image.shape[1:]])
    return net.case(net.conv("x"), honest=True)


def nothing(rng: Rng) -> Case:
    """A dimension of size 0."""
    net = Net(side_of(rng))
    none = net.add("Slice", "x", net.constant([1]), net.constant([1]), net.constant([2]))
    flat = net.add("Reshape", none, net.constant([0, net.side]), allowzero=1)
    return net.case(net.add("MatMul", flat, net.constant(np.ones((net.side, 4)), np.float32)), honest=True)


def old_opset(rng: Rng) -> Case:
    net = Net(side_of(rng), opset=int(rng.integers(7, 10)), ir_version=4)
    y = net.add("Upsample", "x", mode="nearest", scales=[1.0, 1.0, 2.0, float(rng.choice([1.5, 2.0, 3.0]))])
    if net.opset == 9:
        net.nodes.pop()
        y = net.add("Upsample", "x", net.constant([1, 1, 2, 2.5], np.float32), mode="nearest")
    return net.case(net.conv(y), honest=True)


def dynamic_range(rng: Rng) -> Case:
    net = Net(side_of(rng))
    steps = net.add("Range", net.constant(0), net.constant(int(rng.integers(3, 7))), net.constant(2))
    rows = net.add("Gather", "x", steps, axis=2)
    picked, places = "picked", "places"
    net.add("TopK", rows, net.constant([3]), outputs=[picked, places], axis=3)
    return net.case(net.conv(picked), honest=True)


def attended(rng: Rng) -> Case:
    net = Net(side_of(rng), opset=23)
    keys = net.add(
        "Resize", "x", "", "", net.constant([1, CHANNELS, int(rng.integers(3, 9)), net.side]), mode="nearest"
    )
    return net.case(net.add("Attention", "x", keys, keys), honest=True)


_KINDS = (
    *(resized, computed_size, convolution, transposed, pooled, moved, products, recurrent, integer, functions),
    *(scanned, batches, nothing, old_opset, dynamic_range, attended),
)
ODD: Mapping[str, Callable[[Rng], Case]] = {one.__name__.replace("_", " "): one for one in _KINDS}
