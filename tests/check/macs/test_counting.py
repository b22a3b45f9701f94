"""Counts of small graphs against products written out by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from doconv_convert.check.macs import counting as macs_module
from doconv_convert.check.macs.counting import count_macs
from doconv_convert.check.macs.figures import compare_counts, format_macs, parse_macs
from doconv_convert.check.macs.result import MacCount, NodeMacs
from doconv_convert.errors import DoconvError, UsageError

Dims = list[int | str | None]


def value(name: str, shape: Dims | None, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def weight(name: str, *shape: int, dtype: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, dtype), name)


def integers(name: str, *numbers: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, Dims],
    initializers: list[onnx.TensorProto] | None = None,
    opset: int = 20,
    domains: tuple[str, ...] = (),
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [value(name, shape) for name, shape in inputs.items()],
        [value(nodes[-1].output[0], None)],
        initializers or [],
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions or [])


def node(op: str, inputs: str, output: str = "y", **attributes: object) -> onnx.NodeProto:
    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(op, names, [output], **attributes)


CONV = [weight("w", 8, 3, 3, 3), weight("b", 8)]
QUANTIZED = [weight("s"), weight("z", dtype=np.uint8), weight("q", 8, 3, 3, 3, dtype=np.uint8)]

SINGLE = {
    "convolution": (
        model([node("Conv", "x w b", strides=[2, 2], pads=[1, 1, 1, 1])], {"x": [2, 3, 10, 12]}, CONV),
        (2 * 8 * 5 * 6) * 3 * 9,
        8 * 27 + 8,
    ),
    "grouped convolution": (
        model([node("Conv", "x w", group=3)], {"x": [1, 6, 5]}, [weight("w", 9, 2, 3)]),
        (9 * 3) * 2 * 3,
        9 * 2 * 3,
    ),
    "transposed convolution": (
        model([node("ConvTranspose", "x w", strides=[2, 2], group=2)], {"x": [1, 4, 5, 5]}, [weight("w", 4, 3, 2, 2)]),
        (4 * 25) * 3 * 4,
        4 * 3 * 4,
    ),
    "integer convolution": (
        model([node("QuantizeLinear", "x s z", "u"), node("ConvInteger", "u q")], {"x": [1, 3, 5, 5]}, QUANTIZED),
        (8 * 9) * 27,
        8 * 27,
    ),
    "quantized convolution": (
        model(
            [node("QuantizeLinear", "x s z", "u"), node("QLinearConv", "u s z q s z s z")],
            {"x": [1, 3, 5, 5]},
            QUANTIZED,
        ),
        (8 * 9) * 27,
        8 * 27,
    ),
    "transposed Gemm": (
        model([node("Gemm", "x w b", transA=1)], {"x": [7, 2]}, [weight("w", 7, 5), weight("b", 5)]),
        2 * 5 * 7,
        7 * 5 + 5,
    ),
    "batched product": (model([node("MatMul", "x y0")], {"x": [4, 1, 2, 3], "y0": [6, 3, 5]}), 4 * 6 * 2 * 5 * 3, 0),
    "dot product": (model([node("MatMul", "x y0")], {"x": [7], "y0": [7]}), 7, 0),
    "einsum": (
        model([node("Einsum", "x w", equation="...ij, kj -> ...ik")], {"x": [2, 3, 4, 5]}, [weight("w", 6, 5)]),
        2 * 3 * 4 * 5 * 6,
        30,
    ),
    "einsum of three, by numpy's implicit rule": (
        model([node("Einsum", "x w v", equation="ij,jk,kl")], {"x": [2, 3]}, [weight("w", 3, 5), weight("v", 5, 7)]),
        2 * 3 * 5 + 2 * 5 * 7,
        15 + 35,
    ),
    "einsum of three, an index summed at once": (
        model(
            [node("Einsum", "x w v", equation="bi,ij,bk->bk")],
            {"x": [2, 3]},
            [weight("w", 3, 5), weight("v", 2, 4)],
        ),
        2 * 3 * 5 + 2 * 4,
        15 + 8,
    ),
    "affine grid": (
        model([node("AffineGrid", "x size")], {"x": [2, 2, 3]}, [integers("size", 2, 3, 5, 7)]),
        2 * 5 * 7 * 2 * 3,
        0,
    ),
    "linear regression": (
        model(
            [node("LinearRegressor", "x", domain="ai.onnx.ml", coefficients=[0.5] * 12, targets=3)],
            {"x": [5, 4]},
            domains=("ai.onnx.ml",),
        ),
        5 * 4 * 3,
        0,
    ),
    "LSTM": (
        model([node("LSTM", "x w r", hidden_size=4)], {"x": [5, 2, 3]}, [weight("w", 1, 16, 3), weight("r", 1, 16, 4)]),
        5 * 2 * 4 * 4 * (3 + 4),
        16 * 7,
    ),
    "bidirectional GRU": (
        model(
            [node("GRU", "x w r", hidden_size=4, direction="bidirectional")],
            {"x": [5, 2, 3]},
            [weight("w", 2, 12, 3), weight("r", 2, 12, 4)],
        ),
        5 * 2 * 2 * 3 * 4 * (3 + 4),
        2 * 12 * 7,
    ),
    "attention, packed, grouped heads": (
        model(
            [node("Attention", "q k v", q_num_heads=4, kv_num_heads=2)],
            {"q": [2, 5, 4 * 8], "k": [2, 7, 2 * 8], "v": [2, 7, 2 * 6]},
            opset=23,
        ),
        2 * 4 * 5 * 7 * (8 + 6),
        0,
    ),
    "attention with a past": (
        model(
            [helper.make_node("Attention", ["q", "k", "v", "", "p", "p"], ["y", "pk", "pv"])],
            {"q": [1, 3, 1, 8], "k": [1, 3, 1, 8], "v": [1, 3, 1, 8], "p": [1, 3, 9, 8]},
            opset=23,
        ),
        3 * 1 * (1 + 9) * (8 + 8),
        0,
    ),
}


@pytest.mark.parametrize("case", SINGLE)
def test_one_node_counts_what_the_formula_says(case: str) -> None:
    graph, macs, parameters = SINGLE[case]
    counted = count_macs(graph)
    assert [(n.macs, n.parameters) for n in counted.nodes] == [(macs, parameters)]
    assert counted.total == macs
    assert counted.uncounted == {}


def test_weights_from_constant_nodes_and_through_dequantization() -> None:
    graph = model(
        [
            helper.make_node("Constant", [], ["c"], value=weight("ignored", 8, 3, 3, 3)),
            node("Conv", "x c", "a"),
            node("DequantizeLinear", "q s", "d"),
            node("Conv", "a d"),
        ],
        {"x": [1, 3, 6, 6]},
        [weight("q", 2, 8, 1, 1, dtype=np.int8), weight("s")],
    )
    assert [(n.macs, n.parameters) for n in count_macs(graph).nodes] == [(8 * 16 * 27, 216), (2 * 16 * 8, 16)]


def test_large_weights_need_no_data(tmp_path: Path) -> None:
    graph = model([node("Conv", "x w b")], {"x": [1, 3, 10, 12]}, CONV)
    onnx.save(graph, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    assert count_macs(tmp_path / "m.onnx") == count_macs(graph)


def test_the_batch_defaults_to_one_and_other_dimensions_must_be_bound() -> None:
    dynamic = model([node("Conv", "x w b")], {"x": ["N", 3, "height", 12]}, CONV)
    assert count_macs(dynamic, {"height": 10}).total == 8 * 8 * 10 * 27
    assert count_macs(dynamic, {"height": 10, "N": 5}).total == 5 * 8 * 8 * 10 * 27
    with pytest.raises(DoconvError, match=r"dimension 2 of input 'x' is dynamic.*`dims` 'height=224'"):
        count_macs(dynamic)
    with pytest.raises(DoconvError, match=r"no dynamic dimension is named 'width'.*'N', 'height'"):
        count_macs(dynamic, {"width": 3})
    with pytest.raises(DoconvError, match="'height' must be at least 1, got 0"):
        count_macs(dynamic, {"height": 0})


@pytest.mark.parametrize("inputs", [{"x": ["N", 3, "N", 12]}, {"x": ["N", 3, 10, 12], "z": [1, "N"]}])
def test_a_height_that_is_named_like_the_batch_is_not_1(inputs: dict[str, Dims]) -> None:
    """onnxruntime takes any sizes for dimensions of one name."""
    dynamic = model([node("Conv", "x w b")], inputs, CONV)
    with pytest.raises(DoconvError, match="is dynamic: give its size, as in `dims` 'N=224'"):
        count_macs(dynamic)
    assert count_macs(dynamic, {"N": 10}).total == 10 * 8 * 8 * 10 * 27


def test_a_sparse_default_may_be_replaced_too() -> None:
    sparse = helper.make_sparse_tensor(weight("w", 2), integers("at", 0, 7), [3, 5])
    graph = model([node("MatMul", "x w")], {"x": [4, 3], "w": [3, None]})
    graph.graph.sparse_initializer.append(sparse)
    assert count_macs(graph).claimed == ("w",)
    graph.ir_version = 3
    assert count_macs(graph).claimed == ()


def test_a_dimension_without_a_name_is_bound_by_its_place() -> None:
    unnamed = model([node("Conv", "x w b")], {"x": [None, 3, None, 12]}, CONV)
    assert count_macs(unnamed, {"x[2]": 10}).total == 8 * 8 * 10 * 27
    with pytest.raises(DoconvError, match=r"`dims` 'x\[2\]=224'"):
        count_macs(unnamed)


def test_sizes_that_the_graph_computes_are_followed() -> None:
    """A resize to half the input's size, through the division that an exporter writes."""
    graph = model(
        [
            node("Shape", "x", "shape"),
            node("Cast", "shape", "real", to=TensorProto.FLOAT),
            node("Div", "real two", "halved"),
            node("Floor", "halved", "floored"),
            node("Cast", "floored", "size", to=TensorProto.INT64),
            node("Resize", "x - - size", "small"),
            node("Conv", "small w"),
        ],
        {"x": ["N", 3, "h", 20]},
        [
            numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "two"),
            weight("w", 4, 3, 1, 1),
        ],
    )
    assert count_macs(graph, {"h": 30}) == MacCount((NodeMacs("y", "Conv", "y", 4 * 15 * 10 * 3, 12),), {})


