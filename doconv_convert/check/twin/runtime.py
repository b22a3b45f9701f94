"""Which operators of onnxruntime are less exact than float32 is, found node by node against the twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, NodeProto, helper

from doconv_convert.check.onnx_files.model import read_model
from doconv_convert.check.onnxruntime_run import known_loose
from doconv_convert.check.outputs.compare import Array, relative_error
from doconv_convert.check.outputs.float64_copy import in_float64
from doconv_convert.check.twin.evaluate import Run, evaluate, widened

# One operator in float32, on float32 inputs: onnxruntime's ReduceMean of 49 values is off by 6e-8, its DFT of 96 by 96
# values by 9e-6.
LOOSE_ABOVE = 4 * 2.0**-23


class LooseOperators:
    """The operators that are `loose_operators`, looked for when asked for the first time; without a twin, those that
    are known. `found` are those that were asked for and not known."""

    def __init__(self, candidate: Path, inputs: Sequence[Array], twin: Path | None) -> None:
        self._candidate, self._inputs, self._twin = candidate, inputs, twin
        self._asked, self.found = False, dict[str, float]()

    def __call__(self) -> Mapping[str, float | None]:
        if self._twin is None:
            return known_loose()
        if not self._asked:
            self._asked, self.found = True, loose_operators(self._twin, self._candidate, self._inputs)
        return self.found


def loose_operators(twin: Path, candidate: Path, inputs: Sequence[Array]) -> dict[str, float]:
    """Operators of which onnxruntime computes some node of `candidate` to worse than LOOSE_ABOVE, with the largest
    relative error, where it could compute them in float64. Both files hold the same graph.

    Each node gets the twin's values, rounded to float32, and is compared with what it gives for these in float64.
    """
    model = read_model(candidate)
    errors: dict[str, float] = {}

    def visit(index: int, given: Sequence[Any], run: Run) -> None:
        node = model.graph.node[index]
        error = _node_error(model, node, given, run)
        if error > max(LOOSE_ABOVE, errors.get(node.op_type, 0.0)):
            errors[node.op_type] = error

    evaluate(widened(onnx.load(twin)), inputs, visit)
    return errors


def _node_error(model: ModelProto, node: NodeProto, given: Sequence[Any], run: Run) -> float:
    """The largest relative error of one node's outputs in onnxruntime; 0 where that is no question."""
    if node.domain not in ("", "ai.onnx") or any(a.type == AttributeProto.GRAPH for a in node.attribute):
        return 0.0
    values = [value for value in given if value is not None]
    if not all(isinstance(value, np.ndarray) for value in values) or not any(v.dtype == np.float64 for v in values):
        return 0.0
    narrow = [value.astype(np.float32) if _is_wide(value) else value for value in given]
    got = _in_onnxruntime(_alone(model, node, narrow), narrow)
    if got is None or _in_onnxruntime(in_float64(_alone(model, node, narrow), {node.op_type}), narrow) is None:
        return 0.0
    exact = run([value.astype(np.float64) if _is_narrow(value) else value for value in narrow])
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(got, exact, strict=False)]
    errors = [relative_error(a, b) for a, b in pairs if a.dtype == np.float32 and a.shape == b.shape and a.size]
    return max((error for error in errors if np.isfinite(error)), default=0.0)


def _alone(model: ModelProto, node: NodeProto, values: Sequence[Any]) -> ModelProto:
    """A model of that node alone."""
    pairs = {name: value for name, value in zip(node.input, values, strict=True) if name}
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in pairs.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    graph = helper.make_graph([node], "node", inputs, outputs)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _in_onnxruntime(model: ModelProto, values: Sequence[Any]) -> list[Any] | None:
    """Its outputs; None where onnxruntime does not take it."""
    import onnxruntime

    names = [value.name for value in model.graph.input]
    given = [value for value in values if value is not None]
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs: list[Any] = session.run(None, dict(zip(names, given, strict=False)))
    except Exception:  # onnxruntime's own classes share no public base
        return None
    return outputs


def _is_wide(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float64


def _is_narrow(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float32
