"""The outputs once more: with onnxruntime's optimizations off, and at smaller batches than the one compared first.

The truth at a smaller batch is the leading samples of the one at hand. Only where they do not fit is the model
itself asked: samples that influence each other are no fault of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from doconv_convert.check.outputs.compare import FLOOR, Array, OutputCheck, compare_outputs
from doconv_convert.check.outputs.detections import in_order_of
from doconv_convert.check.outputs.session import OnnxSession
from doconv_convert.errors import DoconvError

if TYPE_CHECKING:
    from doconv_convert.check.outputs.expected import ReferenceRun

BATCHES = (1, 2)


def other_runs(
    session: OnnxSession, reference: ReferenceRun, checks: Sequence[OutputCheck], floor: float = FLOOR
) -> tuple[list[str], str]:
    """What went wrong, and a sentence on what was run. `checks` are those of the whole batch in `session`."""
    plain = OnnxSession(session.path, optimize=False, precise=session.precise, timeout=session.timeout)
    got = in_order_of(reference.truth, plain.run(reference.inputs), reference.detections)
    # whether samples differ was asked before
    again = compare_outputs(
        plain.outputs, reference.truth, reference.plain, got, reference.samples, floor, plain.outputs
    )
    problems = [f"'{check.name}' {check.problem}, with optimizations off" for check in again if not check.ok]
    said = "optimizations on and off"
    batches = [batch for batch in BATCHES if batch < reference.samples and session.dynamic_batch]
    notes = set()
    for batch in batches:
        found, note = _at_batch(batch, session, reference, checks)
        problems += [f"{problem}, at batch {batch}" for problem in found]
        notes.update(note)
    if batches:
        said += f", batches of {', '.join(map(str, [*batches, reference.samples]))}"
    return problems, "; ".join([said, *sorted(notes)])


def _at_batch(
    batch: int, session: OnnxSession, reference: ReferenceRun, checks: Sequence[OutputCheck]
) -> tuple[list[str], list[str]]:
    problems = []
    try:
        got: Sequence[Array] | None = session.run(leading(reference.inputs, batch, reference.samples))
    except DoconvError as error:
        got, problems = None, [str(error)]
    if got is not None:
        problems = _differences(leading(reference.truth, batch, reference.samples), got, reference.truth, checks)
    # a batch of one may run another way through the model: its own run is the truth where it costs little
    if reference.alone is None or not (problems or (batch == 1 and reference.alone_is_cheap)):
        return problems, []
    try:
        exact = reference.alone(batch)
    except DoconvError:
        return [], [f"the model itself does not run at batch {batch}"]
    own = problems if got is None else _differences(exact, got, exact, checks)
    if own or not problems:
        return problems or own, []
    return [], ["samples are not independent, so smaller batches were held against float64 runs of their own"]


def leading(arrays: Sequence[Array], batch: int, samples: int) -> list[Array]:
    """The first samples of every array that holds a batch."""
    return [array[:batch] if array.ndim and array.shape[0] == samples else array for array in arrays]


def _differences(
    expected: Sequence[Array], got: Sequence[Array], whole: Sequence[Array], checks: Sequence[OutputCheck]
) -> list[str]:
    """Errors relative to the whole batch's scale: a single sample's may lie far above its share of it."""
    problems = []
    for check, value, array, scale in zip(checks, expected, got, whole, strict=True):
        if array.shape != value.shape:
            problems.append(f"'{check.name}' has shape {array.shape}, expected {value.shape}")
            continue
        allowed = check.bound * (float(np.linalg.norm(scale.ravel().astype(np.float64))) or 1.0)
        error = float(np.linalg.norm((array.astype(np.float64) - value).ravel()))
        if not error <= allowed:
            problems.append(f"'{check.name}' is off by {error:.1e} in total, allowed {allowed:.1e}")
    return problems
