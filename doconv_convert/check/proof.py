"""The proof: which checks were made, how each ended, and whether together they prove the file.

A status is passed, failed or not checked; nothing "succeeds with a warning". Importing this needs no torch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from doconv_convert.check.detections import in_order_of
from doconv_convert.check.graph import GraphComparison, compare_graphs
from doconv_convert.check.leftovers import leftover_composition
from doconv_convert.check.macs import MacCount, compare_counts, count_macs, format_macs
from doconv_convert.check.other_runs import other_runs
from doconv_convert.check.outputs import (
    FLOOR,
    ONNX_BOUND,
    SEEN,
    Array,
    OutputCheck,
    compare_outputs,
)
from doconv_convert.check.runtime import OnnxSession, onnx_input_shapes
from doconv_convert.errors import DoconvError

if TYPE_CHECKING:
    from doconv_convert.rewrite.trained import Layer

State = Literal["passed", "failed", "not checked"]
logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Status:
    """One check: its state, a sentence, and what was found, line by line."""

    name: str
    state: State
    detail: str
    findings: tuple[str, ...] = ()


@dataclass
class Proof:
    """All statuses of one file, with their figures; `layers`, the model's convolutions, where they were asked for."""

    file: str
    statuses: list[Status] = field(default_factory=list)
    macs: int | None = None
    outputs: list[OutputCheck] = field(default_factory=list)
    reach: Mapping[str, float | None] = field(default_factory=dict)
    flat: Mapping[str, str] = field(default_factory=dict)
    count: MacCount | None = None
    layers: Sequence[Layer] | None = None

    @property
    def failed(self) -> bool:
        return any(status.state == "failed" for status in self.statuses)

    @property
    def proven(self) -> bool:
        """Every check was made and passed."""
        return bool(self.statuses) and all(status.state == "passed" for status in self.statuses)

    def state(self, name: str) -> State:
        return next((status.state for status in self.statuses if status.name == name), "not checked")

    def to_json(self) -> dict[str, Any]:
        """Every figure but the count node by node; NaN and infinity, which JSON does not have, are null."""
        figures: dict[str, Any] = without_nan(asdict(replace(self, count=None)))
        del figures["count"]
        if self.layers is None:
            del figures["layers"]
        return {**figures, "proven": self.proven, "failed": self.failed}


@dataclass(frozen=True)
class TorchSide:
    """What torch says about the inputs: float64 outputs of the trained model, fp32 outputs of the plain one,
    the batch, and per kernel how far a change of 1e-3 would move them (in units of their bounds).
    `detections` are the outputs that belong together (`detection_groups`); `alone` runs the first n samples in
    float64, by themselves. `flat` are unseen kernels whose gradient is cut or zero, with what changes of their
    own size tell of them (`coverage.why_flat`)."""

    inputs: Sequence[Array]
    truth: Sequence[Array]
    plain: Sequence[Array]
    samples: int
    reach: Mapping[str, float | None]
    detections: Sequence[Mapping[str, int]] = ()
    alone: Callable[[int], Sequence[Array]] | None = None
    flat: Mapping[str, str] = field(default_factory=dict)


def without_nan(value: Any) -> Any:
    """The same value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_graph(baseline: Path, candidate: Path, *, values: bool = True) -> Status:
    """Nodes, attributes, wiring, shapes and (`values`) initializer bytes; nothing of the composition is left."""
    comparison: GraphComparison = compare_graphs(baseline, candidate, values=values)
    expected = set(leftover_composition(baseline))
    findings = [*comparison.differences, *(left for left in leftover_composition(candidate) if left not in expected)]
    what = "initializer bytes" if values else "initializer shapes"
    if findings:
        return Status("graph", "failed", "the graph is not the original's", tuple(findings))
    detail = f"{comparison.nodes} nodes and the {what} of {comparison.initializers} initializers are the original's"
    return Status("graph", "passed", detail)


def check_macs(baseline: Path | MacCount, candidate: Path, inputs: Sequence[Array] = ()) -> tuple[Status, MacCount]:
    """MACs as exact integers, per node and in total, of one sample (of the whole batch that a static file fixes);
    `inputs` have the sizes for other dynamic dimensions."""
    expected = baseline if isinstance(baseline, MacCount) else count_macs(baseline, dynamic_sizes(baseline, inputs))
    count = count_macs(candidate, dynamic_sizes(candidate, inputs))
    differences = compare_counts(expected, count)
    figure = f"{count.total:,} MACs ({format_macs(count.total)}; FLOPs = 2 x MACs) in {len(count.nodes)} nodes"
    if count.uncounted:
        figure += f"; not counted: {', '.join(f'{n} {op}' for op, n in count.uncounted.items())}"
    if differences:
        return Status("macs", "failed", "MACs differ from the original's", tuple(differences)), count
    return Status("macs", "passed", f"{figure}, equal to the original's"), count


def dynamic_sizes(path: Path, inputs: Sequence[Array]) -> dict[str, int]:
    """The sizes that the file's dynamic dimensions, all but the batch, have in `inputs`."""
    shapes = onnx_input_shapes(path)
    return {
        f"{name}[{axis}]" if dim == "?" else dim: array.shape[axis]
        for (name, shape), array in zip(shapes.items(), inputs, strict=False)
        for axis, dim in enumerate(shape[: array.ndim])
        if axis and isinstance(dim, str)
    }


