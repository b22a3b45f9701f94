"""The arithmetic on constants, operator by operator, against onnxruntime."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from doconv_convert.check.macs.constants import OPERATORS, evaluate

RNG = np.random.default_rng(0)
INT, FLOAT, BOOL = np.int64, np.float32, bool


def ints(*shape: int, low: int = -9, kind: Any = INT) -> Any:
    return RNG.integers(low, 9, shape).astype(kind)


def floats(*shape: int) -> Any:
    return (4 * RNG.standard_normal(shape)).astype(FLOAT)


def at(*numbers: int) -> Any:
    return np.array(numbers, INT)


PAIRS = "Add Sub Mul Min Max Equal Less LessOrEqual Greater GreaterOrEqual".split()  # noqa: SIM905
# start, end, axis, step
SLICES = [
    (1, 4, 0, 1),
    (-3, 2**62, 0, 2),
    (-1, -(2**62), 0, -1),
    (5, 1, 1, -2),
    (9, -9, 0, -1),
    (3, 3, -1, 1),
    (4, 0, 0, -1),
]
CASES: list[tuple[str, Sequence[Any], dict[str, Any]]] = [
    *((op, [made(3, 1), made(4)], {}) for op in PAIRS for made in (ints, floats)),
    *(("Div", [ints(40), sign * ints(40, low=1)], {}) for sign in (1, -1)),
    ("Div", [floats(9), floats(9)], {}),
    *(("Div", [ints(40, kind=np.int32), ints(40, low=1, kind=np.int32)], {}) for _ in range(2)),
    *(("Mod", [ints(40), sign * ints(40, low=1)], {}) for sign in (1, -1)),
    *((op, [made(9)], {}) for op in ("Neg", "Abs") for made in (ints, floats)),
    *((op, [floats(30)], {}) for op in ("Floor", "Ceil", "Round")),
    ("Round", [np.arange(-4, 5).astype(FLOAT) + FLOAT(0.5)], {}),
    ("Sqrt", [np.abs(floats(9))], {}),
    ("Identity", [ints(2, 3)], {}),
    *(("Cast", [floats(30)], {"to": kind}) for kind in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)),
    *(("Cast", [ints(9)], {"to": kind}) for kind in (TensorProto.INT32, TensorProto.FLOAT, TensorProto.BOOL)),
    ("Not", [ints(5, low=0) > 4], {}),
    *((op, [ints(9) > 0, ints(9) > 0], {}) for op in ("And", "Or")),
    ("Where", [ints(3, 1) > 0, ints(3, 4), ints(4)], {}),
    *(("ReduceProd", [ints(3, 4)], {"keepdims": keep}) for keep in (0, 1)),
    ("ReduceSum", [ints(3, 4), at(-1)], {"keepdims": 0}),
    ("ReduceMax", [ints(3, 4), at(0)], {}),
    ("ReduceMin", [ints(3, 4)], {"keepdims": 0}),
    ("Concat", [ints(2, 3), ints(2, 1)], {"axis": -1}),
    ("Gather", [ints(4, 3), at(-1, 0, 2)], {"axis": 0}),
    ("Gather", [ints(4, 3), np.array(1, INT)], {"axis": 1}),
    *(("Slice", [ints(7, 5), *(at(number) for number in cut)], {}) for cut in SLICES),
    ("Slice", [ints(7, 5), at(1, 0), at(3, 4)], {}),
    ("Squeeze", [ints(1, 3, 1), at(0)], {}),
    ("Squeeze", [ints(1, 3, 1)], {}),
    ("Unsqueeze", [ints(3), at(0, -1)], {}),
    ("Reshape", [ints(2, 6), at(3, -1)], {}),
    ("Reshape", [ints(2, 6), at(0, 2, 3)], {}),
    ("Transpose", [ints(2, 3, 4)], {"perm": [2, 0, 1]}),
    ("Transpose", [ints(2, 3)], {}),
    ("Tile", [ints(2, 3), at(2, 1)], {}),
    ("Expand", [ints(3, 1), at(2, 1, 4)], {}),
    ("ConstantOfShape", [at(2, 3)], {}),
    ("ConstantOfShape", [at(2)], {"value": numpy_helper.from_array(np.array([7], INT))}),
    *(("Range", [np.array(n, INT) for n in numbers], {}) for numbers in ((0, 7, 2), (5, -4, -3), (3, 3, 1))),
]


def node_of(op: str, values: Sequence[Any], attributes: dict[str, Any]) -> tuple[onnx.NodeProto, dict[str, Any]]:
    named = {f"v{index}": np.asarray(value) for index, value in enumerate(values)}
    return helper.make_node(op, list(named), ["y"], **attributes), named


def in_onnxruntime(node: onnx.NodeProto, named: dict[str, Any]) -> Any:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in named.items()
    ]
    graph = helper.make_graph([node], "one", inputs, [onnx.ValueInfoProto(name="y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, named)[0]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda index: f"{CASES[index][0]}-{index}")
def test_it_is_onnxruntimes(case: int) -> None:
    node, named = node_of(*CASES[case])
    expected = in_onnxruntime(node, named)
    found = evaluate(node, named, expected.shape)
    assert found is not None
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def test_every_operator_is_tried() -> None:
    assert {op for op, _, _ in CASES} == set(OPERATORS)


UNKNOWN: list[tuple[str, Sequence[Any], dict[str, Any]]] = [
    ("Cast", [np.array([np.inf], FLOAT)], {"to": TensorProto.INT64}),
    ("Cast", [np.array([1e30], FLOAT)], {"to": TensorProto.INT64}),
    ("Cast", [np.array([2**40], INT)], {"to": TensorProto.INT32}),
    ("Cast", [np.array([300.0], FLOAT)], {"to": TensorProto.UINT8}),
    ("Div", [at(1), at(0)], {}),
    ("Div", [np.array([-(2**63)], INT), at(-1)], {}),
    ("Div", [np.array([1], FLOAT), np.array([0], FLOAT)], {}),
    ("Mod", [at(1), at(0)], {}),
    ("Mod", [floats(1), floats(1)], {"fmod": 1}),
    ("Sqrt", [np.array([-1], FLOAT)], {}),
    ("Add", [at(1), np.array([1], FLOAT)], {}),
    ("Add", [np.array([1], np.uint8), np.array([1], np.uint8)], {}),
    ("Pow", [at(2), at(3)], {}),
    ("RegexFullMatch", [np.array(["a"], object)], {"pattern": "(a+)+$"}),
]


@pytest.mark.parametrize("case", range(len(UNKNOWN)), ids=lambda index: f"{UNKNOWN[index][0]}-{index}")
def test_what_libraries_compute_differently_stays_unknown(case: int) -> None:
    assert evaluate(*node_of(*UNKNOWN[case]), (1,)) is None


def test_another_shape_than_expected_is_no_value() -> None:
    node, named = node_of("Add", [at(1, 2), at(3)], {})
    assert evaluate(node, named, (2,)) is not None
    assert evaluate(node, named, (1,)) is None
