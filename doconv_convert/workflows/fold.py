"""`fold`, step by step: load the checkpoint, fold, export in children, prove, and only then write."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from doconv_convert.artifacts.checkpoints.checkpoint import save
from doconv_convert.artifacts.checkpoints.fold_by_keys import fold_foreign_file
from doconv_convert.artifacts.checkpoints.recipe import recipe_sites
from doconv_convert.artifacts.export.child_process import Child
from doconv_convert.artifacts.export.job import Flags
from doconv_convert.artifacts.export.onnx_file import install_model
from doconv_convert.artifacts.models import SourceModel, find_inputs
from doconv_convert.artifacts.sources.inputs import Inputs
from doconv_convert.artifacts.sources.source import parse_source
from doconv_convert.check.certificate.certificate import Origin, write_certificate
from doconv_convert.check.certificate.paths import certificate_path, reference_path
from doconv_convert.check.proof import prove
from doconv_convert.check.status import Proof
from doconv_convert.check.torch_runs.device import find_device
from doconv_convert.check.torch_runs.exact_start import run_in_eval
from doconv_convert.check.torch_runs.memory import has_twin, is_large
from doconv_convert.errors import UsageError
from doconv_convert.files import check_writable, temporary_beside, workspace_beside
from doconv_convert.workflows.exports import export_and_run, export_job, threads_beside, twin_of, write_inputs
from doconv_convert.workflows.fold_request import FoldRequest
from doconv_convert.workflows.fold_result import (
    FoldResult,
    describe_layers,
    fold_status,
    merged_facts,
    notes_on_fold,
)
from doconv_convert.workflows.trained_model import TrainedCheckpoint, fold_trained, load_trained

Progress = Callable[[str], None]


def fold_checkpoint(
    request: FoldRequest, *, waiting: Sequence[Child] = (), progress: Progress = lambda text: None
) -> FoldResult:
    """Fold a checkpoint and write what is asked for; `waiting` children take the exports.

    Without a model and an ONNX file, layers of the original implementation are folded by their keys alone.
    Raises UsageError and DoconvError, before anything is written.
    """
    device = find_device(request.device)
    if request.model is None and request.onnx is None and request.plain is not None:
        by_keys = fold_foreign_file(request.checkpoint, request.selection, request.kernels, request.plain)
        if by_keys is not None:
            return FoldResult(by_keys.folded, by_keys.notes, (request.plain,))
    if request.kernels:
        raise UsageError("`kernels` is for foreign layers folded without a model; with `model` the model tells.")
    source = None if request.model is None else parse_source(request.model, request.model_args)
    loaded = load_trained(
        request.checkpoint, source, request.options, request.selection, request.constant_kernels, request.merge
    )
    inputs = None
    if request.onnx is not None:
        inputs = find_inputs(SourceModel(loaded.trained, loaded.source), request.input_shapes, request.input_file)
        if inputs is None:
            raise UsageError(
                f"'{loaded.source.text}': its input is not known; give it with `input_shapes` 1,3,224,224."
            )
    return fold_and_prove(
        loaded,
        inputs,
        plain=request.plain,
        onnx=request.onnx,
        flags=request.flags,
        verify=request.verify,
        device=device,
        min_coverage=request.min_coverage,
        certify=True,
        layers=request.layers,
        waiting=waiting,
        progress=progress,
    )


def fold_and_prove(
    loaded: TrainedCheckpoint,
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
    progress: Progress = lambda text: None,
) -> FoldResult:
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
        folded = fold_trained(loaded, inplace=onnx is None and not layers)
        # with the branches that the original has; its export is what the merged one is held against
        whole = fold_trained(loaded, merge="none") if folded.merged and (onnx is not None or layers) else folded
    status = fold_status(sites, folded)
    merged = merged_facts(loaded.merge, folded)
    # a network whose foreign layers became plain ones, or regions one, is no longer what its source draws
    plain_source = None if folded.by_graph or folded.merged else loaded.source
    result = FoldResult(
        (*folded.folded, *folded.by_graph),
        notes_on_fold(loaded, folded, sites),
        source=loaded.source,
        model=folded.model,
        verified=verify,
        merged=merged,
        layers=describe_layers(loaded.trained, whole, inputs) if layers else None,
    )
    if onnx is None or inputs is None:
        if plain is not None:
            save(folded.model, plain, source=plain_source)
        return replace(result, written=() if plain is None else (plain,))
    beside = 0 if is_large(loaded.trained) else 2 if verify else 1
    with workspace_beside(onnx) as folder, threads_beside(beside):
        state, plain_state = folder / "original.safetensors", folder / "plain.safetensors"
        save(whole.model, state, source=None if folded.by_graph else loaded.source)
        whole = folded  # a large one's memory is wanted below
        if plain is not None:
            save(folded.model, plain_state, source=plain_source)
        candidate, baseline = folder / onnx.name, folder / f"baseline-{onnx.name}"
        sample = folder / "inputs.npz"
        write_inputs(sample, inputs.tensors(inputs.export_batch))
        flags = flags or Flags()
        jobs = [export_job(loaded.source, state, sample, candidate, flags, inputs, loaded)]
        if verify:
            in_float64 = folder / "twin.onnx" if has_twin(folded.model) and merged is None else None
            job = export_job(loaded.source, state, sample, baseline, flags, inputs, twin=in_float64)
            jobs.append(replace(job, fold_foreign=bool(folded.by_graph), constant_kernels=loaded.constant_kernels))
        progress("exporting")
        reports, sides = export_and_run(jobs, loaded, folded.model, inputs, flags, device, waiting)
        progress("proving")
        if sides:
            twin = twin_of(jobs[1], reports[1])
            proof = prove(candidate, baseline, sides[0], status, sides[1], min_coverage, merged, twin=twin)
        else:
            proof = Proof(str(onnx), [status])
        proof.file = str(onnx)
        result = replace(result, export=replace(reports[0], path=str(onnx)), proof=proof)
        if proof.failed:
            return result
        made: list[Path] = []
        if certify and sides and proof.count is not None:
            export = reports[0]
            origin = Origin(Path(loaded.checkpoint.path), loaded.source, export.opset, export.exporter, merged)
            made = write_certificate(candidate, proof, sides[0], origin)  # of the bytes that were proven
        install_proven(candidate, onnx, made, (plain_state, plain))
    certificate = certificate_path(onnx) if made else None
    written = (plain, onnx, certificate)
    return replace(result, certificate=certificate, written=tuple(path for path in written if path is not None))


def install_proven(candidate: Path, onnx: Path, beside: Sequence[Path], plain: tuple[Path, Path | None]) -> None:
    """The model, the files `beside` it and the `plain` state dict (finished, place): written out first, then renamed
    into place together. An earlier model's certificate goes where the new one has none."""
    state, place = plain
    moves = [(path, onnx.with_name(path.name)) for path in beside]
    stale = [] if beside else [certificate_path(onnx), reference_path(onnx)]
    if place is None:
        install_model(candidate, onnx, moves, stale)
    else:
        with temporary_beside(place) as temporary:
            shutil.copyfile(state, temporary)
            install_model(candidate, onnx, [*moves, (temporary, place)], stale)
