"""The twin's status: the exporter, and the file's weights, judged in float64. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from doconv_convert.check.outputs.compare import TWIN_BOUND, Array, OutputCheck, relative_error
from doconv_convert.check.outputs.detections import in_order_of
from doconv_convert.check.outputs.expected import ReferenceRun
from doconv_convert.check.status import State, Status
from doconv_convert.check.twin.compare import Rounding, compare_twin
from doconv_convert.check.twin.evaluate import evaluate, widened
from doconv_convert.errors import DoconvError
from doconv_convert.words import counted

NAME = "twin"
TOO_LARGE = "its weights are large, and in float64 they are twice that"
MERGED = "linear regions were merged: each is held to its own forward in float64 instead"


@dataclass(frozen=True)
class Twin:
    """The float64 twin of an export: its file, or why there is none (`missing`)."""

    path: Path | None
    missing: str = ""


def check_twin(twin: Twin, candidate: Path, reference: ReferenceRun, graph: State) -> tuple[Status, float]:
    """The twin is the candidate's graph, and computes in float64 what torch does with the shipped weights: the status,
    and the largest relative error of an output. Where the candidate is not what was exported (`graph` failed), another
    graph than the twin's is its fault."""
    if twin.path is None:
        return Status(NAME, "not run", twin.missing), 0.0
    if reference.fold is not None and reference.fold.random is not None:
        return Status(NAME, "not run", "the network is not deterministic in eval mode"), 0.0
    if not reference.shipped:
        return Status(NAME, "not run", "there is no float64 run of the shipped weights to compare it with"), 0.0
    try:
        differences, rounding = compare_twin(twin.path, candidate)
        if differences and graph == "failed":
            return Status(NAME, "failed", "the graph differs from its float64 twin's", differences), 0.0
        if differences:
            return Status(NAME, "not run", "in float64 the exporter writes another graph", differences), 0.0
        got = evaluate(widened(onnx.load(twin.path)), reference.inputs)
    except DoconvError as error:
        return Status(NAME, "not run", str(error)), 0.0
    problems, worst = _compare(reference, got)
    if problems:
        detail = "in float64 the exported graph does not compute what the network does"
        return Status(NAME, "failed", detail, problems), worst
    detail = (
        f"in float64 the exported graph computes what the network does, to {worst:.1e} (tolerance {TWIN_BOUND:.0e}); "
        f"{_rounded(rounding)}"
    )
    return Status(NAME, "passed", detail), worst


def settled(twin: Status, error: float, outputs: Status, checks: Sequence[OutputCheck]) -> Status:
    """A twin that failed by more than onnxruntime's outputs may be off, while those passed, was evaluated wrongly: by
    onnx's reference, then, and nothing is said of the file."""
    if twin.state != "failed" or outputs.state != "passed":
        return twin
    allowed = max((check.bound for check in checks), default=0.0)
    if not error > 2 * allowed:
        return twin
    detail = f"onnx's reference evaluator contradicts onnxruntime: {'; '.join(twin.findings)}"
    return Status(NAME, "not run", detail)


def _rounded(rounding: Rounding) -> str:
    text = (
        f"{rounding.exact:,} of {counted(rounding.elements, 'float32 weight')} are its float64 ones, correctly rounded"
    )
    if rounding.exact < rounding.elements:
        rest = counted(rounding.tensors, "tensor")
        text += f", the others, in {rest} that the exporter computes, to {rounding.worst:.1e} of the largest"
    return text


def _compare(reference: ReferenceRun, got: list[Array]) -> tuple[tuple[str, ...], float]:
    """What differs, output by output, and the largest relative error."""
    if len(got) != len(reference.shipped):
        return (f"it has {len(got)} outputs, the network {len(reference.shipped)}",), float("nan")
    problems, worst = [], 0.0
    ordered = in_order_of(reference.shipped, got, reference.detections)
    for index, (value, array) in enumerate(zip(reference.shipped, ordered, strict=True)):
        if value.shape != array.shape:
            problems.append(f"output {index} has the shape {array.shape}, expected {value.shape}")
            continue
        if not np.issubdtype(value.dtype, np.floating):
            error = float(np.count_nonzero(value != array))
        else:
            finite = np.isfinite(value)
            error = relative_error(array[finite], value[finite])
        worst = max(worst, error)
        if not error <= TWIN_BOUND:
            problems.append(f"output {index} is off by {error:.1e} of its scale, allowed {TWIN_BOUND:.0e}")
    return tuple(problems), worst
