"""One ONNX file against another: outputs that are constants, texts or sequences."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from doconv_convert.check.compare_files import compare_files
from doconv_convert.check.onnx_files.model import constant_outputs

FLOAT, STRING = TensorProto.FLOAT, TensorProto.STRING


def model(path: Path, nodes: list[onnx.NodeProto], outputs: list[Any], *, label: str = "cat", k: float = 2.0) -> Path:
    """A file with the input x [batch, 3], the initializers k [3], label and number [], and `nodes`."""
    initializers = [
        numpy_helper.from_array(np.full(3, k, np.float32), "k"),
        helper.make_tensor("label", STRING, [1], [label.encode()]),
        numpy_helper.from_array(np.array([0.0], np.float32), "number"),
    ]
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["batch", 3])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def values(name: str, kind: int = FLOAT, shape: Any = ("batch", 3)) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


PRODUCT = helper.make_node("Mul", ["x", "k"], ["product"])
CONSTANT = [helper.make_node("Shape", ["x"], ["size"]), helper.make_node("Expand", ["k", "size"], ["constant"])]
NAMED = helper.make_node("Identity", ["label"], ["name"])
BATCH = [np.ones((2, 3), np.float32)]


def state(baseline: Path, candidate: Path) -> tuple[str, str]:
    status = next(one for one in compare_files(baseline, candidate, BATCH).statuses if one.name == "outputs")
    return status.state, " ".join((status.detail, *status.findings))


def test_a_constant_beside_a_good_output_passes(tmp_path: Path) -> None:
    outputs = [values("product"), values("constant")]
    one = model(tmp_path / "one.onnx", [PRODUCT, *CONSTANT], outputs)
    assert constant_outputs(one) == {"constant"}
    assert state(one, one)[0] == "passed"
    other = model(tmp_path / "other.onnx", [PRODUCT, *CONSTANT], outputs, k=2.1)
    assert state(one, other)[0] == "failed"


def test_constants_alone_show_nothing(tmp_path: Path) -> None:
    one = model(tmp_path / "one.onnx", CONSTANT, [values("constant")])
    assert "shows nothing" in state(one, one)[1]


def test_texts_are_compared(tmp_path: Path) -> None:
    outputs = [values("product"), values("name", STRING, [1])]
    one = model(tmp_path / "one.onnx", [PRODUCT, NAMED], outputs)
    assert state(one, one)[0] == "passed"
    other = model(tmp_path / "other.onnx", [PRODUCT, NAMED], outputs, label="dog")
    assert state(one, other) == ("failed", "1 of 2 outputs differ 'name' differs in 1 of 1 values")


def test_a_sequence_is_refused_by_name(tmp_path: Path) -> None:
    pair = helper.make_node("SequenceConstruct", ["product", "product"], ["pair"])
    output = helper.make_tensor_sequence_value_info("pair", FLOAT, ["batch", 3])
    one = model(tmp_path / "one.onnx", [PRODUCT, pair], [values("product"), output])
    with pytest.raises(Exception, match=r"output 'pair' of .* is a sequence or a map"):
        state(one, one)


@pytest.mark.parametrize(
    ("nodes", "constant"),
    [
        ([helper.make_node("Add", ["k", "number"], ["out"])], True),
        ([helper.make_node("Add", ["x", "k"], ["out"])], False),
        ([helper.make_node("ReduceSum", ["x"], ["sum"]), helper.make_node("Mul", ["sum", "k"], ["out"])], False),
        ([helper.make_node("Shape", ["x"], ["size"]), helper.make_node("Cast", ["size"], ["out"], to=FLOAT)], True),
    ],
)
def test_an_output_is_constant_where_no_inputs_values_reach_it(
    tmp_path: Path, nodes: list[onnx.NodeProto], constant: bool
) -> None:
    assert (constant_outputs(model(tmp_path / "m.onnx", nodes, [values("out", FLOAT, None)])) == {"out"}) is constant
