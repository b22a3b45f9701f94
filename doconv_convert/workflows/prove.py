"""`prove`: the whole of `fold --onnx` for a model in memory, as a notebook has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from doconv_convert.artifacts.checkpoints.checkpoint import load_strictly, save
from doconv_convert.artifacts.checkpoints.recipe import recipe_sites
from doconv_convert.artifacts.export.exporter import ExportReport, export_onnx
from doconv_convert.artifacts.export.job import Flags
from doconv_convert.artifacts.export.twin import export_twin
from doconv_convert.artifacts.sources.inputs import Inputs, InputSpec, forward_names
from doconv_convert.check import proof as checks
from doconv_convert.check.certificate.certificate import Origin, write_certificate
from doconv_convert.check.certificate.paths import certificate_path
from doconv_convert.check.torch_runs.device import find_device
from doconv_convert.check.torch_runs.exact_start import run_in_eval
from doconv_convert.check.torch_runs.memory import has_twin
from doconv_convert.check.twin.status import TOO_LARGE, Twin
from doconv_convert.errors import UsageError
from doconv_convert.files import check_writable, workspace_beside
from doconv_convert.nn.factors import refuse_shards
from doconv_convert.rewrite.convert import copy_model
from doconv_convert.rewrite.fold import FoldReport, fold_in_place
from doconv_convert.rewrite.tracing import set_eval_mode
from doconv_convert.words import listed
from doconv_convert.workflows.exports import reference_runs
from doconv_convert.workflows.fold import install_proven
from doconv_convert.workflows.fold_result import FoldResult, fold_status, notes_on_export

ORIGIN = "example_inputs"


def prove(
    trained: nn.Module,
    path: str | Path,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    original: nn.Module | None = None,
    constant_kernels: bool = False,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    device: str = "cpu",
    min_coverage: float = 0.0,
) -> FoldResult:
    """Fold a copy of `trained`, export it to the ONNX file `path` and prove it, all in this process.

    The file, its certificate and the certificate's side file are written only where no check failed. `trained` stays as
    it is, with its D.

    Args:
        trained: the model that was trained, with DO-Conv layers or other people's; a plain one is proven too.
        path: the ONNX file to write.
        example_inputs: real samples, as forward's positional arguments: a tensor, a tuple of tensors with the batch
            first, or a tuple of one list of images (torchvision's detectors). All samples are compared; where there
            are fewer than 3, more are made from them by adding noise.
        original: a model of the architecture you designed, with any weights, to compare the exported graph with. None:
            the graph that `trained` itself gives with its layers' own classes restored.
        constant_kernels: fold Conv subclasses and parametrized kernels (weight norm) too.
        opset, input_names, output_names, dynamic_batch, dynamic: see `export_onnx`.
        device: where the float64 runs take place, "cpu" or "cuda"; the export runs on the CPU.
        min_coverage: the share of the kernels that must show in the outputs, 0 to 1.

    Returns:
        `fold`'s result: `.proven`, `.proof`, `.model` (the folded one), `.written`, `.certificate`.

    Raises:
        UsageError: inputs that the model does not run on, names or axes that do not fit them.
        DoconvError: a fold that is not finite, an export that fails, a place that cannot be written.
    """
    target = Path(path)
    check_writable(target)
    runs_on = find_device(device)
    model = _own_copy(trained)
    inputs = _as_inputs(model, example_inputs)
    run_in_eval(model, inputs.arguments(inputs.export_batch, like=model))
    report = fold_in_place(copy_model(model), constant_kernels=constant_kernels, check_first=False)
    folded = set_eval_mode(report.model)
    status, notes = fold_status(recipe_sites(model), report), (*report.notes, *notes_on_export(model, report))
    flags = Flags(opset, input_names, output_names, dynamic_batch and not inputs.image_list, dynamic)
    with workspace_beside(target) as folder:
        candidate, baseline = folder / target.name, folder / f"baseline-{target.name}"
        export = _export(folded, candidate, inputs, flags)
        plain = _original(original, model, report, constant_kernels)
        _export(plain, baseline, inputs, flags)
        twin = _export_twin(plain, folder / "twin.onnx", inputs, flags)
        state = folder / "trained.safetensors"
        save(model, state)
        batch = inputs.proof_batch if export.dynamic_batch else inputs.export_batch
        runs = copy_model(folded)  # which become float32
        side, resized = reference_runs(model, runs, inputs, batch, flags, runs_on, constant_kernels=constant_kernels)
        proof = checks.prove(candidate, baseline, side, status, resized, min_coverage, twin=twin)
        proof.file = str(target)
        result = FoldResult(
            (*report.folded, *report.by_graph),
            notes,
            model=folded,
            export=replace(export, path=str(target)),
            proof=proof,
        )
        if not proof.failed:
            made = write_certificate(candidate, proof, side, Origin(state, None, export.opset, export.exporter))
            install_proven(candidate, target, made, (state, None))
            certificate = certificate_path(target)
            result = replace(result, certificate=certificate, written=(target, certificate))
    return result


def _own_copy(trained: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, without what parallel and compiled training wraps around a model."""
    refuse_shards(trained, "gather its parameters first: get_model_state_dict with full_state_dict=True")
    while isinstance(trained, nn.parallel.DistributedDataParallel | nn.DataParallel) or "_orig_mod" in trained._modules:
        trained = trained.get_submodule("_orig_mod" if "_orig_mod" in trained._modules else "module")
    model = set_eval_mode(copy_model(trained)).cpu()
    for module in model.modules():
        module._compiled_call_impl = None  # model.compile(): the compiled code is the original's
    return model


def _original(original: nn.Module | None, trained: nn.Module, report: FoldReport, constant_kernels: bool) -> nn.Module:
    """The plain architecture with the folded weights: the user's own, or what `trained` is with its layers' own classes
    restored. Raises DoconvError where the weights do not fit it."""
    plain = copy_model(trained if original is None else original).cpu()
    if original is None:
        for site in recipe_sites(plain):  # a kernel that is written takes its D along
            owner = plain.get_submodule(site.owner)
            setattr(owner, site.kernel, nn.Parameter(torch.zeros_like(getattr(owner, site.kernel))))
    if original is None or report.by_graph:
        plain = fold_in_place(plain, constant_kernels=constant_kernels, check_first=False).model
    load_strictly(plain, report.model.state_dict(), "the folded model")
    return plain


def _export(model: nn.Module, path: Path, inputs: Inputs, flags: Flags) -> ExportReport:
    model = copy_model(model).float()
    return export_onnx(model, inputs.arguments(inputs.export_batch, like=model), path, **vars(flags))


def _export_twin(model: nn.Module, path: Path, inputs: Inputs, flags: Flags) -> Twin:
    if not has_twin(model):
        return Twin(None, TOO_LARGE)
    model = copy_model(model).float()
    missing = export_twin(model, inputs.arguments(inputs.export_batch, like=model), path, flags)
    return Twin(path) if missing is None else Twin(None, missing)


def _as_inputs(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> Inputs:
    """The user's tensors, named by forward's arguments. Raises UsageError for anything else."""
    given = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    images = given[0] if isinstance(given, tuple) and len(given) == 1 and isinstance(given[0], list) else None
    tensors = tuple(images) if images is not None else given
    if (
        not isinstance(tensors, tuple)
        or not tensors
        or not all(isinstance(one, Tensor) and one.dim() for one in tensors)
    ):
        raise UsageError(
            f"`example_inputs`: got {_kinds(given)}, expected a tensor or a tuple of tensors with the batch first; "
            "wrap a model that takes other arguments in a module that has them."
        )
    own = tuple(tensor.detach().cpu() for tensor in tensors)
    if images is None:
        names = forward_names(model, len(own))
        specs = [InputSpec(name, tuple(tensor.shape)) for name, tensor in zip(names, own, strict=True)]
        return Inputs(specs, own, origin=ORIGIN)
    if len({tensor.shape for tensor in own}) > 1:
        raise UsageError("`example_inputs`: the images have several sizes, expected one; give those of one size.")
    spec = InputSpec(forward_names(model, 1)[0], tuple(own[0].shape), batched=False)
    return Inputs([spec], (torch.stack(own),), origin=ORIGIN)


def _kinds(given: object) -> str:
    if not isinstance(given, tuple):
        return f"a {type(given).__name__}"
    return f"a tuple of {listed([type(one).__name__ for one in given]) or 'nothing'}"
