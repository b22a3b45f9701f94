"""`flops`, step by step: count one model's MACs, and compare them with a budget and with another model's.

Importing this, and counting ONNX files, needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doconv_convert.check.confined import SECONDS, Confined, confined
from doconv_convert.check.macs.figures import compare_counts
from doconv_convert.check.macs.files import count_file, dims_of_file, regions_of_file
from doconv_convert.check.macs.result import MacCount, RegionLeft
from doconv_convert.errors import UsageError
from doconv_convert.files import scratch_folder
from doconv_convert.words import listed

if TYPE_CHECKING:
    from doconv_convert.artifacts.export.job import Flags


@dataclass(frozen=True)
class CountRequest:
    """What `flops` is asked for: the command line's options. `model` and `against` are ONNX files or SOURCEs."""

    model: str
    against: str | None = None
    most: int | None = None
    max_regions: int | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    model_args: Mapping[str, Any] = field(default_factory=dict)
    input_shapes: Sequence[str] = ()
    allow_assumed: bool = False
    timeout: float = SECONDS


@dataclass(frozen=True)
class CountResult:
    """The count, and what it was compared with: `differences` from `against`, whether it is `within` the budget.
    `unconfirmed` are values, of either file, whose sizes no operator confirms, unless those are allowed."""

    request: CountRequest
    count: MacCount
    differences: tuple[str, ...] = ()
    unconfirmed: tuple[str, ...] = ()
    regions: tuple[RegionLeft, ...] = ()

    @property
    def few_regions(self) -> bool:
        """Whether no more linear regions are left than asked for; True where nothing was asked."""
        return self.request.max_regions is None or len(self.regions) <= self.request.max_regions

    @property
    def within(self) -> bool:
        """Whether nothing is above the budget, or out of its sight; True without one."""
        most = self.request.most
        return most is None or (self.count.total <= most and not self.count.uncounted and not self.unconfirmed)

    @property
    def equal(self) -> bool:
        """Whether it has the MACs of `against`, for all that is known; True without one."""
        return self.request.against is None or not (self.differences or self.unconfirmed)

    @property
    def failed(self) -> bool:
        return not (self.within and self.equal and self.few_regions)

    def to_json(self) -> dict[str, Any]:
        asked, count = self.request, self.count
        document = {
            "model": asked.model,
            "unit": "MACs",
            "total": count.total,
            "nodes": [vars(node) for node in count.nodes],
            "uncounted": count.uncounted,
            "assumed": count.assumed,
            "claimed": count.claimed,
            "inputs": count.inputs,
        }
        if self.regions or asked.max_regions is not None:
            document["linear_regions"] = [asdict(region) for region in self.regions]
        if asked.max_regions is not None:
            document |= {"max_regions": asked.max_regions, "few_regions": self.few_regions}
        if asked.most is not None:
            document |= {"max": asked.most, "within": self.within}
        if asked.against is not None:
            differences = list(self.differences)
            document |= {"against": asked.against, "differences": differences, "equal": self.equal}
        return document


def count_models(request: CountRequest) -> CountResult:
    """Count and compare. A size counts where its dimension exists, and must do so in one of the files.

    Raises UsageError for a size without a dimension, DoconvError for what cannot be read or exported.
    """
    models = [request.model] if request.against is None else [request.model, request.against]
    with ExitStack() as scope:
        files = [model for model in models if Path(model).suffix == ".onnx"]
        process = scope.enter_context(confined()) if files else None
        known = {model: dims_of_file(process, Path(model), request.timeout) for model in files if process}
        for name in request.dims:
            if not any(name in names for names in known.values()):
                have = listed([f"'{one}'" for one in sorted({one for names in known.values() for one in names})])
                raise UsageError(f"`dims`: no dynamic dimension is named '{name}', the files have {have or 'none'}.")
        counts = [_count(process, model, known.get(model), request) for model in models]
        regions = _regions(process, request, counts[0], known.get(request.model))
    differences = compare_counts(counts[1], counts[0]) if request.against is not None else ()
    claimed = () if request.allow_assumed else tuple(dict.fromkeys(name for one in counts for name in one.claimed))
    return CountResult(request, counts[0], tuple(differences), claimed, regions)


def _regions(
    process: Confined | None, request: CountRequest, count: MacCount, dims: Sequence[str] | None
) -> tuple[RegionLeft, ...]:
    """Those of a file; a SOURCE's are told by its plan."""
    if dims is None or process is None:
        return ()
    bound = {name: size for name, size in request.dims.items() if name in dims}
    path, required = Path(request.model), request.max_regions is not None
    return regions_of_file(process, path, count, bound, request.ignore, request.timeout, required=required)


def _count(process: Confined | None, model: str, dims: Sequence[str] | None, request: CountRequest) -> MacCount:
    if dims is None or process is None:
        return count_source(model, request.model_args, request.input_shapes, request.ignore)
    bound = {name: size for name, size in request.dims.items() if name in dims}
    return count_file(process, Path(model), bound, request.ignore, request.timeout)


def count_source(
    text: str, model_args: Mapping[str, Any], input_shapes: Sequence[str], ignore: Sequence[str] = ()
) -> MacCount:
    """MACs of one run of a SOURCE's plain network, counted on its ONNX export: of one sample, or of the batch that an
    exported program fixes (`.inputs` says)."""
    from doconv_convert.artifacts.export.job import Flags
    from doconv_convert.artifacts.models import find_inputs, is_checkpoint, open_model
    from doconv_convert.check.macs.counting import count_macs
    from doconv_convert.rewrite.fold import fold_in_place
    from doconv_convert.workflows.exports import export_baseline, is_dynamic
    from doconv_convert.workflows.rehearsal.randomize import use_every_parameter

    opened = open_model(text, None, model_args, 0)
    inputs = find_inputs(opened, input_shapes, None)
    if inputs is None:
        raise UsageError(f"'{text}': its input is not known; give it with `input_shapes` 1,3,224,224.")
    if not is_checkpoint(text):
        use_every_parameter(opened.model, inputs)
    report = fold_in_place(opened.model, check_first=False)

    def export(folder: Path, flags: Flags, batch: int | None = None) -> Path:
        by_graph = bool(report.by_graph)
        baseline, _ = export_baseline(
            folder, opened.source, report.model, inputs, flags, batch=batch, fold_foreign=by_graph
        )
        return baseline

    with scratch_folder() as folder:
        baseline = export(folder, Flags())
        if not (inputs.image_list or is_dynamic(baseline)):  # its count would be that of the traced batch
            baseline = export(folder, Flags(dynamic_batch=False), inputs.fixed_batch or 1)
        return count_macs(baseline, ignore=ignore)
