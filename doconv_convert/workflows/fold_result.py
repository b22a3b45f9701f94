"""What a fold ends in: one result, whatever the way there, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from doconv_convert.artifacts.checkpoints.recipe import RecipeSite
from doconv_convert.artifacts.export.exporter import ExportReport
from doconv_convert.artifacts.sources.inputs import Inputs
from doconv_convert.artifacts.sources.source import Source
from doconv_convert.check.merged import Merged, value_hash
from doconv_convert.check.status import Proof, Status
from doconv_convert.rewrite.fold import FoldReport, merge_notes
from doconv_convert.rewrite.fold_kernels import FOLD_TOLERANCE
from doconv_convert.rewrite.layer_stats import Layer, trained_layers
from doconv_convert.rewrite.linear.region_check import REGION_TOLERANCE
from doconv_convert.rewrite.linear.steps import Merge
from doconv_convert.words import counted, visible
from doconv_convert.workflows.trained_model import TrainedCheckpoint


@dataclass(frozen=True)
class FoldResult:
    """The names of the `folded` layers, what the user should know (`notes`), and the files `written`.

    `source` and `model`, the plain one, are None where no model was needed; `export`, `proof` and `certificate` where
    no ONNX file was asked for. The proof is not to be relied on without `verified`. `layers`, where they were asked
    for, are the model's convolutions and how training moved them; `merged`, what was merged and left.
    """

    folded: tuple[str, ...]
    notes: tuple[str, ...]
    written: tuple[Path, ...] = ()
    source: Source | None = None
    model: nn.Module | None = None
    export: ExportReport | None = None
    proof: Proof | None = None
    verified: bool = True
    certificate: Path | None = None
    layers: list[Layer] | None = None
    merged: Merged | None = None

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        from markupsafe import escape

        if self.proof is not None:
            return self.proof._repr_html_()
        return escape(", ".join(visible(str(path)) for path in self.written))

    @property
    def proven(self) -> bool:
        return self.verified and self.proof is not None and self.proof.proven

    def to_json(self) -> dict[str, Any]:
        return {
            "source": None if self.source is None else self.source.to_json(),
            "folded": list(self.folded),
            "notes": list(self.notes),
            "export": None if self.export is None else asdict(self.export),
            "proof": None if self.proof is None else self.proof.to_json(),
            "proven": self.proven,
            "written": [str(path) for path in self.written],
            "certificate": None if self.certificate is None else str(self.certificate),
            **({} if self.merged is None else {"merged": self.merged.to_json()}),
            "layers": None if self.layers is None else [asdict(layer) for layer in self.layers],
        }


def describe_layers(trained: nn.Module, folded: FoldReport, inputs: Inputs | None) -> list[Layer]:
    """Every convolution of the folded model, and how far training moved those with a D."""
    if inputs is None:
        return trained_layers(trained, folded.model)
    example = inputs.arguments(inputs.export_batch, like=folded.model)
    return trained_layers(trained, folded.model, example, inputs.export_batch)


def fold_status(sites: Sequence[RecipeSite], folded: FoldReport) -> Status:
    """The per-site check's status: `fold` raises where it fails, so coming past it is having passed. `sites` are the
    trained model's (`recipe_sites`)."""
    without_d = sum(site.d_mul is None for site in sites)
    if not folded.folded and not folded.by_graph and not without_d:
        return Status("fold", "passed", _with_merged("nothing to fold: a plain checkpoint", folded))
    others = f" ({without_d} more have no D)" if without_d else ""
    detail = (
        f"{counted(len(folded.folded), 'kernel')}{others}; kernel and feature composition agree in float64 to "
        f"{FOLD_TOLERANCE:.0e}"
    )
    if folded.by_graph:
        foreign = counted(len(folded.by_graph), "foreign layer")
        detail += f"; {foreign} folded by graph, equal to their own forward to as much"
    exact = {name: one for name, one in folded.rounding.items() if one.corrected is not None}
    if exact:
        weights = sum(one.weights for one in exact.values())
        detail += (
            f"; error-free sums show each of {weights:,} weights to be the float32 number nearest to the exact product "
            "of D and W"
        )
    rest = [name for name in folded.folded if name not in exact]
    findings = tuple(f"'{name}' is held to that tolerance alone" for name in rest) if exact else ()
    return Status("fold", "passed", _with_merged(detail, folded), findings)


def _with_merged(detail: str, folded: FoldReport) -> str:
    if not folded.merged:
        return detail
    worst = max(region.error for region in folded.merged)
    return (
        f"{detail}; {counted(len(folded.merged), 'linear region')} merged, each equal to its own forward in float64 at "
        f"several sizes, borders included (at most {worst:.1e}, allowed {REGION_TOLERANCE:.0e})"
    )


def merged_facts(merge: Merge, folded: FoldReport) -> Merged | None:
    """What was merged, as the checks and the certificate take it; None where it was not asked for."""
    if merge == "none":
        return None
    values = set()
    for region in folded.merged:
        values |= {value_hash(p.detach().cpu().numpy()) for p in folded.model.get_submodule(region.name).parameters()}
    regions, left = [asdict(one) for one in folded.merged], [asdict(one) for one in folded.left]
    return Merged(merge, without_tuples(regions), without_tuples(left), frozenset(values))


def without_tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_tuples(one) for key, one in value.items()}
    return [without_tuples(one) for one in value] if isinstance(value, list | tuple) else value


def notes_on_fold(loaded: TrainedCheckpoint, folded: FoldReport, sites: Sequence[RecipeSite]) -> tuple[str, ...]:
    notes = [*loaded.checkpoint.notes, *folded.notes]
    if not sites and not loaded.checkpoint.units and not folded.by_graph and not folded.merged:
        notes.append(f"'{loaded.checkpoint.path}' has no D: a plain checkpoint, nothing to fold")
    notes += merge_notes(folded, loaded.merge)
    return (*notes, *notes_on_export(loaded.trained, folded))


def notes_on_export(trained: nn.Module, folded: FoldReport) -> tuple[str, ...]:
    """Layers that were not folded, and a dtype that the ONNX file does not have."""
    notes = [f"'{one.name}' ({one.cls}) was not folded: {one.declined}" for one in folded.foreign if one.declined]
    dtypes = {str(p.dtype).removeprefix("torch.") for p in trained.parameters()} & {"bfloat16", "float16", "float64"}
    if dtypes:
        notes.append(
            f"the model is {', '.join(sorted(dtypes))}; the ONNX file is float32, which onnxruntime's CPU runs"
        )
    return tuple(notes)
