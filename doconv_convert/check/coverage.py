"""Coverage's status: which kernels the compared outputs would have betrayed. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from doconv_convert.check.onnx_files.model import has_branches
from doconv_convert.check.outputs.compare import SEEN
from doconv_convert.check.outputs.expected import TorchSide
from doconv_convert.check.status import State, Status
from doconv_convert.words import counted

NOT_TAKEN = "it did not run: these inputs take another branch, or it only runs in training"


def check_coverage(side: TorchSide, graph_state: State, fold_state: State, minimum: float = 0.0) -> Status:
    """Which kernels the outputs would have betrayed; of those that run, at least the part `minimum` must be. The
    others count as proven only by the per-site fold check together with equal initializer bytes."""
    runs = {name: value for name, value in side.reach.items() if value is not None}
    blind = {name: value for name, value in runs.items() if not value > SEEN}
    training = [name for name in side.reach if name not in runs]
    if not side.reach:
        return Status("coverage", "passed", "the model has no convolution kernels to cover")
    seen = len(runs) - len(blind)
    detail = f"a change of 0.1 % would show in the outputs for {seen} of {counted(len(side.reach), 'kernel')}"
    findings = (
        *(f"'{name}' moves them by {value:.2g} bounds{_cause(side, name)}" for name, value in blind.items()),
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


def with_branches(side: TorchSide, candidate: Path) -> TorchSide:
    """Kernels that no run read only run in training, unless the file has branches: then they may stand in one that
    these inputs do not take, and count as unseen."""
    unread = [name for name, value in side.reach.items() if value is None]
    if not unread or not has_branches(candidate):
        return side
    flat = {**side.flat, **dict.fromkeys(unread, NOT_TAKEN)}
    return replace(side, reach={**side.reach, **dict.fromkeys(unread, 0.0)}, flat=flat)


def _cause(side: TorchSide, name: str) -> str:
    return f": {side.flat[name]}" if name in side.flat else ""
