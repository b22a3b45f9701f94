"""From a checkpoint to a proven ONNX file: load, fold, export in children, prove, and only then write."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from doconv_convert.artifacts.checkpoint import (
    fitted,
    load_into,
    save,
)
from doconv_convert.artifacts.export_child import Child, ExportJob, export_in_child
from doconv_convert.artifacts.files import atomic_write, check_writable
from doconv_convert.artifacts.models import Inputs, notes_on
from doconv_convert.artifacts.onnx_export import ExportReport
from doconv_convert.artifacts.onnx_file import install_model
from doconv_convert.artifacts.reading import Checkpoint, read_checkpoint, require_finite
from doconv_convert.artifacts.recipe import recipe_sites
from doconv_convert.artifacts.selection import Selection
from doconv_convert.artifacts.sources import Source, build
from doconv_convert.check.certificate import Origin, remove_certificate, write_certificate
from doconv_convert.check.proof import Proof, Status, TorchSide, prove
from doconv_convert.check.start import run_in_eval
from doconv_convert.check.torch_side import resized_side, torch_side
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.rewrite.convert import copy_model
from doconv_convert.rewrite.fold import FoldReport, fold_in_place
from doconv_convert.rewrite.folding import FOLD_TOLERANCE
from doconv_convert.rewrite.modes import in_eval
from doconv_convert.rewrite.sites import Options
from doconv_convert.rewrite.trained import Layer, trained_layers

SIDE_BY_SIDE_BYTES = 2**30


@dataclass(frozen=True)
class Flags:
    """How to export: as in `export_onnx`."""

    opset: int | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    dynamic_batch: bool = True
    dynamic: Mapping[str, Mapping[int, str]] | None = None


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in its network: the trained (unfolded) model in eval mode and where it came from."""

    checkpoint: Checkpoint
    source: Source
    trained: nn.Module
    options: Options
    constant_kernels: bool = False


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


def load_trained(
    path: Path,
    source: Source | None,
    options: Options,
    selection: Selection | None = None,
    constant_kernels: bool = False,
) -> Loaded:
    """Read a checkpoint of ours, or any state dict of `source`'s model, foreign DO-Conv layers included.
    Raises DoconvError."""
    checkpoint = read_checkpoint(path, selection)
    require_finite(checkpoint)
    if source is None:
        recipe = checkpoint.recipe
        source = recipe.trusted_source(str(path)) if recipe else _no_source(path)
    model = build(source)
    checkpoint = fitted(checkpoint, model)
    checkpoint = replace(checkpoint, notes=(*checkpoint.notes, *notes_on(source, model)))
    return Loaded(checkpoint, source, in_eval(load_into(model, checkpoint, options)), options, constant_kernels)


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
    take the exports.

    Raises DoconvError: a fold that is not finite, an export that fails, a place that cannot be written.
    """
    for target in (plain, onnx):
        if target is not None:
            check_writable(target)
    if inputs is not None:  # refuse a wrong one now, not after two exports
        run_in_eval(loaded.trained, inputs.arguments(inputs.export_batch, like=loaded.trained))
    progress("folding")
    with _threads_beside(len(waiting)):
        folded = fold_loaded(loaded)
    status = fold_status(loaded.trained, folded)
    notes = _notes(loaded, folded)
    moved = describe_layers(loaded.trained, folded, inputs) if layers else None
    # a network whose foreign layers became plain ones is no longer what its source draws
    plain_source = None if folded.by_graph else loaded.source
    if onnx is None or inputs is None:
        if plain is not None:
            save(folded.model, plain, source=plain_source)
        return Release(folded, None, None, notes, layers=moved)
    with _workspace(onnx) as workspace, _threads_beside(2 if verify else 1):
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
        batch = inputs.proof_batch if flags.dynamic_batch else inputs.export_batch
        models = loaded.trained, folded.model
        with ThreadPoolExecutor(1) as background:
            exports = background.submit(export_in_child, jobs, parallel=_side_by_side(loaded.trained), waiting=waiting)
            sides = torch_sides(*models, inputs, batch, flags, device) if verify else None
            reports = exports.result()
        if sides is not None and batch != inputs.export_batch and not reports[0].dynamic_batch:
            sides = torch_sides(*models, inputs, inputs.export_batch, flags, device)
        progress("proving")
        proof = Proof(str(onnx), [status])
        if sides:
            proof = prove(candidate, baseline, sides[0], status, sides[1], min_coverage)
        proof.file = str(onnx)
        certificate = None
        if not proof.failed:
            remove_certificate(onnx)
            install_model(candidate, onnx)
            if certify and sides and proof.count is not None:
                origin = Origin(Path(loaded.checkpoint.path), loaded.source, reports[0].opset, reports[0].exporter)
                certificate = write_certificate(onnx, proof, sides[0], origin)
            if plain is not None:
                with atomic_write(plain) as temporary:
                    shutil.copyfile(state, temporary)
    return Release(folded, reports[0], proof, notes, certificate, moved)


def torch_sides(
    trained: nn.Module, folded: nn.Module, inputs: Inputs, batch: int, flags: Flags, device: torch.device | None = None
) -> tuple[TorchSide, TorchSide | None]:
    """Torch's part of the proof, and the same at other sizes where `flags` ask for dynamic ones."""
    device = device or torch.device("cpu")
    side = torch_side(trained, folded, inputs.arguments(batch), batch, device)
    resized = resized_side(trained, folded, inputs, batch, flags.dynamic or {}, flags.input_names, device)
    return side, resized


