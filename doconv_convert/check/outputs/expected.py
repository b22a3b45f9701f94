"""What the outputs are held against: the reference run, as arrays. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from doconv_convert.check.outputs.compare import Array


@dataclass(frozen=True)
class FoldRun:
    """The trained network against its fold, both in float64: the largest relative `error` of an output; how the network
    differs from itself, where it does (`random`); what the fold changed (`findings`). `float32_error` is what fp32
    torch is off with the trained network as it is, composing its kernels in float32 too."""

    error: float = 0.0
    random: str | None = None
    findings: tuple[str, ...] = ()
    float32_error: float | None = None


@dataclass(frozen=True)
class ReferenceRun:
    """What torch says about the inputs: float64 outputs of the trained model, fp32 outputs of the plain one, the batch,
    and per kernel how far a change of 1e-3 would move them (in units of their bounds).

    `detections` are the outputs that belong together (`detection_groups`). `alone` runs the first n samples in
    float64, by themselves; `alone_is_cheap` unless it reads the weights again. `uncovered_reason` are unseen kernels
    whose gradient is cut or zero, with what changes of their own size tell of them (`coverage.why_uncovered`). `fold`
    is what was seen of the fold itself.
    `further` are runs of more samples than fit one batch, with outputs alone; `compared` says what all of them are."""

    inputs: Sequence[Array]
    truth: Sequence[Array]
    plain: Sequence[Array]
    samples: int
    sensitivity: Mapping[str, float | None]
    detections: Sequence[Mapping[str, int]] = ()
    alone: Callable[[int], Sequence[Array]] | None = None
    alone_is_cheap: bool = True
    uncovered_reason: Mapping[str, str] = field(default_factory=dict)
    fold: FoldRun | None = None
    further: Sequence[ReferenceRun] = ()
    compared: str = ""
