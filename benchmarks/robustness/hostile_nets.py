"""ONNX files that onnxruntime runs and that a counter may get wrong: kinds of them, each drawn from a seed.

Every kind is a function of a numpy generator that returns a Case. A hostile one may be counted too high, be refused or
have its sizes called into question, never be counted below what runs; an `honest` one must be counted exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Rng = np.random.Generator
INT64, BOOL, FLOAT = TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT
CHANNELS = 3


@dataclass
class Case:
    """A model and what it is run on; `ignore` are the operators that a user would call harmless."""

    model: onnx.ModelProto
    feeds: Mapping[str, Any]
    honest: bool = False
    ignore: tuple[str, ...] = ()


@dataclass
class Net:
    """A graph in the making, with one image `x` of (1, 3, side, side), whose side stays open where it is negative."""

    side: int
    opset: int = 20
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    claims: list[onnx.ValueInfoProto] = field(default_factory=list)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    domains: dict[str, int] = field(default_factory=dict)
    feeds: dict[str, Any] = field(default_factory=dict)
    ir_version: int = 10

    def __post_init__(self) -> None:
        self.take("x", np.full((1, CHANNELS, self.side, self.side), 2, np.float32))

    def take(self, name: str, value: Any, shape: Sequence[Any] | None = None) -> str:
        """An input, with what it is fed."""
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(value.shape) if shape is None else shape))
        self.feeds[name] = value
        return name

    def constant(self, value: Any, kind: Any = np.int64, name: str | None = None) -> str:
        name = name or f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.array(value, kind), name))
        return name

    def add(
        self, op: str, *inputs: str, outputs: Sequence[str] | None = None, domain: str = "", **attributes: Any
    ) -> str:
        made = list(outputs or [f"v{len(self.nodes)}"])
        self.nodes.append(helper.make_node(op, list(inputs), made, domain=domain, **attributes))
        if domain:
            self.domains.setdefault(domain, 1)
        return made[0]

    def weight(self, width: int = 8, kernel: int = 3, channels: int = CHANNELS) -> str:
        return self.constant(np.full((width, channels, kernel, kernel), 0.01), np.float32)

    def conv(self, value: str, width: int = 8, kernel: int = 3, channels: int = CHANNELS, **attributes: Any) -> str:
        return self.add("Conv", value, self.weight(width, kernel, channels), pads=[kernel // 2] * 4, **attributes)

    def claim(self, name: str, *shape: int) -> None:
        self.claims.append(helper.make_tensor_value_info(name, FLOAT, shape))

    def case(self, output: str, *, honest: bool = False, ignore: Sequence[str] = ()) -> Case:
        graph = helper.make_graph(
            self.nodes, "net", self.inputs, [onnx.ValueInfoProto(name=output)], self.tensors, value_info=self.claims
        )
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(*one) for one in self.domains.items())]
        model = helper.make_model(graph, opset_imports=opsets, functions=self.functions, ir_version=self.ir_version)
        return Case(model, self.feeds, honest, tuple(ignore))


def value(name: str, shape: Sequence[int] | None = None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def side_of(rng: Rng) -> int:
    return int(rng.integers(6, 20))


def branch(name: str, net: Net, heavy: bool) -> onnx.GraphProto:
    """A branch that convolves `x`, or only hands it on."""
    made = f"{name}_out"
    ins = ["x", net.weight()] if heavy else ["x"]
    node = helper.make_node(
        "Conv" if heavy else "Identity", ins, [made], name=name, **({"pads": [1] * 4} if heavy else {})
    )
    return helper.make_graph([node], name, [], [value(made)])


def choose(net: Net, condition: str, heavy_if: bool) -> str:
    """An If of which one branch multiplies."""
    branches = {"then_branch": branch("yes", net, heavy_if), "else_branch": branch("no", net, not heavy_if)}
    return net.add("If", condition, **branches)


def body(net: Net, *, heavy: bool = True, tag: str = "") -> onnx.GraphProto:
    """A loop's body that convolves `x` once a turn; its own names end in `tag`."""
    turn, go, state, go_on, made, mean, last = (f"{n}{tag}" for n in ("i", "go", "s", "go_on", "t", "mean", "s_out"))
    nodes = [helper.make_node("Identity", [go], [go_on])]
    if heavy:
        nodes.append(helper.make_node("Conv", ["x", net.weight()], [made], pads=[1] * 4))
        nodes.append(helper.make_node("ReduceMean", [made], [mean], keepdims=0))
    nodes.append(helper.make_node("Identity", [mean if heavy else state], [last]))
    inputs = [value(turn, [], INT64), value(go, [], BOOL), value(state, [])]
    return helper.make_graph(nodes, "body", inputs, [value(go_on, [], BOOL), value(last, [])])


