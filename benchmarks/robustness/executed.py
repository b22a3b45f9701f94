"""What onnxruntime really multiplies in one run: from the shapes in its own profile, by formulas of this file's own."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the import

import onnx
import onnxruntime

Shapes: TypeAlias = list[list[int]]


def _attention(ins: Shapes, _: Shapes) -> int:
    (batch, heads, length, size), keys, width = ins[0], ins[1][2], ins[2][3]
    return batch * heads * length * keys * (size + width)


# by operator, from the shapes of its inputs and outputs
FORMULAS: Mapping[str, Callable[[Shapes, Shapes], int]] = {
    "Conv": lambda ins, outs: prod(outs[0]) * prod(ins[1][1:]),
    "FusedConv": lambda ins, outs: prod(outs[0]) * prod(ins[1][1:]),
    "ConvInteger": lambda ins, outs: prod(outs[0]) * prod(ins[1][1:]),
    "QLinearConv": lambda ins, outs: prod(outs[0]) * prod(ins[3][1:]),
    "ConvTranspose": lambda ins, _: prod(ins[0]) * prod(ins[1][1:]),
    "MatMul": lambda ins, outs: prod(outs[0]) * ins[0][-1],
    "Gemm": lambda ins, outs: outs[0][1] * prod(ins[0]),
    "LSTM": lambda ins, _: prod(ins[0][:2]) * (prod(ins[1]) + prod(ins[2])),
    "GRU": lambda ins, _: prod(ins[0][:2]) * (prod(ins[1]) + prod(ins[2])),
    "RNN": lambda ins, _: prod(ins[0][:2]) * (prod(ins[1]) + prod(ins[2])),
    "Attention": _attention,
}


def executed_macs(model: onnx.ModelProto | Path, feeds: Mapping[str, Any]) -> int:
    """Of one run without optimizations. Raises onnxruntime's errors where it refuses the model."""
    onnxruntime.set_default_logger_severity(4)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.add_session_config_entry("session.disable_prepacking", "1")  # else weights are missing from the profile
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = os.path.join(folder, "profile")
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    ran = [one["args"] for one in events if one.get("cat") == "Node" and one["name"].endswith("_kernel_time")]
    return sum(
        FORMULAS[args["op_name"]](_shapes(args["input_type_shape"]), _shapes(args["output_type_shape"]))
        for args in ran
        if args["op_name"] in FORMULAS
    )


def _shapes(values: list[dict[str, list[int]]]) -> Shapes:
    """Each is {type: shape}."""
    return [next(iter(one.values())) for one in values]