def check_outputs(candidate: Path, side: TorchSide) -> tuple[Status, list[OutputCheck]]:
    """onnxruntime against the float64 run of the trained model."""
    return judge(lambda precise, floor: _compare(OnnxSession(candidate, precise=precise), side, floor))


def judge(compare: Callable[[bool, float], tuple[Status, _T]]) -> tuple[Status, _T]:
    """The status of a file's outputs, and what belongs to it. `compare` runs the file (precise, least bound).

    Where values are off, onnxruntime's own sums and sigmoids may be why (`precise.py`): then the file passes if it does
    with those in float64, and without if it keeps to ONNX_BOUND.
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


def _compare(session: OnnxSession, side: TorchSide, floor: float) -> tuple[Status, list[OutputCheck]]:
    got = session.run(side.inputs)
    if len(got) != len(side.truth):
        detail = f"the file has {len(got)} outputs, the model {len(side.truth)}"
        return Status("outputs", "failed", detail), []
    got = in_order_of(side.truth, got, side.detections)
    checks = compare_outputs(session.outputs, side.truth, side.plain, got, side.samples, floor)
    if not checks:
        return Status("outputs", "failed", "the model has no tensor outputs; nothing was compared"), []
    bad = tuple(f"'{check.name}' {check.problem}" for check in checks if not check.ok)
    if bad:
        return Status("outputs", "failed", f"{len(bad)} of {len(checks)} outputs", bad), checks
    if not any(check.variation > check.bound for check in checks):
        detail = "no output differs between the samples, which shows nothing; pass --input with real samples"
        return Status("outputs", "failed", detail), checks
    problems, runs = other_runs(session, side, checks, floor)
    if problems:
        return Status("outputs", "failed", "other runs of the same file differ", tuple(problems)), checks
    worst = max(checks, key=lambda check: check.error / check.bound if check.bound else 0.0)
    detail = (
        f"{len(checks)} outputs on {side.samples} samples: onnxruntime is off by {worst.error:.1e} of the scale, fp32 "
        f"torch by {worst.plain_error:.1e}, allowed {worst.bound:.1e}; largest element {worst.largest:.1e}; {runs}"
    )
    agreeing = [check.agreeing for check in checks if check.agreeing is not None]
    if agreeing:
        detail += f"; argmax agrees on {min(agreeing)} of {side.samples} samples"
    return Status("outputs", "passed", detail), checks


def check_coverage(side: TorchSide, graph_state: State, fold_state: State, minimum: float = 0.0) -> Status:
    """Which kernels the outputs would have betrayed; of those that run, at least the part `minimum` must be. The
    others count as proven only by the per-site fold check together with equal initializer bytes."""
    runs = {name: value for name, value in side.reach.items() if value is not None}
    blind = {name: value for name, value in runs.items() if not value > SEEN}
    training = [name for name in side.reach if name not in runs]
    if not side.reach:
        return Status("coverage", "passed", "the model has no convolution kernels to cover")
    seen = len(runs) - len(blind)
    detail = f"a change of 1e-3 would show in the outputs for {seen} of {len(side.reach)} kernels"
    findings = (
        *(f"'{name}' moves them by {value:.2g} bounds{_cause(side, name)}" for name, value in blind.items()),
        *(f"'{name}' only runs in training" for name in training),
    )
    if runs and seen < minimum * len(runs):
        detail += f", {seen / len(runs):.0%} of those that run; --min-coverage asks for {minimum:.0%}"
        return Status("coverage", "failed", f"{detail}; pass --input with real samples", findings)
    if not findings:
        return Status("coverage", "passed", detail)
    if graph_state == "passed" and fold_state == "passed":
        detail += f"; {len(findings)} others by the per-site fold check and equal initializer bytes"
        return Status("coverage", "passed", detail, findings)
    return Status("coverage", "failed", f"{detail}; pass --input with real samples", findings)


def _cause(side: TorchSide, name: str) -> str:
    return f": {side.flat[name]}" if name in side.flat else ""


def check_resized(candidate: Path, side: TorchSide) -> Status:
    """The outputs at other sizes than the traced ones."""
    shapes = ", ".join("x".join(map(str, array.shape)) for array in side.inputs)
    try:
        status, _ = check_outputs(candidate, side)
    except DoconvError as error:
        return Status("other sizes", "failed", f"on inputs of {shapes}: {error}")
    return replace(status, name="other sizes", detail=f"on inputs of {shapes}: {status.detail}")


def prove(
    candidate: Path,
    baseline: Path,
    side: TorchSide,
    fold: Status,
    resized: TorchSide | None = None,
    min_coverage: float = 0.0,
) -> Proof:
    """Every check of one file; `resized` are the same models at other sizes of their dynamic dimensions."""
    proof = Proof(str(candidate), [fold, check_graph(baseline, candidate)])
    status, count = check_macs(baseline, candidate, side.inputs)
    proof.statuses.append(status)
    proof.macs, proof.count = count.total, count
    try:
        status, proof.outputs = check_outputs(candidate, side)
    except DoconvError as error:
        status = Status("outputs", "failed", str(error))
    proof.statuses.append(status)
    if resized is not None:
        proof.statuses.append(check_resized(candidate, resized))
    proof.reach, proof.flat = side.reach, side.flat
    proof.statuses.append(check_coverage(side, proof.state("graph"), fold.state, min_coverage))
    return proof
