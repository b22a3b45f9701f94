"""One ONNX file against another, without torch: structure, weights, MACs, and outputs in onnxruntime."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from doconv_convert.artifacts.sources.samples import perturbed
from doconv_convert.check.onnx_files.model import constant_outputs
from doconv_convert.check.outputs.compare import ONNX_BOUND, Array, relative_error
from doconv_convert.check.outputs.session import run_onnx
from doconv_convert.check.proof import check_graph, check_macs, check_weights
from doconv_convert.check.status import Proof, Status
from doconv_convert.errors import DoconvError
from doconv_convert.words import counted


def compare_files(baseline: Path, candidate: Path, inputs: Sequence[Array]) -> Proof:
    """One ONNX file against another, without torch: structure, weights, MACs, and outputs in onnxruntime.

    The same graph with the same bytes is proven; with other weights and equal outputs it is `equivalent`, no more.
    """
    proof = Proof(str(candidate), [check_graph(baseline, candidate, values=False)])
    if proof.state("graph") == "passed":
        proof.statuses.append(check_weights(baseline, candidate))
    status, count = check_macs(baseline, candidate, inputs)
    proof.statuses.append(status)
    proof.macs = count.total
    expected = run_onnx(baseline, inputs)
    _, others = run_onnx(baseline, [perturbed(array, seed=1) for array in inputs])
    try:
        got = run_onnx(candidate, inputs)
        proof.statuses.append(_same_outputs(expected, others, got, constant_outputs(baseline)))
    except DoconvError as error:
        proof.statuses.append(Status("outputs", "failed", str(error)))
    return proof


def _same_outputs(
    expected: tuple[Sequence[str], Sequence[Array]],
    others: Sequence[Array],
    got: tuple[Sequence[str], Sequence[Array]],
    constants: Collection[str],
) -> Status:
    """`others` are the baseline's outputs on other inputs: what is equal there shows nothing, but for `constants`."""
    names = expected[0]
    if list(names) != list(got[0]):
        return Status("outputs", "failed", f"outputs are named {list(got[0])}, expected {list(names)}")
    rows = list(zip(names, expected[1], others, got[1], strict=True))
    problems = [
        f"'{name}' {problem}"
        for name, value, other, array in rows
        if (problem := _difference(value, None if name in constants else other, array)) is not None
    ]
    if problems or not rows:
        return Status("outputs", "failed", f"{len(problems)} of {counted(len(rows), 'output')} differ", tuple(problems))
    if not any(_moves(value, other) for _, value, other, _ in rows):
        detail = "no output depends on the inputs, which shows nothing; pass `input_file` with real samples"
        return Status("outputs", "failed", detail)
    worst = max(relative_error(array, value) for _, value, _, array in rows if value.dtype.kind in "fiub")
    return Status("outputs", "passed", f"{counted(len(rows), 'output')}: relative error at most {worst:.1e}")


def _difference(value: Array, other: Array | None, got: Array) -> str | None:
    if value.shape != got.shape or value.dtype != got.dtype:
        return f"is {got.dtype} {got.shape}, expected {value.dtype} {value.shape}"
    if not value.size:
        return "is empty, nothing was compared; pass `input_file` with a real sample"
    if not np.issubdtype(value.dtype, np.floating):
        count = np.count_nonzero(got != value)
        return f"differs in {count} of {value.size} values" if count else None
    error = relative_error(got, value)
    if not error <= ONNX_BOUND:
        return f"differs by {error:.1e} of its scale, allowed {ONNX_BOUND:.1e}"
    if other is not None and not _moves(value, other):
        return "is the same for other inputs, which shows nothing; pass `input_file` with real samples"
    return None


def _moves(value: Array, other: Array) -> bool:
    if value.shape != other.shape or not np.issubdtype(value.dtype, np.number):
        return not np.array_equal(value, other)
    return relative_error(other, value) > ONNX_BOUND
