"""The outputs' status: onnxruntime against the reference run. Importing this needs no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from doconv_convert.check.onnx_files.model import constant_outputs
from doconv_convert.check.outputs.compare import FLOOR, ONNX_BOUND, OutputCheck, compare_outputs
from doconv_convert.check.outputs.detections import in_order_of
from doconv_convert.check.outputs.expected import ReferenceRun
from doconv_convert.check.outputs.reruns import other_runs
from doconv_convert.check.outputs.session import OnnxSession
from doconv_convert.check.status import Status
from doconv_convert.errors import DoconvError
from doconv_convert.words import counted, listed

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def check_outputs(
    candidate: Path, reference: ReferenceRun, timeout: float | None = None
) -> tuple[Status, list[OutputCheck]]:
    """onnxruntime against the float64 run of the trained model; each run ends after `timeout` seconds."""
    if reference.fold is not None and reference.fold.random is not None:
        detail = (
            "the network is not deterministic in eval mode, so there is nothing to compare with; turn off what is "
            "random there (dropout, noise) or changes from call to call"
        )
        return Status("outputs", "failed", detail, (reference.fold.random,)), []

    def compare(precise: bool, floor: float) -> tuple[Status, list[OutputCheck]]:
        return _compare(OnnxSession(candidate, precise=precise, timeout=timeout), reference, floor)

    return retry_in_float64(compare)


def check_resized(candidate: Path, reference: ReferenceRun, timeout: float | None = None) -> Status:
    """The outputs at other sizes than the traced ones."""
    shapes = ", ".join("x".join(map(str, array.shape)) for array in reference.inputs)
    try:
        status, _ = check_outputs(candidate, reference, timeout)
    except DoconvError as error:
        return Status("other sizes", "failed", f"on inputs of {shapes}: {error}")
    return replace(status, name="other sizes", detail=f"on inputs of {shapes}: {status.detail}")


def retry_in_float64(compare: Callable[[bool, float], tuple[Status, _T]]) -> tuple[Status, _T]:
    """The status of a file's outputs, and what belongs to it. `compare` runs the file (precise, least bound).

    Where values are off, onnxruntime's own sums and sigmoids may be why (`float64_copy.py`): then the file passes if
    it does with those in float64, and without if it keeps to ONNX_BOUND.
    """
    status, found = compare(False, FLOOR)
    if status.state == "passed" or compare(False, ONNX_BOUND)[0].state == "failed":
        return status, found
    logger.info("outputs are off in float32 (%s): once more in float64", "; ".join(status.findings[:3]))
    precise, precise_found = compare(True, FLOOR)
    if precise.state == "failed":
        return status, found
    why = f"sums and sigmoids computed in float64, since in float32 {'; '.join(status.findings[:3])}"
    return replace(precise, detail=f"{precise.detail}; {why}"), precise_found


def _compare(session: OnnxSession, reference: ReferenceRun, floor: float) -> tuple[Status, list[OutputCheck]]:
    got = session.run(reference.inputs)
    if len(got) != len(reference.truth):
        detail = f"the file has {counted(len(got), 'output')}, the model {len(reference.truth)}"
        return Status("outputs", "failed", detail), []
    got = in_order_of(reference.truth, got, reference.detections)
    constants = constant_outputs(session.path)
    checks = compare_outputs(
        session.outputs, reference.truth, reference.plain, got, reference.samples, floor, constants
    )
    if not checks:
        return Status("outputs", "failed", "the model has no tensor outputs; nothing was compared"), []
    bad = tuple(f"'{check.name}' {check.problem}" for check in checks if not check.ok)
    if bad:
        return Status("outputs", "failed", f"{len(bad)} of {counted(len(checks), 'output')} differ", bad), checks
    if not any(check.variation > check.bound and check.name not in constants for check in checks):
        detail = "no output differs between the samples, which shows nothing; pass `input_file` with real samples"
        return Status("outputs", "failed", detail), checks
    problems, runs = other_runs(session, reference, checks, floor)
    if problems:
        return Status("outputs", "failed", "other runs of the same file differ", tuple(problems)), checks
    further = [check for one in reference.further for check in _compare_further(session, one, floor)]
    bad = tuple(dict.fromkeys(f"'{check.name}' {check.problem}" for check in further if not check.ok))
    if bad:
        return Status("outputs", "failed", "outputs differ on further samples", bad), checks
    worst = max([*checks, *further], key=lambda check: check.error / check.bound if check.bound else 0.0)
    samples = reference.samples + sum(one.samples for one in reference.further)
    detail = (
        f"{counted(len(checks), 'output')}, {counted(samples, 'sample')}: relative error {worst.error:.1e} "
        f"(fp32 torch {worst.plain_error:.1e}, tolerance {worst.bound:.1e}); largest element {worst.largest:.1e}; "
        f"{runs}"
    )
    agreeing = {check.name: 0 for check in checks if check.agreeing is not None}
    for check in [*checks, *further]:
        if check.name in agreeing:
            agreeing[check.name] += check.agreeing or 0
    if constants:
        detail += f"; {listed(sorted(constants))} constant"
    if agreeing:
        detail += f"; argmax agrees on {min(agreeing.values())} of {counted(samples, 'sample')}"
    return Status("outputs", "passed", detail), checks


def _compare_further(session: OnnxSession, one: ReferenceRun, floor: float) -> list[OutputCheck]:
    """The outputs on more samples, held to their own tolerances; whether samples differ was asked of the first."""
    got = in_order_of(one.truth, session.run(one.inputs), one.detections)
    checks = compare_outputs(session.outputs, one.truth, one.plain, got, one.samples, floor)
    return [replace(check, problem=None) if check.error <= check.bound else check for check in checks]