def test_a_stale_shape_in_the_file_does_not_count() -> None:
    graph = model([node("Conv", "x w", "a"), node("Conv", "a v")], {"x": ["N", 3, "s", "s"]}, [CONV[0]])
    graph.graph.initializer.append(weight("v", 2, 8, 1, 1))
    graph.graph.value_info.append(value("a", [1, 8, 99, 99]))
    assert [n.macs for n in count_macs(graph, {"s": 5}).nodes] == [8 * 9 * 27, 2 * 9 * 8]


def branch(op: str, *weights: onnx.TensorProto) -> onnx.GraphProto:
    nodes = [helper.make_node(op, ["x", *(w.name for w in weights)], [f"{op}_out"], name="inner")]
    return helper.make_graph(nodes, op, [], [value(f"{op}_out", None)], weights)


def test_an_if_counts_its_costlier_branch() -> None:
    branches = {"then_branch": branch("Relu"), "else_branch": branch("MatMul", weight("w", 3, 3))}
    graph = model([node("If", "c", "z", **branches), node("MatMul", "z x")], {"x": [3, 3], "c": []})
    graph.graph.input[1].type.tensor_type.elem_type = TensorProto.BOOL
    assert [(n.name, n.macs) for n in count_macs(graph).nodes] == [("z/else_branch/inner", 27), ("y", 27)]


