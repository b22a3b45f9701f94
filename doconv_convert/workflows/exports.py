"""The exports and torch's part of the proof: side by side, or, where the weights are large, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from doconv_convert.artifacts.checkpoints.checkpoint import save
from doconv_convert.artifacts.export.child_process import Child, export_in_child
from doconv_convert.artifacts.export.exporter import ExportReport
from doconv_convert.artifacts.export.job import ExportJob, Flags
from doconv_convert.artifacts.sources.inputs import Inputs
from doconv_convert.artifacts.sources.source import Source
from doconv_convert.check.onnx_files.model import onnx_input_shapes
from doconv_convert.check.outputs.expected import ReferenceRun
from doconv_convert.check.torch_runs.memory import has_twin, is_large, release_weights, restore_weights
from doconv_convert.check.torch_runs.reference_run import further_runs, reference_run, resized_reference_run
from doconv_convert.check.twin.status import TOO_LARGE, Twin
from doconv_convert.rewrite.linear.steps import Merge
from doconv_convert.workflows.trained_model import TrainedCheckpoint, fold_trained, load_again

Sides = tuple[ReferenceRun, ReferenceRun | None]


def export_job(
    source: Source,
    state: Path,
    sample: Path,
    target: Path,
    flags: Flags,
    inputs: Inputs,
    trained: TrainedCheckpoint | None = None,
    twin: Path | None = None,
) -> ExportJob:
    """An export in a child: of `source`'s plain network with `state`, its float64 `twin` too, or of `trained` folded by
    the child."""
    dynamic_batch = flags.dynamic_batch and inputs.fixed_batch is None
    flags = replace(flags, dynamic_batch=dynamic_batch)
    job = ExportJob(source, state, sample, target, flags, image_list=inputs.image_list, twin=twin)
    if trained is None:
        return job
    return replace(
        job,
        checkpoint=Path(trained.checkpoint.path),
        options=trained.options,
        selection=trained.checkpoint.selection,
        constant_kernels=trained.constant_kernels,
        merge=trained.merge,
    )


def export_baseline(
    folder: Path,
    source: Source,
    folded: nn.Module,
    inputs: Inputs,
    flags: Flags,
    *,
    batch: int | None = None,
    fold_foreign: bool = False,
    constant_kernels: bool = False,
    with_twin: bool = False,
) -> tuple[Path, Twin]:
    """Export `source`'s plain network with the values of `folded` in a child; the ONNX file, in `folder`, and its
    float64 twin."""
    state, sample, baseline = folder / "plain.safetensors", folder / "inputs.npz", folder / "baseline.onnx"
    save(folded, state)
    write_inputs(sample, inputs.tensors(batch or inputs.export_batch))
    twin = folder / "twin.onnx" if with_twin and has_twin(folded) else None
    job = export_job(source, state, sample, baseline, flags, inputs, twin=twin)
    (report,) = export_in_child([replace(job, fold_foreign=fold_foreign, constant_kernels=constant_kernels)])
    return baseline, twin_of(job, report)


def twin_of(job: ExportJob, report: ExportReport) -> Twin:
    """The float64 twin that an export was asked for, or why there is none."""
    if job.twin is None:
        return Twin(None, TOO_LARGE)
    return Twin(job.twin) if report.no_twin is None else Twin(None, report.no_twin)


def is_dynamic(path: Path) -> bool:
    """Whether the batch of every input is open."""
    return all(isinstance(shape[0], str) for shape in onnx_input_shapes(path).values() if shape)


def write_inputs(path: Path, tensors: Sequence[Tensor]) -> None:
    arrays: Any = {f"input_{index}": tensor.numpy() for index, tensor in enumerate(tensors)}
    np.savez(path, **arrays)


def export_and_run(
    jobs: Sequence[ExportJob],
    loaded: TrainedCheckpoint,
    folded: nn.Module,
    inputs: Inputs,
    flags: Flags,
    device: torch.device | None = None,
    waiting: Sequence[Child] = (),
) -> tuple[list[ExportReport], Sides | None]:
    """What the exports report, and (where there are two) both models' runs. Large models have no values after it."""
    trained, large = loaded.trained, is_large(loaded.trained)
    batch = inputs.proof_batch if flags.dynamic_batch else inputs.export_batch

    def run(batch: int) -> Sides | None:
        if len(jobs) == 1:
            return None
        constant, merge = loaded.constant_kernels, loaded.merge
        return reference_runs(
            trained, folded, inputs, batch, flags, device, constant_kernels=constant, merge=merge, spend=large
        )

    def read_folded() -> None:
        restore_weights(folded, fold_trained(load_again(loaded), inplace=True).model)

    if large:
        for child in waiting:  # it has imported torch; a new one starts when its turn comes
            child.close()
        sides = run(batch)
        release_weights(trained, folded)
        reports = export_in_child(jobs, waiting=waiting)
    else:
        with ThreadPoolExecutor(1) as background:
            exports = background.submit(export_in_child, jobs, parallel=True, waiting=waiting)
            sides = run(batch)
            reports = exports.result()
    if batch != inputs.export_batch and not reports[0].dynamic_batch:
        if large:  # the first run spent both
            trained = load_again(loaded).trained
            read_folded()
        sides = run(inputs.export_batch)
        if large:
            release_weights(trained, folded)
    if sides is not None and large:
        sides = _after(read_folded, sides[0]), sides[1] and _after(read_folded, sides[1])
    return reports, sides


def _after(read_folded: Callable[[], None], reference: ReferenceRun) -> ReferenceRun:
    """The same side; before its model runs once more, it takes its values back."""
    alone = reference.alone

    def run(count: int) -> Sequence[Any]:
        read_folded()
        return alone(count) if alone is not None else ()

    return replace(reference, alone=alone and run, alone_is_cheap=False)


def reference_runs(
    trained: nn.Module,
    folded: nn.Module,
    inputs: Inputs,
    batch: int,
    flags: Flags,
    device: torch.device | None = None,
    *,
    constant_kernels: bool = False,
    merge: Merge = "none",
    spend: bool = False,
) -> Sides:
    """Torch's part of the proof, and the same at other sizes where `flags` ask for dynamic ones. With `spend` the
    trained model gives its values up as early as it can."""
    device = device or torch.device("cpu")
    # the other sizes first: they need the trained model too
    dynamic, constant = flags.dynamic or {}, constant_kernels
    resized = resized_reference_run(
        trained, folded, inputs, batch, dynamic, flags.input_names, device, constant_kernels=constant, merge=merge
    )
    arguments = inputs.arguments(batch)
    reference = reference_run(
        trained, folded, arguments, batch, device, constant_kernels=constant, merge=merge, spend=spend
    )
    chunks = inputs.further(batch, filled=batch == inputs.export_batch)
    further = further_runs(folded, ((more.arguments(size), size) for more, size in chunks), device)
    return replace(reference, further=further, compared=inputs.describe(batch)), resized


@contextmanager
def threads_beside(processes: int) -> Iterator[None]:
    """Leave the exporting processes a core each: OpenMP threads that must wait for a core spin, for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - processes))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
