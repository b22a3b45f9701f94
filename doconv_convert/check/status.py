"""The states of checks, and what they amount to: whether together they prove a file.

A status is passed, failed, not checked or, of weights that are others, equivalent; nothing "succeeds with a warning".
Importing this needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from doconv_convert.check.macs.result import MacCount
from doconv_convert.check.outputs.compare import OutputCheck
from doconv_convert.words import visible

if TYPE_CHECKING:
    from doconv_convert.rewrite.layer_stats import Layer

State = Literal["passed", "failed", "not checked", "equivalent"]


@dataclass(frozen=True)
class Status:
    """One check: its state, a sentence, and what was found, line by line."""

    name: str
    state: State
    detail: str
    findings: tuple[str, ...] = ()


@dataclass
class Proof:
    """All statuses of one file, with their figures; `compared` says on which inputs its outputs were compared;
    `layers`, the model's convolutions, where they were asked for."""

    file: str
    statuses: list[Status] = field(default_factory=list)
    macs: int | None = None
    outputs: list[OutputCheck] = field(default_factory=list)
    sensitivity: Mapping[str, float | None] = field(default_factory=dict)
    uncovered_reason: Mapping[str, str] = field(default_factory=dict)
    count: MacCount | None = None
    layers: Sequence[Layer] | None = None
    compared: str = ""

    @property
    def failed(self) -> bool:
        return any(status.state == "failed" for status in self.statuses)

    @property
    def proven(self) -> bool:
        """Every check was made and passed."""
        return bool(self.statuses) and all(status.state == "passed" for status in self.statuses)

    @property
    def equivalent(self) -> bool:
        """Other weights, and everything else passed: so the outputs agree on the inputs compared, and that is all."""
        states = {status.state for status in self.statuses}
        return "equivalent" in states and states <= {"passed", "equivalent"}

    @property
    def verdict(self) -> str:
        """ "proven: true", "proven: false" or what stands between them, in words."""
        if self.equivalent:
            return "proven: false, equivalent on these inputs"
        return f"proven: {str(self.proven).lower()}"

    def state(self, name: str) -> State:
        return next((status.state for status in self.statuses if status.name == name), "not checked")

    def _repr_html_(self) -> str:
        """As a notebook shows it: the verdict, and a row a check; names in it are text."""
        from markupsafe import Markup

        def findings(status: Status) -> Markup:
            return Markup("").join(Markup("<br>- {}").format(visible(finding)) for finding in status.findings)

        row = Markup("<tr><td>{}</td><td><b>{}</b></td><td style='text-align:left'>{}{}</td></tr>")
        rows = [row.format(visible(one.name), one.state, visible(one.detail), findings(one)) for one in self.statuses]
        head = Markup("<p><b>{}</b>: {}</p>").format(visible(self.file), self.verdict)
        inputs = Markup("<p>compared on {}</p>").format(visible(self.compared)) if self.compared else ""
        return head + Markup("<table>") + Markup("").join(rows) + Markup("</table>") + inputs

    def to_json(self) -> dict[str, Any]:
        """Every figure but the count node by node; NaN and infinity, which JSON does not have, are null."""
        figures: dict[str, Any] = without_nan(asdict(replace(self, count=None)))
        del figures["count"]
        if self.layers is None:
            del figures["layers"]
        return {**figures, "proven": self.proven, "equivalent": self.equivalent, "failed": self.failed}


def without_nan(value: Any) -> Any:
    """The same value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