def negative_turns(rng: Rng) -> Case:
    net = Net(side_of(rng))
    y = net.conv("x", 16)
    turns, go, start = (
        net.constant(int(rng.integers(-(2**40), 0))),
        net.constant(True, bool),
        net.constant(0.0, np.float32),
    )
    net.add("Loop", turns, go if rng.random() < 0.5 else "", start, body=body(net))
    return net.case(y)


def loop_turns(rng: Rng) -> Case:
    """Constant turns, stopped at the start or not."""
    net = Net(side_of(rng))
    turns = net.constant(int(rng.integers(0, 5))) if rng.random() < 0.7 else net.constant([2])
    go = net.constant(bool(rng.random() < 0.7), bool) if rng.random() < 0.8 else ""
    return net.case(net.add("Loop", turns, go, net.constant(0.0, np.float32), body=body(net)), honest=True)


def hidden_names(rng: Rng) -> Case:
    """A body's own value has the name of a constant outside, and decides a branch or a number of turns."""
    net = Net(side_of(rng))
    hidden = net.constant(False, bool, "hidden")
    kind = int(rng.integers(3))
    if kind == 0:  # the loop's own condition, which is true
        inner = body(net, heavy=False)
        inner.input[1].name = inner.node[0].input[0] = hidden
        node = choose_node(net, hidden)
    else:  # the number of the turn, which a Loop inside takes for its number of turns
        net.constant(0, np.int64, "count")
        inner = body(net, heavy=False)
        inner.input[0].name = "count"
        deeper = body(net, tag="2")
        node = helper.make_node("Loop", ["count", "", "s"], ["inner_out"], body=deeper)
    inner.node.append(node)
    turns, go = net.constant(int(rng.integers(2, 5))), net.constant(True, bool)
    return net.case(net.add("Loop", turns, go, net.constant(0.0, np.float32), body=inner))


def choose_node(net: Net, condition: str) -> onnx.NodeProto:
    name = choose(net, condition, True)
    node = net.nodes.pop()
    node.output[0] = f"{name}_inside"
    return node


def shadowing_function(rng: Rng) -> Case:
    """A function with an operator's name: onnxruntime runs the operator."""
    net = Net(side_of(rng))
    domain = str(rng.choice(["", "ai.onnx", "com.microsoft"]))
    op = "Conv" if domain != "com.microsoft" else "FusedConv"
    ops = [helper.make_opsetid("", 20)]
    overload = "other" if rng.random() < 0.3 else ""
    idle = [helper.make_node("Identity", ["X"], ["Y"])]
    function = helper.make_function(domain, op, ["X", "W"], ["Y"], idle, ops, ["pads"])
    function.overload = overload
    net.functions.append(function)
    y = net.add(op, "x", net.weight(), domain=domain, pads=[1] * 4)
    net.nodes[-1].overload = overload
    net.domains.pop("ai.onnx", None)
    return net.case(y)