@pytest.mark.parametrize(("condition", "macs"), [(True, 0), (False, 27)])
def test_an_if_on_a_constant_counts_the_branch_it_takes(condition: bool, macs: int) -> None:
    branches = {"then_branch": branch("Relu"), "else_branch": branch("MatMul", weight("w", 3, 3))}
    graph = model([node("If", "c", **branches)], {"x": [3, 3]}, [numpy_helper.from_array(np.array(condition), "c")])
    assert count_macs(graph).total == macs


def loop(body_op: str = "MatMul", turns: str = "turns") -> onnx.ModelProto:
    body = helper.make_graph(
        [node("Identity", "go", "go_on"), node(body_op, "state w", "next")],
        "body",
        [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("state", None)],
        [value("go_on", [], TensorProto.BOOL), value("next", None)],
    )
    graph = model([node("Loop", f"{turns} - x", body=body)], {"x": [2, 3]}, [weight("w", 3, 3), integers("turns", 4)])
    graph.graph.input.append(value("given", [1], TensorProto.INT64))
    return graph


def test_a_loop_counts_if_its_turns_are_known() -> None:
    assert [(n.name, n.macs) for n in count_macs(loop()).nodes] == [("y/body/next", 4 * 2 * 3 * 3)]
    assert count_macs(loop(turns="given")) == MacCount((), {"Loop": 1})
    assert count_macs(loop("Add", turns="given")) == MacCount((), {})


