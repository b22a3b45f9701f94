"""The process with limits: what ends it, and what is said then."""

import os
import signal
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import doconv_convert
from doconv_convert.check.confined import BYTES, Limits, confined, run_limits
from doconv_convert.errors import DoconvError

COUNT = "check.macs.counting:count_as_json"


def write(path: Path, node: onnx.NodeProto, *tensors: onnx.TensorProto) -> Path:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])]
    graph = helper.make_graph([node], "g", inputs, [onnx.ValueInfoProto(name="y")], list(tensors))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def endless(path: Path) -> Path:
    """Very many nodes: a count of more than a second."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])]
    nodes = [helper.make_node("Relu", ["x"], [f"y{index}"]) for index in range(60_000)]
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name="y0")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.fixture
def convolution(tmp_path: Path) -> Path:
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3), np.float32), "w")
    return write(tmp_path / "conv.onnx", helper.make_node("Conv", ["x", "w"], ["y"]), weight)


def test_a_result_and_an_error_of_ours_come_back(convolution: Path) -> None:
    with confined() as process:
        assert process.call(COUNT, convolution, {}, [])["nodes"][0]["macs"] == 4 * 36 * 27
        with pytest.raises(DoconvError, match="no dynamic dimension is named 'N'"):
            process.call(COUNT, convolution, {"N": 1}, [])
        assert process.call("check.macs.counting:dynamic_dims", convolution) == []


def test_time_and_memory_end(tmp_path: Path, convolution: Path) -> None:
    """And the process is there again for the next file."""
    with confined() as process:
        with pytest.raises(DoconvError, match=r"'.*endless\.onnx' took more than 1 s of work; .* with `timeout`"):
            process.call(COUNT, endless(tmp_path / "endless.onnx"), {}, [], limits=Limits(1.0))
        large = tmp_path / "large.onnx"
        weight = numpy_helper.from_array(np.zeros((1 << 23,), np.float32), "w")
        write(large, helper.make_node("Conv", ["x", "w"], ["y"]), weight)
        little = 64 * 2**20 - 3 * large.stat().st_size  # Python, onnx and numpy take nearly all of it
        with pytest.raises(DoconvError, match=r"memory|cannot be read"):
            process.call(COUNT, large, {}, [], limits=Limits(bytes=little))
        assert process.call(COUNT, convolution, {}, [])["nodes"]


def test_a_crash_is_an_error_about_the_file(tmp_path: Path) -> None:
    path = endless(tmp_path / "m.onnx")
    with confined() as process:
        threading.Timer(1.5, lambda: os.kill(process._process.pid, signal.SIGSEGV)).start()
        with pytest.raises(DoconvError, match=r"m\.onnx' crashes the libraries that read it.*SIGSEGV"):
            process.call(COUNT, path, {}, [])


def test_the_public_count_has_limits(tmp_path: Path, convolution: Path) -> None:
    assert doconv_convert.count_macs(onnx.load(convolution)).total == 4 * 36 * 27
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(DoconvError, match=r"pipe\.onnx' is not a regular file; expected an ONNX file"):
        doconv_convert.count_macs(tmp_path / "pipe.onnx")


def test_a_run_may_take_what_its_macs_are_worth(convolution: Path) -> None:
    small, large, huge = (run_limits(macs, [convolution], None) for macs in (0, 4 * 10**9, 10**30))
    assert small.seconds < large.seconds < huge.seconds == 3600
    assert BYTES < small.bytes < large.bytes < huge.bytes
    assert run_limits(0, [convolution], 5.0).seconds == 5.0
