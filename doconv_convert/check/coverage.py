"""Coverage's status: which kernels the compared outputs would have betrayed. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from doconv_convert.check.onnx_files.model import has_branches
from doconv_convert.check.outputs.compare import COVERED_ABOVE
from doconv_convert.check.outputs.expected import ReferenceRun
from doconv_convert.check.status import State, Status
from doconv_convert.words import counted

NOT_TAKEN = "it did not run; the file has branches, and these inputs take another branch"


def check_coverage(
    reference: ReferenceRun,
    graph_state: State,
    fold_state: State,
    minimum: float = 0.0,
    twin_state: State = "not run",
) -> Status:
    """Which kernels the outputs would have betrayed, the twin's in float64 where it passed; of those that run, at least
    the part `minimum` must be. The others count as proven only by the per-site fold check together with equal
    initializer bytes."""
    runs = {name: value for name, value in reference.sensitivity.items() if value is not None}
    hidden = {name: value for name, value in runs.items() if not value > COVERED_ABOVE}
    sharp = reference.sharp if twin_state == "passed" else {}
    blind = {name: value for name, value in hidden.items() if not sharp.get(name, 0.0) > COVERED_ABOVE}
    training = [name for name in reference.sensitivity if name not in runs]
    if not reference.sensitivity:
        return Status("coverage", "passed", "the model has no convolution kernels to cover")
    seen = len(runs) - len(blind)
    detail = (
        f"a change of 0.1 % would show in the outputs for {seen} of {counted(len(reference.sensitivity), 'kernel')}"
    )
    if len(hidden) > len(blind):
        detail += f", for {len(hidden) - len(blind)} of these in float64 alone"
    findings = (
        *(f"'{name}' {_moves(value, sharp.get(name))}{_cause(reference, name)}" for name, value in blind.items()),
        *(f"'{name}' only runs in training" for name in training),
    )
    if runs and seen < minimum * len(runs):
        detail += f", {seen / len(runs):.0%} of those that run; `min_coverage` asks for {minimum:.0%}"
        return Status("coverage", "failed", f"{detail}; pass `input_file` with real samples", findings)
    if not findings:
        return Status("coverage", "passed", detail)
    if graph_state == "passed" and fold_state == "passed":
        detail += f"; {len(findings)} others by the per-site fold check and equal initializer bytes"
        return Status("coverage", "passed", detail, findings)
    return Status("coverage", "failed", f"{detail}; pass `input_file` with real samples", findings)


def with_branches(reference: ReferenceRun, candidate: Path) -> ReferenceRun:
    """Kernels that no run read only run in training, unless the file has branches: then they may stand in one that
    these inputs do not take, and count as unseen."""
    unread = [name for name, value in reference.sensitivity.items() if value is None]
    if not unread or not has_branches(candidate):
        return reference
    uncovered_reason = {**reference.uncovered_reason, **dict.fromkeys(unread, NOT_TAKEN)}
    return replace(
        reference,
        sensitivity={**reference.sensitivity, **dict.fromkeys(unread, 0.0)},
        uncovered_reason=uncovered_reason,
    )


def _moves(value: float, sharp: float | None) -> str:
    """What float64 shows no movement of, moves nothing."""
    return f"moves them by {value:.2g} bounds" if sharp is None else "moves nothing, in float64 either"


def _cause(reference: ReferenceRun, name: str) -> str:
    return f": {reference.uncovered_reason[name]}" if name in reference.uncovered_reason else ""