def test_a_loop_whose_state_grows_is_uncounted() -> None:
    graph = loop()
    body = graph.graph.node[0].attribute[0].g
    body.node.append(node("Concat", "next next", "longer", axis=0))
    body.output[1].name = "longer"
    assert count_macs(graph) == MacCount((), {"Loop": 1})


def scan(**attributes: object) -> onnx.ModelProto:
    """A state of (2, 3) and slices of (4, 3) give the next state, and (2, 4) a slice."""
    body = helper.make_graph(
        [node("MatMul", "state w", "next"), node("Gemm", "state slice", "out", transB=1)],
        "body",
        [value("state", None), value("slice", None)],
        [value("next", None), value("out", None)],
    )
    scanned: Dims = [4, 5, 3] if attributes else [5, 4, 3]
    made = [
        helper.make_node(
            "Scan", ["x", "s"], ["last", "stacked"], name="scan", body=body, num_scan_inputs=1, **attributes
        ),
        node("MatMul", "stacked v"),
    ]
    return model(made, {"x": [2, 3], "s": scanned}, [weight("w", 3, 3), weight("v", 4, 6)])


@pytest.mark.parametrize("attributes", [{}, {"scan_input_axes": [1]}])
def test_a_scan_counts_its_body_once_a_slice(attributes: dict[str, object]) -> None:
    counted = count_macs(scan(**attributes))
    assert [(n.name, n.macs) for n in counted.nodes] == [
        ("scan/body/next", 5 * 2 * 3 * 3),
        ("scan/body/out", 5 * 2 * 4 * 3),
        ("y", 5 * 2 * 4 * 6),
    ]
    assert counted.uncounted == {}
    assert counted.assumed == ("Scan 'scan' takes 5 turns",)


def test_a_scan_of_unknown_length_is_uncounted() -> None:
    graph = scan()
    graph.graph.node.insert(0, node("Compress", "s0 c", "s", axis=0))
    graph.graph.input[1].name = "s0"
    graph.graph.input.append(value("c", [5], TensorProto.BOOL))
    assert count_macs(graph) == MacCount((), {"Scan": 1, "MatMul": 1})


def test_a_value_of_a_million_dimensions_is_unknown() -> None:
    """Their product would take minutes."""
    graph = model([node("MatMul", "x w")], {"x": [2, 2]})
    graph.graph.initializer.append(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2] * 1_000_000))
    assert count_macs(graph) == MacCount((), {"MatMul": 1})
    with pytest.raises(DoconvError, match="input 'x' has more than 64 dimensions"):
        count_macs(model([node("Relu", "x")], {"x": [2] * 65}))


