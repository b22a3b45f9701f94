"""`to-doconv`, step by step: build the model, plan, convert, compare with the original bit for bit, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doconv_convert.artifacts.checkpoints.checkpoint import save
from doconv_convert.artifacts.checkpoints.unwrap import Selection
from doconv_convert.artifacts.models import SourceModel, find_inputs, open_model
from doconv_convert.artifacts.sources.source import Source
from doconv_convert.check.torch_runs.device import find_device
from doconv_convert.check.torch_runs.exact_start import require_same_function, require_same_start, run_in_eval
from doconv_convert.errors import UsageError
from doconv_convert.files import check_writable
from doconv_convert.rewrite.convert import convert_copy
from doconv_convert.rewrite.cost import Cost, cost
from doconv_convert.rewrite.discover import discover
from doconv_convert.rewrite.foreign.authors import authors_sites
from doconv_convert.rewrite.foreign.resume import Continued, continue_foreign
from doconv_convert.rewrite.levers import RANDOM_DIRECTION, measure_levers
from doconv_convert.rewrite.options import Options
from doconv_convert.rewrite.plan import Plan, as_plan, with_regions
from doconv_convert.rewrite.sites import decide


@dataclass(frozen=True)
class ConvertRequest:
    """What `to-doconv` is asked for: the command line's options. `out` is the file to write; None for the plan alone.
    `batch` is the training batch whose cost is told."""

    source: str
    out: Path | None = None
    options: Options = field(default_factory=Options)
    weights: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)
    input_shapes: Sequence[str] = ()
    input_file: Path | None = None
    batch: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class ConvertResult:
    """The plan, made on `samples` samples, and its cost; `written`, the file, and what it computes, in words (`same`),
    where one was asked for."""

    source: Source
    plan: Plan
    samples: int
    cost: Cost
    notes: tuple[str, ...]
    written: Path | None = None
    same: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source.to_json(),
            "plan": {**self.plan.to_json(), "batch": self.samples},
            "cost": self.cost.to_json(),
            "notes": list(self.notes),
            "written": None if self.written is None else str(self.written),
        }


def convert_source(request: ConvertRequest, *, progress: Callable[[str], None] = lambda text: None) -> ConvertResult:
    """Plan the conversion of a source's model; with `out`, convert it, compare its outputs with the original's and
    write it. Raises UsageError and DoconvError, before anything is written."""
    if request.out is not None:
        check_writable(request.out)
    device = find_device(request.device)
    opened = open_model(request.source, request.weights, request.model_args, request.options.seed, request.selection)
    inputs = find_inputs(opened, request.input_shapes, request.input_file)
    samples = 2 if inputs is None or inputs.fixed_batch is None else inputs.fixed_batch
    example = None if inputs is None else inputs.arguments(samples, like=opened.model)
    if example is not None:
        run_in_eval(opened.model, example)  # wrong inputs are refused here, in words
    elif request.out is not None:
        raise UsageError(f"'{request.source}': its input is not known; give it with `input_shapes` 1,3,224,224.")
    foreign = None
    if any(authors_sites(opened.model)):
        foreign = continue_foreign(opened.model, example, request.options, dry_run=request.out is None)
    original = opened.model if foreign is None else foreign.plain
    dry = request.out is None and example is not None
    planned = _plan(original, example, request.options, levers=dry) if foreign is None else foreign.plan
    expected = cost(planned, original, batch=request.batch, measured_batch=samples)
    notes = opened.notes if foreign is None else (*opened.notes, *foreign.told())
    notes = (*notes, *planned.note_on_regions)
    same = ""
    if request.out is not None:
        progress("comparing with the original")
        if foreign is None:
            converted = convert_copy(original, example, request.options)
            require_same_start(original, converted, example, device)
            same = "exactly what the original does (torch.equal)"
            save(converted, request.out, source=opened.source)
        else:
            same = _save_continued(opened, foreign, example, request.out)
    return ConvertResult(opened.source, planned, samples, expected, notes, request.out, same)


def _plan(model: Any, example: Any, options: Options, *, levers: bool) -> Plan:
    discovery = discover(model, example)
    decide(discovery.sites, options)
    planned = with_regions(as_plan(discovery), model)
    if not levers or not any(row.d_mul is not None for row in planned.rows):
        return planned
    return planned.with_levers(measure_levers(model, example, options), RANDOM_DIRECTION)


def _save_continued(opened: SourceModel, foreign: Continued, example: Any, out: Path) -> str:
    if foreign.converted is None:
        raise RuntimeError("a dry run converts nothing.")
    seen = require_same_function(opened.model, foreign.plain, foreign.converted, example)
    save(foreign.converted, out, source=opened.source)
    return f"what the foreign model does, {seen}"