def grown(net: Net, rng: Rng) -> str:
    """`x` made larger, by a factor that is computed from its values: 2."""
    most = net.add("ReduceMax", "x", keepdims=0)
    factor = net.add("Unsqueeze", net.add("Cast", most, to=INT64), net.constant([0]))
    kind = int(rng.integers(4))
    if kind == 0:
        side = net.add("Mul", factor, net.constant([net.side]))
        size = net.add("Concat", net.constant([1, CHANNELS]), side, side, axis=0)
        return net.add("Resize", "x", "", "", size, mode="nearest")
    repeats = net.add("Concat", net.constant([1, 1]), factor, factor, axis=0)
    if kind == 1:
        return net.add("Tile", "x", repeats)
    if kind == 2:
        pads = net.add("Concat", net.constant([0, 0]), factor, factor, net.constant([0, 0]), factor, factor, axis=0)
        return net.add("Pad", "x", pads)
    mask = net.add("Cast", net.add("Expand", factor, net.constant([net.side])), to=BOOL)
    return net.add("Compress", "x", mask, axis=2)


def claimed_size(rng: Rng) -> Case:
    net = Net(side_of(rng))
    big = grown(net, rng)
    net.claim(big, 1, CHANNELS, 1, 1)
    later = net.add("Relu", big) if rng.random() < 0.5 else big
    return net.case(net.conv(later, name="conv"))


def claimed_shape_steers(rng: Rng) -> Case:
    """A claimed size picks a branch or a number of turns."""
    net = Net(side_of(rng))
    big = grown(net, rng)
    net.claim(big, 1, CHANNELS, 1, 1)
    side = net.add("Gather", net.add("Shape", big), net.constant(3))
    if rng.random() < 0.5:
        small = net.add("Equal", side, net.constant(1))
        return net.case(choose(net, small, False))
    return net.case(net.add("Loop", side, "", net.constant(0.0, np.float32), body=body(net)))


def claimed_output(rng: Rng) -> Case:
    """The graph's declared outputs, in a subgraph and at the top, lie too."""
    net = Net(side_of(rng))
    big = grown(net, rng)
    y = net.conv(net.add("Identity", big))
    made = net.case(y)
    del made.model.graph.output[:]
    made.model.graph.output.extend([value(y, [1, 8, 1, 1]), value(big, [1, CHANNELS, 1, 1])])
    return made


def unknown_to_us(rng: Rng) -> Case:
    """An operator of onnxruntime's that the counter does not know, ignored by the user; a stale size follows it."""
    net = Net(side_of(rng))
    crop = net.constant([[0, 0, 1, 1]], np.float32)
    size = net.constant([net.side, net.side], np.int32)
    out = net.add("CropAndResize", "x", crop, net.constant([0], np.int32), size, domain="com.microsoft")
    net.claim(out, 1, CHANNELS, 2, 2)
    return net.case(net.conv(out), ignore=("com.microsoft.CropAndResize",))


def open_default(rng: Rng) -> Case:
    """A caller replaces an initializer that is an input, too."""
    net = Net(side_of(rng))
    kind = int(rng.integers(4))
    if kind == 0:
        name = net.constant(False, bool, "open")
        net.take(name, np.array(True))
        return net.case(choose(net, name, True))
    if kind == 1:
        name = net.constant(0, np.int64, "open")
        net.take(name, np.array(3, np.int64))
        return net.case(net.add("Loop", name, "", net.constant(0.0, np.float32), body=body(net)))
    if kind == 2:
        name = net.constant([1, CHANNELS, 2, 2], np.int64, "open")
        net.take(name, np.array([1, CHANNELS, 30, 30], np.int64))
        big = net.add("Resize", "x", "", "", name, mode="nearest")
        net.claim(big, 1, CHANNELS, 2, 2)
        return net.case(net.conv(big))
    name = net.constant(np.ones((1, CHANNELS, 1, 1)), np.float32, "open")
    wide = np.ones((16, CHANNELS, 3, 3), np.float32)
    net.take(name, wide, ["width", CHANNELS, "kernel", "kernel"] if rng.random() < 0.5 else [None] * 4)
    return net.case(net.add("Conv", "x", name))


def old_default(rng: Rng) -> Case:
    """Before IR version 4 an initializer that is an input can not be replaced."""
    net = Net(side_of(rng), opset=8, ir_version=3)
    name = net.constant(np.ones((4, CHANNELS, 3, 3)), np.float32)
    net.inputs.append(value(name, [4, CHANNELS, 3, 3]))
    return net.case(net.add("Conv", "x", name, pads=[1] * 4), honest=True)