def test_what_was_assumed_is_said() -> None:
    dynamic = model([node("Conv", "x w b")], {"x": ["N", 3, 10, 12]}, CONV)
    assert count_macs(dynamic).assumed == ("dimension 'N' is 1; `dims` 'N=N' for another size",)
    assert count_macs(dynamic, {"N": 1}).assumed == ()
    branches = {"then_branch": branch("Relu"), "else_branch": branch("MatMul", weight("w", 3, 3))}
    graph = model([node("If", "c", "z", **branches)], {"x": [3, 3], "c": []})
    assert count_macs(graph).assumed == ("If 'z' takes its costlier branch, else_branch",)
    assert count_macs(loop()).assumed == ("Loop 'y' takes 4 turns",)


def test_a_question_mark_is_no_dimensions_name() -> None:
    """As paddle2onnx writes them: two dimensions, each with its own size."""
    graph = model([node("Conv", "x w b")], {"x": [1, 3, "?", "?"]}, CONV)
    assert count_macs(graph, {"x[2]": 10, "x[3]": 12}).total == 8 * 8 * 10 * 27


@pytest.mark.parametrize("kind", ["value_ints", "sparse_value", "sparse initializer"])
def test_constants_in_every_form(kind: str) -> None:
    sparse = helper.make_sparse_tensor(weight("w", 2), integers("at", 0, 7), [3, 5])
    graph = model([node("Reshape", "x shape", "a"), node("MatMul", "a w")], {"x": [2, 6]}, [weight("w", 3, 5)])
    graph.graph.node.insert(0, helper.make_node("Constant", [], ["shape"], value_ints=[4, 3]))
    if kind != "value_ints":
        del graph.graph.initializer[:]
    if kind == "sparse_value":
        graph.graph.node.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    if kind == "sparse initializer":
        graph.graph.sparse_initializer.append(sparse)
    assert [(n.macs, n.parameters) for n in count_macs(graph).nodes] == [(4 * 3 * 5, 15)]


@pytest.mark.parametrize("opset", [20, 11])
def test_local_functions_are_looked_into(opset: int) -> None:
    """Also one that is written for another opset than the graph's: ReduceSum took its axes as an attribute."""
    twice = [node("MatMul", "a m", "t"), node("MatMul", "t m", "r")]
    if opset == 11:
        twice.insert(0, node("ReduceSum", "a", "unused", axes=[1]))
    function = helper.make_function("mine", "Twice", ["a", "m"], ["r"], twice, [helper.make_opsetid("", opset)])
    graph = model(
        [node("Twice", "x w", domain="mine")],
        {"x": [2, 3]},
        [weight("w", 3, 3)],
        domains=("mine",),
        functions=[function],
    )
    counted = count_macs(graph)
    assert [(n.macs, n.parameters) for n in counted.nodes] == [(18, 9), (18, 9)]
    assert counted.uncounted == {}


def test_a_functions_attributes_are_those_of_its_call() -> None:
    convolve = node("Conv", "a k", "r")
    convolve.attribute.add(name="strides", ref_attr_name="step", type=onnx.AttributeProto.INTS)
    function = helper.make_function(
        "mine", "Convolve", ["a", "k"], ["r"], [convolve], [helper.make_opsetid("", 20)], attributes=["step"]
    )
    made = [
        node("Convolve", "x w", "a", domain="mine", step=[2, 2]),
        node("Convolve", "x w", domain="mine", name="whole"),
    ]
    graph = model(made, {"x": [1, 3, 9, 9]}, [CONV[0]], domains=("mine",), functions=[function])
    assert [(n.name, n.macs) for n in count_macs(graph).nodes] == [
        ("a/r", 8 * 4 * 4 * 27),
        ("whole/r", 8 * 7 * 7 * 27),
    ]


