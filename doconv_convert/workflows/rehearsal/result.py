"""What a rehearsal found: a status a step, and the figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from doconv_convert.check.status import Proof
from doconv_convert.errors import DoconvError
from doconv_convert.rewrite.layer_stats import Layer

CANNOT_EXPORT = "original cannot be exported"


@dataclass
class Step:
    """One step of a rehearsal: "passed", "failed" or CANNOT_EXPORT, and how long it took in seconds."""

    name: str
    state: str
    detail: str
    seconds: float


@dataclass
class Rehearsal:
    """How one model fared. `counts` says how many convolutions were swapped, have no D, or were kept and why;
    `layers` are those convolutions; `exporter` and `dynamic_batch` say what the export turned out to be; `settings`
    are `rehearse`'s other arguments."""

    source: str
    steps: list[Step] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    exporter: str | None = None
    dynamic_batch: bool | None = None
    proof: Proof | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """ "passed", CANNOT_EXPORT, or which step failed."""
        for step in self.steps:
            if step.state != "passed":
                return step.state if step.state == CANNOT_EXPORT else f"{step.name} failed"
        return "passed"

    @property
    def proven(self) -> bool:
        return self.status == "passed" and self.proof is not None and self.proof.proven

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "status": self.status,
            "proven": self.proven,
            "proof": self.proof and self.proof.to_json(),
        }


class StepFailed(Exception):
    """A step failed, because of `__cause__`; the rest cannot be done."""


@contextmanager
def step(rehearsal: Rehearsal, name: str) -> Iterator[Callable[[str], None]]:
    """Adds a step, with what was told in it; an error makes it failed and raises Stop."""
    start = time.perf_counter()
    detail = [""]
    try:
        yield lambda text: detail.__setitem__(0, text)
    except Exception as error:  # a foreign model may raise anything; the rehearsal reports it
        reason = str(error) if isinstance(error, DoconvError) else f"{type(error).__name__}: {error}"
        rehearsal.steps.append(Step(name, "failed", reason, time.perf_counter() - start))
        raise StepFailed from error
    rehearsal.steps.append(Step(name, "passed", detail[0], time.perf_counter() - start))
