"""From a checkpoint to a proven ONNX file: load, fold, export in children, prove, and only then write."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from doconv_convert.artifacts.checkpoints.checkpoint import save
from doconv_convert.artifacts.checkpoints.recipe import RecipeSite, recipe_sites
from doconv_convert.artifacts.export.child_process import Child
from doconv_convert.artifacts.export.exporter import ExportReport
from doconv_convert.artifacts.export.onnx_file import install_model
from doconv_convert.artifacts.sources.inputs import Inputs
from doconv_convert.check.certificate.certificate import Origin, certificate_path, remove_certificate, write_certificate
from doconv_convert.check.proof import prove
from doconv_convert.check.status import Proof, Status
from doconv_convert.check.torch_runs.exact_start import run_in_eval
from doconv_convert.check.torch_runs.memory import is_large
from doconv_convert.errors import DoconvError
from doconv_convert.files import check_writable, temporary_beside
from doconv_convert.rewrite.fold import FoldReport
from doconv_convert.rewrite.fold_kernels import FOLD_TOLERANCE
from doconv_convert.rewrite.layer_stats import Layer, trained_layers
from doconv_convert.workflows.exports import Flags, export_and_run, export_job, threads_beside, write_inputs
from doconv_convert.workflows.trained_model import Loaded, fold_loaded


@dataclass(frozen=True)
class Release:
    """What `fold` made: the fold's report, the export's, the proof (None without ONNX), remarks, the certificate,
    and the model's convolutions, where they were asked for."""

    fold: FoldReport
    export: ExportReport | None
    proof: Proof | None
    notes: tuple[str, ...]
    certificate: Path | None = None
    layers: list[Layer] | None = None


def release(
    loaded: Loaded,
    inputs: Inputs | None,
    *,
    plain: Path | None = None,
    onnx: Path | None = None,
    flags: Flags | None = None,
    verify: bool = True,
    device: torch.device | None = None,
    min_coverage: float = 0.0,
    certify: bool = False,
    layers: bool = False,
    waiting: Sequence[Child] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> Release:
    """Fold, export and prove; `plain` and `onnx` are written only when no check failed, with `certify` and a proof
    the certificate of `onnx` too. `layers` asks for the convolutions and how training moved them. `waiting` children
    take the exports. The models of a large network have no values afterwards (`check/torch_runs/memory.py`).

    Raises DoconvError: a fold that is not finite, an export that fails, a place that cannot be written.
    """
    for target in (plain, onnx):
        if target is not None:
            check_writable(target)
    if inputs is not None:  # refuse a wrong one now, not after two exports
        run_in_eval(loaded.trained, inputs.arguments(inputs.export_batch, like=loaded.trained))
    progress("folding")
    sites = recipe_sites(loaded.trained)
    with threads_beside(len(waiting)):
        folded = fold_loaded(loaded, inplace=onnx is None and not layers)
    status = fold_status(sites, folded)
    notes = _notes(loaded, folded, sites)
    moved = describe_layers(loaded.trained, folded, inputs) if layers else None
    # a network whose foreign layers became plain ones is no longer what its source draws
    plain_source = None if folded.by_graph else loaded.source
    if onnx is None or inputs is None:
        if plain is not None:
            save(folded.model, plain, source=plain_source)
        return Release(folded, None, None, notes, layers=moved)
    beside = 0 if is_large(loaded.trained) else 2 if verify else 1
    with _workspace(onnx) as workspace, threads_beside(beside):
        state = workspace / "plain.safetensors"
        save(folded.model, state, source=plain_source)
        candidate, baseline = workspace / onnx.name, workspace / f"baseline-{onnx.name}"
        sample = workspace / "inputs.npz"
        write_inputs(sample, inputs.tensors(inputs.export_batch))
        flags = flags or Flags()
        jobs = [export_job(loaded.source, state, sample, candidate, flags, inputs, loaded)]
        if verify:
            job = export_job(loaded.source, state, sample, baseline, flags, inputs)
            jobs.append(replace(job, fold_foreign=bool(folded.by_graph), constant_kernels=loaded.constant_kernels))
        progress("exporting")
        reports, sides = export_and_run(jobs, loaded, folded.model, inputs, flags, device, waiting)
        progress("proving")
        proof = Proof(str(onnx), [status])
        if sides:
            proof = prove(candidate, baseline, sides[0], status, sides[1], min_coverage)
        proof.file = str(onnx)
        certificate = None
        if not proof.failed:
            made: list[Path] = []
            if certify and sides and proof.count is not None:
                origin = Origin(Path(loaded.checkpoint.path), loaded.source, reports[0].opset, reports[0].exporter)
                made = write_certificate(candidate, proof, sides[0], origin)  # of the bytes that were proven
                certificate = certificate_path(onnx)
            _install(candidate, onnx, made, (state, plain))
    return Release(folded, reports[0], proof, notes, certificate, moved)


def _install(candidate: Path, onnx: Path, beside: Sequence[Path], plain: tuple[Path, Path | None]) -> None:
    """The model, the files `beside` it and the `plain` state dict (finished, place): written out first, then renamed
    into place together. An earlier model's certificate goes where the new one has none."""
    state, place = plain
    moves = [(path, onnx.with_name(path.name)) for path in beside]
    if place is None:
        install_model(candidate, onnx, moves)
    else:
        with temporary_beside(place) as temporary:
            shutil.copyfile(state, temporary)
            install_model(candidate, onnx, [*moves, (temporary, place)])
    if not beside:
        remove_certificate(onnx)


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
        f"{len(folded.folded)} kernels{others}; kernel and feature composition agree in float64 to {FOLD_TOLERANCE:.0e}"
    )
    if folded.by_graph:
        detail += f"; {len(folded.by_graph)} foreign layers folded by graph, equal to their own forward to as much"
    return Status("fold", "passed", detail)


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """A folder beside the target: what is proven there moves into place by a rename."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
    except OSError as error:
        reason = error.strerror or str(error)
        raise DoconvError(f"cannot write '{target}': {reason}; free the place or choose another folder") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _notes(loaded: Loaded, folded: FoldReport, sites: Sequence[RecipeSite]) -> tuple[str, ...]:
    notes = [*loaded.checkpoint.notes, *folded.notes]
    if not sites and not loaded.checkpoint.units and not folded.by_graph:
        notes.append(f"'{loaded.checkpoint.path}' has no D: a plain checkpoint, nothing to fold")
    notes += [f"'{one.name}' ({one.cls}) was not folded: {one.declined}" for one in folded.foreign if one.declined]
    dtypes = {str(p.dtype).removeprefix("torch.") for p in loaded.trained.parameters()} & {
        "bfloat16",
        "float16",
        "float64",
    }
    if dtypes:
        notes.append(
            f"the model is {', '.join(sorted(dtypes))}; the ONNX file is float32, which onnxruntime's CPU runs"
        )
    return tuple(notes)