def test_what_cannot_be_counted_is_named() -> None:
    nodes = [
        node("Inverse", "x", "a", domain="com.microsoft"),
        node("Conv", "a w", "b"),
        node("Det", "x", "c"),
        node("Einsum", "x a", "d", equation="abcd,abcd->a"),
        node("NonExistent", "x", "e"),
        node("Einsum", "x", "f", equation="abcd->dcba"),
        node("Relu", "f"),
    ]
    graph = model(nodes, {"x": [1, 3, 5, 5]}, [CONV[0]], domains=("com.microsoft",))
    uncounted = {"com.microsoft.Inverse": 1, "Conv": 1, "Det": 1, "Einsum": 1, "NonExistent": 1}
    assert count_macs(graph) == MacCount((), uncounted)
    assert count_macs(graph, ignore=uncounted) == MacCount((), {})


def test_a_convolution_whose_input_size_depends_on_the_data_is_uncounted() -> None:
    nodes = [node("Compress", "x c", "some", axis=2), node("Conv", "some w")]
    graph = model(nodes, {"x": [1, 3, 5, 5], "c": [5]}, [CONV[0]])
    graph.graph.input[1].type.tensor_type.elem_type = TensorProto.BOOL
    assert count_macs(graph) == MacCount((), {"Conv": 1})


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(DoconvError, match=r"m\.onnx"):
        count_macs(tmp_path / "m.onnx")
    with pytest.raises(DoconvError, match="absent"):
        count_macs(tmp_path / "absent.onnx")


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("4.1G", 4_100_000_000),
        ("10K", 10_000),
        ("312.4 MMACs", 312_400_000),
        ("1814073344", 1_814_073_344),
        ("0", 0),
        ("2.5", 2),
    ],
)
def test_a_budget_is_read_exactly(text: str, macs: int) -> None:
    assert parse_macs(text) == macs


@pytest.mark.parametrize("text", ["", "G", "4,1G", "-1", "4.1 GFLOPs", "nan", "inf", "4.1X"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected MACs such as 4\.1G"):
        parse_macs(text)


@pytest.mark.parametrize(
    ("macs", "text"),
    [
        (0, "0 MACs"),
        (123, "123 MACs"),
        (12_340, "12.34 kMACs"),
        (312_400_000, "312.4 MMACs"),
        (999_960_000, "1.000 GMACs"),
        (1_814_073_344, "1.814 GMACs"),
        (2 * 10**12, "2.000 TMACs"),
    ],
)
def test_the_unit_is_always_printed(macs: int, text: str) -> None:
    assert format_macs(macs) == text


def test_counts_are_compared_by_position() -> None:
    a = MacCount((NodeMacs("a", "Conv", "x", 10, 3), NodeMacs("b", "Gemm", "y", 20, 4)), {})
    renamed = MacCount((NodeMacs("c", "Conv", "u", 10, 3), NodeMacs("d", "Gemm", "v", 20, 4)), {})
    assert compare_counts(a, renamed) == []
    moved = MacCount((NodeMacs("a", "Conv", "x", 20, 3), NodeMacs("b", "Gemm", "y", 10, 4)), {})
    assert len(compare_counts(a, moved)) == 2  # the totals are equal and the nodes are not
    shorter = MacCount(a.nodes[:1], {"Loop": 1})
    assert compare_counts(a, shorter) == [
        "total: expected 30 MACs (30) got 10 MACs (10)",
        "multiplying nodes: expected 2 got 1",
        "uncounted Loop nodes: expected 0 got 1",
    ]


def test_neither_torch_nor_onnxruntime_is_imported() -> None:
    code = (
        "import sys, doconv_convert.check.macs.counting, doconv_convert.check.onnx_files.graph_diff;"
        "print(*{'torch', 'onnxruntime', 'onnx_ir', 'onnxscript'} & sys.modules.keys())"
    )
    root = Path(macs_module.__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == ""
