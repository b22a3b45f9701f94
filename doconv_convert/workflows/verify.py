"""`verify`: an ONNX file against a checkpoint, a source or another ONNX file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doconv_convert.check.certificate.verify import verify_certificate
from doconv_convert.check.compare_files import compare_files
from doconv_convert.check.macs.counting import MacCount, count_macs
from doconv_convert.check.onnx_files.model import onnx_input_shapes, onnx_inputs
from doconv_convert.check.outputs.compare import Array
from doconv_convert.check.proof import prove
from doconv_convert.check.status import Proof, Status
from doconv_convert.errors import DoconvError, UsageError

if TYPE_CHECKING:
    from doconv_convert.artifacts.sources.inputs import Inputs
    from doconv_convert.artifacts.sources.source import Source
    from doconv_convert.workflows.exports import Flags


@dataclass(frozen=True)
class Reference:
    """What a file is held against, and how that is built and exported: the options of `fold`."""

    against: str
    model: str | None = None
    weights: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    input_shapes: Sequence[str] = ()
    input_file: Path | None = None
    opset: int | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    dynamic_batch: bool = True
    device: str = "cpu"
    min_coverage: float = 0.0
    ema: bool = False
    prefix: str = ""
    constant_kernels: bool = False
    layers: bool = False  # tell how training moved each D, too (`Proof.layers`)


def verify(
    candidate: str | Path, *, against: str | Path | None = None, certificate: str | Path | None = None, **options: Any
) -> Proof:
    """Check the ONNX file `candidate` against an ONNX file, a checkpoint (with `model` where it has no recipe)
    or a source (with `weights`; without them graph and MACs only); or against its `certificate`.

    `options` are the command line's, by the names of `Reference`'s fields: model, weights, model_args, include,
    exclude, input_shapes, input_file, min_coverage, ...; for a certificate `input_file` alone.

    Returns the proof: `.proven`, `.failed` and `.statuses`. Raises DoconvError for files that cannot be read.
    """
    if (against is None) is (certificate is None):
        raise UsageError("verify: expected `against` or `certificate`, one of them.")
    if certificate is not None:
        return verify_certificate(Path(candidate), Path(certificate), **options)
    return verify_file(Path(candidate), Reference(against=str(against), **options))


def verify_file(candidate: Path, reference: Reference, progress: Callable[[str], None] = lambda text: None) -> Proof:
    """As `verify`, with the options in one value."""
    if not candidate.is_file():
        raise DoconvError(f"'{candidate}' is no file; expected an ONNX model.")
    if Path(reference.against).suffix == ".onnx":
        baseline = Path(reference.against)
        return compare_files(baseline, candidate, _inputs_of(baseline, reference))
    return _against_torch(candidate, reference, progress)


def count_source(
    text: str, model_args: Mapping[str, Any], input_shapes: Sequence[str], ignore: Sequence[str] = ()
) -> MacCount:
    """MACs of one sample of a SOURCE's plain network, counted on its ONNX export."""
    from doconv_convert.artifacts.models import find_inputs, is_checkpoint, open_model
    from doconv_convert.rewrite.fold import fold_in_place

    opened = open_model(text, None, model_args, 0)
    inputs = find_inputs(opened, input_shapes, None) or _no_inputs(text)
    if not is_checkpoint(text):
        _use_every_parameter(opened.model, inputs)
    report = fold_in_place(opened.model, check_first=False)
    plain, by_graph = report.model, bool(report.by_graph)
    with tempfile.TemporaryDirectory() as folder:
        baseline = _export_baseline(
            Path(folder), opened.source, plain, inputs, Reference(against=text), fold_foreign=by_graph
        )
        if not (inputs.image_list or _is_dynamic(baseline)):  # its count would be that of the traced batch
            one = Reference(against=text, dynamic_batch=False)
            batch = inputs.fixed_batch or 1
            baseline = _export_baseline(
                Path(folder), opened.source, plain, inputs, one, batch=batch, fold_foreign=by_graph
            )
        return count_macs(baseline, ignore=ignore)


