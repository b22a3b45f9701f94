"""A run that does not end by itself."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from doconv_convert.check.outputs.session import OnnxSession
from doconv_convert.errors import DoconvError


def loop(path: Path, turns: str) -> Path:
    """Adds `x` to itself, for ever where `turns` is empty."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["s", "s"], ["t"])],
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("s", TensorProto.FLOAT, [])],
        [value("on", TensorProto.BOOL, []), value("t", TensorProto.FLOAT, [])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", [turns, "", "x"], ["y"], body=body)],
        "loop",
        [value("x", TensorProto.FLOAT, [])],
        [value("y", TensorProto.FLOAT, [])],
        [helper.make_tensor("n", TensorProto.INT64, [], [3])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_a_run_ends_after_its_time(tmp_path: Path) -> None:
    one = [np.array(1, np.float32)]
    assert OnnxSession(loop(tmp_path / "three.onnx", "n"), timeout=60.0).run(one) == [8.0]
    endless = OnnxSession(loop(tmp_path / "endless.onnx", ""), timeout=0.5)
    for _ in range(2):
        with pytest.raises(DoconvError, match=r"endless\.onnx' took more than 0 s of work; .* with `timeout`"):
            endless.run(one)
