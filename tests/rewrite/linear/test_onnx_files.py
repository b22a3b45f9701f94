"""ONNX graphs as steps, and their regions merged, held against onnxruntime; what is declined there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from doconv_convert.check.macs.counting import count_macs
from doconv_convert.check.macs.regions import may_have_regions, regions_left
from doconv_convert.check.outputs.session import run_onnx
from doconv_convert.rewrite.linear.evaluate import fits_onnx
from doconv_convert.rewrite.linear.onnx_merge import merge_regions
from doconv_convert.rewrite.linear.onnx_steps import read_steps
from doconv_convert.rewrite.linear.reasons import Reason
from doconv_convert.rewrite.linear.regions import find_regions
from doconv_convert.rewrite.linear.steps import Found

# float32 in onnxruntime, sums of some hundred terms.
SAME = 2e-6
SIZE = (2, 4, 9, 8)


def values(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


KERNELS = {
    "three": values(1, 4, 4, 3, 3),
    "one": values(2, 4, 4, 1, 1),
    "up": values(3, 4, 4, 3, 3),
    "point_up": values(4, 4, 4, 1, 1),
    "bias": values(5, 4),
    "gain": values(6, 4, 1, 1),
    "scale": values(7, 4),
    "shift": values(8, 4),
    "mean": values(9, 4),
    "variance": np.abs(values(10, 4)) + 0.5,
    "half": np.array(0.5, np.float32),
    "pads": np.array([0, 0, 1, 0, 0, 0, 1, 2], np.int64),
}


def write(path: Path, nodes: list[onnx.NodeProto], opset: int = 20) -> Path:
    """From x to y, behind a Tanh each, so that a region has an end."""
    inside = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        [helper.make_node("Tanh", ["x"], ["in"]), *nodes, helper.make_node("Tanh", ["out"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SIZE[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, "h", "w"])],
        [numpy_helper.from_array(array, name) for name, array in KERNELS.items() if name in inside],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), path)
    return path


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def norm(data: str, output: str) -> onnx.NodeProto:
    return node("BatchNormalization", f"{data} scale shift mean variance", output, epsilon=1e-3)


def merged(path: Path, merge: Any = "branches") -> tuple[Found, Path]:
    model = ir.load(path)
    found = find_regions(read_steps(model.graph), merge, fits_onnx)
    merge_regions(model, found.regions)
    target = path.with_name("merged.onnx")
    ir.save(model, target)
    onnx.checker.check_model(target, full_check=True)
    return found, target


REGIONS = {
    "branches": [
        node("Conv", "in three bias", "a", pads=[1, 1, 1, 1]),
        node("Conv", "in one", "b"),
        norm("in", "c"),
        node("Sum", "a b c", "out"),
    ],
    "a pad and a scale": [
        node("Pad", "in pads", "p"),
        node("Conv", "p three", "a"),
        node("Mul", "gain a", "s"),
        node("Pad", "in pads", "q"),
        node("Conv", "q up bias", "d"),
        node("Sub", "s d", "out"),
    ],
    "transposed": [
        node("ConvTranspose", "in up", "a", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
        node("ConvTranspose", "in point_up bias", "b", strides=[2, 2], output_padding=[1, 1]),
        node("Add", "a b", "sum"),
        norm("sum", "out"),
    ],
    "same padding": [
        node("Conv", "in three", "a", auto_pad="SAME_UPPER"),
        node("Identity", "in", "i"),
        node("Neg", "i", "n"),
        node("Add", "a n", "h"),
        node("Div", "h half", "out"),
    ],
    "pooling": [
        node("Conv", "in three", "a", pads=[1, 1, 1, 1]),
        node("AveragePool", "in", "b", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        node("Add", "a b", "out"),
    ],
}


@pytest.mark.parametrize("nodes", REGIONS.values(), ids=REGIONS)
def test_a_region_of_a_file_becomes_one_node(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", nodes)
    assert may_have_regions(onnx.load(path))
    found, target = merged(path)
    assert len(found.regions) == 1, [(one.reason, len(one.steps)) for one in found.declined]
    assert [n.op_type for n in onnx.load(target).graph.node][1] in ("Conv", "ConvTranspose")
    assert len(onnx.load(target).graph.node) == 3
    assert len(onnx.load(target).graph.initializer) == 2 - (not found.regions[0].conv.bias.any())
    x = values(20, *SIZE)
    ((before,), (after,)) = (run_onnx(one, [x])[1] for one in (path, target))
    assert before.std() > 0.1
    assert np.abs(before - after).max() < SAME * 10
    (left,) = regions_left(path, count_macs(path))
    assert left.wasted == count_macs(path).total - count_macs(target).total >= 0
    assert regions_left(target, count_macs(target)) == ()


DECLINED = {
    Reason.BIAS_BEFORE_PADDING: [
        node("Conv", "in one bias", "a"),
        node("Conv", "a three", "out", pads=[1, 1, 1, 1]),
    ],
    Reason.INPUT_DEPENDENT: [
        node("ReduceMean", "in", "m", keepdims=1),
        node("Mul", "one m", "k"),
        node("Conv", "in k", "a"),
        node("Conv", "in one", "b"),
        node("Add", "a b", "out"),
    ],
    Reason.SEVERAL_OUTPUTS: [
        node("Conv", "in one", "a"),
        node("Conv", "in point_up", "b"),
        node("Add", "a b", "c"),
        node("Sigmoid", "a", "d"),
        node("Mul", "c d", "out"),
    ],
    Reason.BATCH_STATISTICS: [
        node("Conv", "in one", "a"),
        helper.make_node("BatchNormalization", ["a", "scale", "shift", "mean", "variance"], ["b"], training_mode=1),
        node("Add", "b in", "out"),
    ],
}


@pytest.mark.parametrize(("reason", "nodes"), DECLINED.items(), ids=lambda value: getattr(value, "name", ""))
def test_what_is_declined_in_a_file(reason: Reason, nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", nodes)
    found = find_regions(read_steps(ir.load(path).graph), "branches", fits_onnx)
    assert found.regions == []
    assert [one.reason for one in found.declined] == [reason]


def test_a_value_that_a_subgraph_reads_is_used_outside(tmp_path: Path) -> None:
    """Its inner Add would keep the branch alive."""
    inner = helper.make_graph(
        [node("Identity", "a", "taken")],
        "branch",
        [],
        [helper.make_tensor_value_info("taken", TensorProto.FLOAT, None)],
    )
    condition = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    nodes = [
        condition,
        node("Conv", "in one", "a"),
        node("Conv", "in point_up", "b"),
        node("Add", "a b", "c"),
        helper.make_node("If", ["yes"], ["d"], then_branch=inner, else_branch=inner),
        node("Mul", "c d", "out"),
    ]
    found = find_regions(read_steps(ir.load(write(tmp_path / "m.onnx", nodes)).graph), "branches", fits_onnx)
    assert [one.reason for one in found.declined] == [Reason.SEVERAL_OUTPUTS]


def test_a_plain_network_is_known_at_a_glance(tmp_path: Path) -> None:
    """ResNet's block: two ways that meet, but one of them is not linear."""
    nodes = [
        node("Conv", "in three", "a", pads=[1, 1, 1, 1]),
        node("Relu", "a", "r"),
        node("Conv", "r up", "b", pads=[1, 1, 1, 1]),
        node("Conv", "in one", "s"),
        node("Add", "b s", "out"),
    ]
    path = write(tmp_path / "m.onnx", nodes)
    assert not may_have_regions(onnx.load(path))
    assert find_regions(read_steps(ir.load(path).graph), "branches", fits_onnx).regions == []