def _against_torch(candidate: Path, reference: Reference, progress: Callable[[str], None]) -> Proof:
    from doconv_convert.artifacts.checkpoints.recipe import recipe_sites
    from doconv_convert.artifacts.checkpoints.unwrap import Selection
    from doconv_convert.artifacts.models import Opened, find_inputs, is_checkpoint, open_model
    from doconv_convert.artifacts.sources.source import parse_source
    from doconv_convert.check.torch_runs.device import find_device
    from doconv_convert.rewrite.convert import copy_model
    from doconv_convert.rewrite.fold import fold_in_place
    from doconv_convert.rewrite.sites import Options
    from doconv_convert.rewrite.tracing import in_eval
    from doconv_convert.workflows.exports import torch_sides
    from doconv_convert.workflows.fold import describe_layers, fold_status
    from doconv_convert.workflows.trained_model import load_trained

    has_weights, device = True, find_device(reference.device)
    selection = Selection(reference.ema, reference.prefix)
    if is_checkpoint(reference.against) and ":" not in reference.against:
        source = None if reference.model is None else parse_source(reference.model, reference.model_args)
        options = Options(include=reference.include, exclude=reference.exclude)
        loaded = load_trained(Path(reference.against), source, options, selection)
        opened = Opened(loaded.trained, loaded.source)
    else:
        opened = open_model(reference.against, reference.weights, reference.model_args, 0, selection)
        has_weights = reference.weights is not None or opened.source.kind == "program"
    inputs = find_inputs(opened, reference.input_shapes, reference.input_file) or _no_inputs(reference.against)
    if not has_weights:
        _use_every_parameter(opened.model, inputs)
    progress("folding")
    report = fold_in_place(copy_model(opened.model), constant_kernels=reference.constant_kernels, check_first=False)
    folded = in_eval(report.model)
    layers = describe_layers(opened.model, report, inputs) if reference.layers and has_weights else None
    with tempfile.TemporaryDirectory() as folder:
        progress("exporting the original")
        baseline = _export_baseline(
            Path(folder), opened.source, folded, inputs, reference, fold_foreign=bool(report.by_graph)
        )
        if not has_weights:
            return _without_weights(candidate, baseline, [t.numpy() for t in inputs.tensors(inputs.export_batch)])
        progress("running both")
        batch = inputs.proof_batch if _is_dynamic(baseline) else inputs.export_batch
        constant, flags = reference.constant_kernels, _flags(reference)
        side, resized = torch_sides(opened.model, folded, inputs, batch, flags, device, constant_kernels=constant)
        proof = prove(
            candidate, baseline, side, fold_status(recipe_sites(opened.model), report), resized, reference.min_coverage
        )
        proof.layers = layers
        return proof


def _use_every_parameter(model: Any, inputs: Inputs) -> None:
    """Values as after a training: of fresh ones the exporter drops zero biases and merges equal weights."""
    from doconv_convert.check.torch_runs.exact_start import run_in_eval
    from doconv_convert.workflows.rehearsal.randomize import make_lively

    arguments = inputs.arguments(inputs.proof_batch, like=model)
    run_in_eval(model, arguments)  # wrong inputs are refused here, in words
    make_lively(model, arguments)


def _without_weights(candidate: Path, baseline: Path, inputs: Sequence[Array]) -> Proof:
    from doconv_convert.check.proof import check_graph, check_macs

    status, count = check_macs(baseline, candidate, inputs)
    graph = check_graph(baseline, candidate, values=False)
    outputs = Status("outputs", "not checked", "no weights were given (--weights; or --graph-only, if that is enough)")
    return Proof(str(candidate), [graph, status, outputs], count.total)


def _is_dynamic(path: Path) -> bool:
    return all(isinstance(shape[0], str) for shape in onnx_input_shapes(path).values() if shape)


def _export_baseline(
    folder: Path,
    source: Source,
    folded: Any,
    inputs: Inputs,
    reference: Reference,
    batch: int | None = None,
    fold_foreign: bool = False,
) -> Path:
    from doconv_convert.artifacts.checkpoints.checkpoint import save
    from doconv_convert.artifacts.export.child_process import export_in_child
    from doconv_convert.workflows.exports import export_job, write_inputs

    state, sample, baseline = folder / "plain.safetensors", folder / "inputs.npz", folder / "baseline.onnx"
    save(folded, state)
    write_inputs(sample, inputs.tensors(batch or inputs.export_batch))
    job = export_job(source, state, sample, baseline, _flags(reference), inputs)
    export_in_child([replace(job, fold_foreign=fold_foreign, constant_kernels=reference.constant_kernels)])
    return baseline


def _flags(reference: Reference) -> Flags:
    from doconv_convert.workflows.exports import Flags

    return Flags(
        reference.opset,
        reference.input_names,
        reference.output_names,
        reference.dynamic_batch,
        reference.dynamic,
    )


def _inputs_of(baseline: Path, reference: Reference) -> list[Array]:
    """The user's samples, or random ones from a generator of their own; a dynamic dimension 0 is a batch of 2."""
    import numpy as np

    from doconv_convert.artifacts.sources.inputs import parse_input_shape
    from doconv_convert.artifacts.sources.samples import in_order, read_samples

    inputs = onnx_inputs(baseline)
    if reference.input_file is not None:
        return in_order(read_samples(reference.input_file), list(inputs), f"'{reference.input_file}'")
    specs = [parse_input_shape(text) for text in reference.input_shapes]
    unnamed = len(specs) == len(inputs) and all(spec.name == "" for spec in specs)
    given = dict(zip(inputs, specs, strict=True)) if unnamed else {spec.name: spec for spec in specs}
    if unknown := given.keys() - inputs.keys():
        raise UsageError(f"--input-shape: '{baseline}' has no input '{unknown.pop()}', it has {', '.join(inputs)}.")
    generator = np.random.default_rng(0)
    arrays: list[Array] = []
    for name, (dtype, dims) in inputs.items():
        if not np.issubdtype(dtype, np.floating):
            raise UsageError(f"input '{name}' is {dtype}, no values can be made up for it; give samples with --input.")
        if name in given:
            dims = list(given[name].shape)
        elif any(not isinstance(dim, int) for dim in dims[1:]):
            raise UsageError(
                f"input '{name}' has dynamic sizes {dims}; give them with --input-shape {name}=1,3,224,224."
            )
        size = [dim if isinstance(dim, int) else 2 for dim in dims]
        arrays.append(generator.standard_normal(size).astype(dtype))
    return arrays


def _no_inputs(text: str) -> Inputs:
    raise UsageError(f"'{text}': its input is not known; give it with --input-shape 1,3,224,224.")