def fold_loaded(loaded: Loaded) -> FoldReport:
    """Fold a copy of the trained model."""
    return fold_in_place(copy_model(loaded.trained), constant_kernels=loaded.constant_kernels, check_first=False)


def describe_layers(trained: nn.Module, folded: FoldReport, inputs: Inputs | None) -> list[Layer]:
    """Every convolution of the folded model, and how far training moved those with a D."""
    if inputs is None:
        return trained_layers(trained, folded.model)
    example = inputs.arguments(inputs.export_batch, like=folded.model)
    return trained_layers(trained, folded.model, example, inputs.export_batch)


def fold_status(trained: nn.Module, folded: FoldReport) -> Status:
    """The per-site check's status: `fold` raises where it fails, so coming past it is having passed."""
    without_d = sum(site.d_mul is None for site in recipe_sites(trained))
    if not folded.folded and not folded.by_graph and not without_d:
        return Status("fold", "passed", "nothing to fold: a plain checkpoint")
    others = f" ({without_d} more have no D)" if without_d else ""
    detail = (
        f"{len(folded.folded)} kernels{others}; kernel and feature composition agree in float64 to {FOLD_TOLERANCE:.0e}"
    )
    if folded.by_graph:
        detail += f"; {len(folded.by_graph)} foreign layers folded by graph, equal to their own forward to as much"
    return Status("fold", "passed", detail)


def export_job(
    source: Source,
    state: Path,
    sample: Path,
    target: Path,
    flags: Flags,
    inputs: Inputs,
    trained: Loaded | None = None,
) -> ExportJob:
    """An export in a child: of `source`'s plain network with `state`, or of `trained` folded by the child."""
    return ExportJob(
        source,
        state,
        sample,
        target,
        flags.opset,
        flags.input_names,
        flags.output_names,
        flags.dynamic_batch and inputs.fixed_batch is None,
        flags.dynamic,
        image_list=inputs.image_list,
        checkpoint=None if trained is None else Path(trained.checkpoint.path),
        include=("*",) if trained is None else tuple(trained.options.include),
        exclude=() if trained is None else tuple(trained.options.exclude),
        ema=trained is not None and trained.checkpoint.selection.ema,
        prefix="" if trained is None else trained.checkpoint.selection.prefix,
        constant_kernels=trained is not None and trained.constant_kernels,
    )


def write_inputs(path: Path, tensors: Sequence[Tensor]) -> None:
    arrays: Any = {f"input_{index}": tensor.numpy() for index, tensor in enumerate(tensors)}
    np.savez(path, **arrays)


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


@contextmanager
def _threads_beside(processes: int) -> Iterator[None]:
    """Leave the exporting processes a core each: OpenMP threads that must wait for a core spin, for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - processes))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _side_by_side(model: nn.Module) -> bool:
    return sum(p.numel() * p.element_size() for p in model.parameters()) < SIDE_BY_SIDE_BYTES


def _notes(loaded: Loaded, folded: FoldReport) -> tuple[str, ...]:
    notes = list(loaded.checkpoint.notes)
    if not recipe_sites(loaded.trained) and not loaded.checkpoint.units and not folded.by_graph:
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


def _no_source(path: Path) -> Source:
    raise UsageError(f"'{path}' has no recipe that says what model it holds; name it with --model SOURCE.")
