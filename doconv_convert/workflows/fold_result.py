"""What a fold ends in: one result, whatever the way there, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from doconv_convert.artifacts.checkpoints.recipe import RecipeSite
from doconv_convert.artifacts.export.exporter import ExportReport
from doconv_convert.artifacts.sources.inputs import Inputs
from doconv_convert.artifacts.sources.source import Source
from doconv_convert.check.status import Proof, Status
from doconv_convert.rewrite.fold import FoldReport
from doconv_convert.rewrite.fold_kernels import FOLD_TOLERANCE
from doconv_convert.rewrite.layer_stats import Layer, trained_layers
from doconv_convert.words import counted, visible
from doconv_convert.workflows.trained_model import TrainedCheckpoint


@dataclass(frozen=True)
class FoldResult:
    """The names of the `folded` layers, what the user should know (`notes`), and the files `written`.

    `source` and `model`, the plain one, are None where no model was needed; `export`, `proof` and `certificate` where
    no ONNX file was asked for. The proof is not to be relied on without `verified`. `layers`, where they were asked
    for, are the model's convolutions and how training moved them.
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
        return Status("fold", "passed", "nothing to fold: a plain checkpoint")
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
    return Status("fold", "passed", detail, findings)


def notes_on_fold(loaded: TrainedCheckpoint, folded: FoldReport, sites: Sequence[RecipeSite]) -> tuple[str, ...]:
    notes = [*loaded.checkpoint.notes, *folded.notes]
    if not sites and not loaded.checkpoint.units and not folded.by_graph:
        notes.append(f"'{loaded.checkpoint.path}' has no D: a plain checkpoint, nothing to fold")
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