def arithmetic(rng: Rng) -> Case:
    """Constants that libraries compute differently pick a branch."""
    net = Net(side_of(rng))
    kind = int(rng.integers(7))
    f, i = (lambda v: net.constant(v, np.float32)), net.constant
    if kind == 0:
        a, b = int(rng.integers(-50, 50)), int(rng.choice([-7, -3, 2, 5]))
        found, wanted = net.add("Div", i(a), i(b)), i(int(rng.integers(-9, 9)))
    elif kind == 1:
        found, wanted = net.add("Cast", f([np.inf, -np.inf, np.nan, 1e30][rng.integers(4)]), to=INT64), i(2**63 - 1)
    elif kind == 2:
        found, wanted = net.add("Round", f(float(rng.integers(-4, 4)) + 0.5)), f(float(rng.integers(-4, 4)))
    elif kind == 3:
        small = net.add("Cast", f(float(rng.integers(-300, 600)) + 0.7), to=TensorProto.UINT8)
        found, wanted = net.add("Cast", small, to=INT64), i(int(rng.integers(0, 256)))
    elif kind == 4:
        found, wanted = (
            net.add("Mod", i(int(rng.integers(-9, 9))), i(int(rng.choice([-4, 3])))),
            i(int(rng.integers(-3, 3))),
        )
    elif kind == 5:
        found, wanted = net.add("Mul", i(2**62 + 1), i(int(rng.integers(2, 9)))), i(int(rng.integers(2, 9)))
    else:
        found, wanted = net.add("Div", f(1.0), f(0.0)), f(np.inf)
    return net.case(choose(net, net.add("Equal", found, wanted), bool(rng.random() < 0.5)))


def grown_sequence(rng: Rng) -> Case:
    """A sequence whose first element is small, and larger ones come in a loop; or one whose elements are claimed."""
    net = Net(side_of(rng))
    if rng.random() < 0.4:
        made = helper.make_tensor_sequence_value_info("q", FLOAT, [1, CHANNELS, 1, 1])
        net.inputs.append(made)
        net.feeds["q"] = [np.ones((1, CHANNELS, 9, 9), np.float32)]
        return net.case(net.conv(net.add("SequenceAt", "q", net.constant(0))))
    small = net.add("Slice", "x", net.constant([0]), net.constant([1]), net.constant([2]))
    start = net.add("SequenceConstruct", small)
    if rng.random() < 0.4:
        pieces = net.constant([1, net.side - 1]) if rng.random() < 0.5 else net.constant(net.side - 1)
        parts = net.add("SplitToSequence", "x", pieces, axis=2)
        if rng.random() < 0.5:
            parts = net.add("SequenceConstruct", small, "x")
        return net.case(net.conv(net.add("SequenceAt", parts, net.constant(int(rng.integers(2))))))
    nodes = [
        helper.make_node("Identity", ["go"], ["go_on"]),
        helper.make_node("SequenceInsert", ["s", "x"], ["longer"]),
    ]
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(FLOAT, None))
    states = [helper.make_value_info(name, kind) for name in ("s", "longer")]
    inputs = [value("i", [], INT64), value("go", [], BOOL), states[0]]
    inner = helper.make_graph(nodes, "body", inputs, [value("go_on", [], BOOL), states[1]])
    last = net.add("Loop", net.constant(2), "", start, body=inner)
    return net.case(net.conv(net.add("SequenceAt", last, net.constant(1))))


