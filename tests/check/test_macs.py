"""Counts of small graphs against products written out by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from doconv_convert.check import macs as macs_module
from doconv_convert.check.macs import MacCount, NodeMacs, compare_counts, count_macs, format_macs
from doconv_convert.errors import DoconvError

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
QUANTISED = [weight("s"), weight("z", dtype=np.uint8), weight("q", 8, 3, 3, 3, dtype=np.uint8)]

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
        model([node("QuantizeLinear", "x s z", "u"), node("ConvInteger", "u q")], {"x": [1, 3, 5, 5]}, QUANTISED),
        (8 * 9) * 27,
        8 * 27,
    ),
    "quantised convolution": (
        model(
            [node("QuantizeLinear", "x s z", "u"), node("QLinearConv", "u s z q s z s z")],
            {"x": [1, 3, 5, 5]},
            QUANTISED,
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


def test_weights_from_constant_nodes_and_through_dequantisation() -> None:
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
    with pytest.raises(DoconvError, match=r"dimension 2 of input 'x' is dynamic.*--dim 'height=224'"):
        count_macs(dynamic)
    with pytest.raises(DoconvError, match=r"no dynamic dimension is named 'width'.*'N', 'height'"):
        count_macs(dynamic, {"width": 3})
    with pytest.raises(DoconvError, match="'height' must be at least 1, got 0"):
        count_macs(dynamic, {"height": 0})


def test_a_dimension_without_a_name_is_bound_by_its_place() -> None:
    unnamed = model([node("Conv", "x w b")], {"x": [None, 3, None, 12]}, CONV)
    assert count_macs(unnamed, {"x[2]": 10}).total == 8 * 8 * 10 * 27
    with pytest.raises(DoconvError, match=r"--dim 'x\[2\]=224'"):
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


def test_local_functions_are_looked_into() -> None:
    function = helper.make_function(
        "mine", "Twice", ["a", "m"], ["r"],
        [node("MatMul", "a m", "t"), node("MatMul", "t m", "r")],
        [helper.make_opsetid("", 20)],
    )  # fmt: skip
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


def test_what_cannot_be_counted_is_named() -> None:
    nodes = [
        node("FusedConv", "x w", "a", domain="com.microsoft"),
        node("Conv", "a w", "b"),
        node("Det", "x", "c"),
        node("Einsum", "x x x", "d", equation="abcd,abcd,abcd->a"),
        node("NonExistent", "x", "e"),
        node("Einsum", "x", "f", equation="abcd->dcba"),
        node("Relu", "f"),
    ]
    graph = model(nodes, {"x": [1, 3, 5, 5]}, [CONV[0]], domains=("com.microsoft",))
    uncounted = {"com.microsoft.FusedConv": 1, "Conv": 1, "Det": 1, "Einsum": 1, "NonExistent": 1}
    assert count_macs(graph) == MacCount((), uncounted)


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
        "import sys, doconv_convert.check.macs, doconv_convert.check.graph;"
        "print(*{'torch', 'onnxruntime', 'onnx_ir', 'onnxscript'} & sys.modules.keys())"
    )
    root = Path(macs_module.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == ""