def unlike_branches(rng: Rng) -> Case:
    """Branches of different sizes, picked by a value; products inside and after."""
    net = Net(side_of(rng))
    condition = net.add("Greater", net.add("ReduceMax", "x", keepdims=0), net.constant(1.0, np.float32))
    if rng.random() < 0.5:
        condition = net.take("pick", np.array(True))
    big = helper.make_node("Concat", ["x", "x"], ["big"], axis=2)
    small = helper.make_node("Identity", ["x"], ["small"])
    graphs = [helper.make_graph([one], one.output[0], [], [value(one.output[0])]) for one in (big, small)]
    either = net.add("If", condition, then_branch=graphs[0], else_branch=graphs[1])
    if rng.random() < 0.5:
        net.claim(either, 1, CHANNELS, net.side, net.side)
    return net.case(net.conv(either))


def twice_defined(rng: Rng) -> Case:
    """Two constants of one name: onnxruntime takes the later one."""
    net = Net(side_of(rng))
    net.constant([1, 1], np.int64, "twice")
    net.nodes.append(helper.make_node("Constant", [], ["twice"], value_ints=[3, 3]))
    repeats = net.add("Concat", net.constant([1, 1]), "twice", axis=0)
    return net.case(net.conv(net.add("Tile", "x", repeats)))


def claimed_inside(rng: Rng) -> Case:
    """A claim in a loop's body, on what it carries, or in a function's body."""
    net = Net(side_of(rng))
    if rng.random() < 0.5:
        net.weight(CHANNELS)
        nodes = [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Conv", ["s", net.tensors[-1].name], ["used"], pads=[1] * 4),
            helper.make_node("Tile", ["used", net.constant([1, 1, 2, 1])], ["longer"]),
            helper.make_node("ReduceMax", ["longer"], ["most"], keepdims=0),
            helper.make_node("Greater", ["most", net.constant(-1e30, np.float32)], ["all"]),
            helper.make_node("Expand", ["all", net.add("Shape", "x")], ["wide"]),
            helper.make_node("Compress", ["longer", net.constant([True] * 2 * net.side, bool)], ["cut"], axis=2),
        ]
        inputs = [value("i", [], INT64), value("go", [], BOOL), value("s", None)]
        cut = value("cut", [1, CHANNELS, net.side, net.side])
        inner = helper.make_graph(nodes, "body", inputs, [value("go_on", [], BOOL), cut])
        return net.case(net.add("Loop", net.constant(3), "", "x", body=inner))
    big = grown(net, rng)
    ops = [helper.make_opsetid("", 20)]
    convolve = helper.make_node("Conv", ["b", "k"], ["r"], pads=[1] * 4)
    function = helper.make_function(
        "own", "F", ["a", "k"], ["r"], [helper.make_node("Relu", ["a"], ["b"]), convolve], ops
    )
    function.value_info.append(value("b", [1, CHANNELS, 1, 1]))
    net.functions.append(function)
    return net.case(net.add("F", big, net.weight(), domain="own"))


def two_values(rng: Rng) -> Case:
    """A Constant with two values."""
    net = Net(side_of(rng))
    names = ["value_ints", "value"] if rng.random() < 0.5 else ["value", "value_ints"]
    given = {"value_ints": [1, 1, 1, 1], "value": numpy_helper.from_array(np.array([1, 1, 3, 3]), "v")}
    node = helper.make_node("Constant", [], ["repeats"])
    node.attribute.extend(helper.make_attribute(name, given[name]) for name in names)
    net.nodes.append(node)
    return net.case(net.conv(net.add("Tile", "x", "repeats")))


HOSTILE: Mapping[str, Callable[[Rng], Case]] = {
    "a negative number of turns": negative_turns,
    "names that hide others": hidden_names,
    "functions that shadow operators": shadowing_function,
    "claimed sizes": claimed_size,
    "claimed sizes that steer": claimed_shape_steers,
    "declared outputs": claimed_output,
    "an ignored operator": unknown_to_us,
    "defaults that a caller replaces": open_default,
    "arithmetic that differs": arithmetic,
    "sequences that grow": grown_sequence,
    "branches of different sizes": unlike_branches,
    "a name defined twice": twice_defined,
    "claims inside": claimed_inside,
    "a constant of two values": two_values,
}
HONEST_CONTROL: Mapping[str, Callable[[Rng], Case]] = {"turns of a loop": loop_turns, "IR version 3": old_default}
