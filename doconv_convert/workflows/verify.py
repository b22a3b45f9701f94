"""`verify`, step by step: an ONNX file against its certificate, another ONNX file, a checkpoint or a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doconv_convert.artifacts.checkpoints.unwrap import Selection
from doconv_convert.artifacts.export.job import Flags
from doconv_convert.check.certificate.verify import verify_certificate
from doconv_convert.check.outputs.compare import Array
from doconv_convert.check.status import Proof, Status
from doconv_convert.errors import UsageError
from doconv_convert.files import require_file, scratch_folder
from doconv_convert.rewrite.linear.steps import Merge
from doconv_convert.rewrite.options import Options
from doconv_convert.workflows.onnx_pair import compare_pair

if TYPE_CHECKING:
    from doconv_convert.artifacts.models import SourceModel

Progress = Callable[[str], None]
# of each run of a file, beside the network's own in torch, which takes as long
_SECONDS = 600.0

CERTIFICATE_ALONE = "verify: `model` and `weights` go with `against`; a certificate names its own network."


@dataclass(frozen=True)
class Reference:
    """What a file is compared with, and how that is built and exported: the options of `fold`."""

    against: str
    model: str | None = None
    weights: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    options: Options = field(default_factory=Options)
    selection: Selection = field(default_factory=Selection)
    flags: Flags = field(default_factory=Flags)
    constant_kernels: bool = False
    merge: Merge = "none"
    input_shapes: Sequence[str] = ()
    input_file: Path | None = None
    device: str = "cpu"
    min_coverage: float = 0.0
    timeout: float | None = None
    layers: bool = False  # tell how training moved each D, too (`Proof.layers`)


def verify(
    candidate: str | Path,
    *,
    against: str | Path | None = None,
    certificate: str | Path | None = None,
    model: str | None = None,
    weights: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    ema: bool = False,
    prefix: str = "",
    constant_kernels: bool = False,
    merge: Merge = "none",
    input_shapes: Sequence[str] = (),
    input_file: str | Path | None = None,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_batch: bool = True,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    device: str = "cpu",
    min_coverage: float = 0.0,
    timeout: float | None = None,
) -> Proof:
    """Check the ONNX file `candidate` against an ONNX file, a checkpoint (with `model` where it has no recipe)
    or a source (with `weights`; without them graph and MACs only); or against its `certificate`.

    Args:
        candidate: the ONNX file to check.
        against: an ONNX file, a checkpoint or a SOURCE.
        certificate: what `fold` wrote beside the file; it takes `input_file` alone.
        model, model_args: the SOURCE of a checkpoint's network, and its builder's arguments.
        weights: a SOURCE's weights: "DEFAULT", a name, or a file.
        include, exclude: globs of the conversion, where layers were left out of it.
        ema, prefix: take the averaged weights; only the keys under `prefix`.
        constant_kernels: Conv subclasses and parametrized kernels were folded too.
        merge: which linear regions were merged (`fold`).
        input_shapes, input_file: shapes as in "1,3,224,224", or a file of samples.
        opset, input_names, output_names, dynamic_batch, dynamic: how the file was exported (`export_onnx`).
        device: where torch runs, "cpu" or "cuda".
        min_coverage: the share of the kernels that must show in the outputs, 0 to 1.
        timeout: the seconds of computing after which a run of an ONNX file is ended; by default that follows its MACs.

    Returns:
        The proof: `.proven`, `.equivalent`, `.failed` and `.statuses`.

    Raises:
        UsageError: arguments that contradict each other.
        DoconvError: files that cannot be read.
    """
    if (against is None) is (certificate is None):
        raise UsageError("verify: expected `against` or `certificate`, one of them.")
    samples = None if input_file is None else Path(input_file)
    if certificate is not None:
        if model is not None or weights is not None:
            raise UsageError(CERTIFICATE_ALONE)
        return verify_certificate(Path(candidate), Path(certificate), samples, timeout)
    reference = Reference(
        str(against),
        model,
        weights,
        model_args or {},
        Options(include=include, exclude=exclude),
        Selection(ema, prefix),
        Flags(opset, input_names, output_names, dynamic_batch, dynamic),
        constant_kernels,
        merge,
        input_shapes,
        samples,
        device,
        min_coverage,
        timeout,
    )
    return verify_file(Path(candidate), reference)


def verify_file(candidate: Path, reference: Reference, progress: Progress = lambda text: None) -> Proof:
    """As `verify`, with what the file is compared with in one value."""
    require_file(candidate, "an ONNX model")
    if Path(reference.against).suffix == ".onnx":
        baseline, shapes = Path(reference.against), reference.input_shapes
        return compare_pair(baseline, candidate, shapes, reference.input_file, reference.timeout)
    return _against_torch(candidate, reference, progress)


def _against_torch(candidate: Path, reference: Reference, progress: Progress) -> Proof:
    from doconv_convert.artifacts.checkpoints.recipe import recipe_sites
    from doconv_convert.artifacts.models import find_inputs
    from doconv_convert.check.proof import prove
    from doconv_convert.check.torch_runs.device import find_device
    from doconv_convert.rewrite.convert import copy_model
    from doconv_convert.rewrite.fold import fold_in_place
    from doconv_convert.rewrite.tracing import set_eval_mode
    from doconv_convert.workflows.exports import export_baseline, is_dynamic, reference_runs
    from doconv_convert.workflows.fold_result import describe_layers, fold_status, merged_facts
    from doconv_convert.workflows.rehearsal.randomize import use_every_parameter

    device, constant, merge = find_device(reference.device), reference.constant_kernels, reference.merge
    opened, has_weights = _open(reference)
    inputs = find_inputs(opened, reference.input_shapes, reference.input_file)
    if inputs is None:
        raise UsageError(f"'{reference.against}': its input is not known; give it with `input_shapes` 1,3,224,224.")
    if not has_weights and merge != "none":
        raise UsageError(
            f"'{reference.against}': what `merge` merges depends on the weights; give them with `weights`."
        )
    if not has_weights:
        use_every_parameter(opened.model, inputs)
    progress("folding")
    whole = report = fold_in_place(copy_model(opened.model), constant_kernels=constant, check_first=False)
    if merge != "none":
        copied = copy_model(opened.model)
        report = fold_in_place(copied, constant_kernels=constant, check_first=False, merge=merge)
    folded, merged = set_eval_mode(report.model), merged_facts(merge, report)
    layers = describe_layers(opened.model, whole, inputs) if reference.layers and has_weights else None
    flags = reference.flags
    with scratch_folder() as folder:
        progress("exporting the original")
        baseline, twin = export_baseline(
            folder,
            opened.source,
            set_eval_mode(whole.model),
            inputs,
            reference.flags,
            fold_foreign=bool(whole.by_graph),
            constant_kernels=constant,
            with_twin=has_weights and merge == "none",
        )
        if not has_weights:
            return _without_weights(candidate, baseline, [t.numpy() for t in inputs.tensors(inputs.export_batch)])
        progress("running both")
        batch = inputs.proof_batch if is_dynamic(baseline) else inputs.export_batch
        side, resized = reference_runs(
            opened.model, folded, inputs, batch, flags, device, constant_kernels=constant, merge=merge
        )
        status = fold_status(recipe_sites(opened.model), report)
        timeout = reference.timeout or _SECONDS
        least = reference.min_coverage
        proof = prove(candidate, baseline, side, status, resized, least, merged, timeout=timeout, twin=twin)
    proof.layers = layers
    return proof


def _open(reference: Reference) -> tuple[SourceModel, bool]:
    """The model to compare with, and whether it has weights."""
    from doconv_convert.artifacts.models import SourceModel, is_checkpoint, open_model
    from doconv_convert.artifacts.sources.source import parse_source
    from doconv_convert.workflows.trained_model import load_trained

    against = reference.against
    if is_checkpoint(against) and ":" not in against:
        source = None if reference.model is None else parse_source(reference.model, reference.model_args)
        loaded = load_trained(Path(against), source, reference.options, reference.selection)
        return SourceModel(loaded.trained, loaded.source), True
    opened = open_model(against, reference.weights, reference.model_args, 0, reference.selection)
    return opened, reference.weights is not None or opened.source.kind == "program"


def _without_weights(candidate: Path, baseline: Path, inputs: Sequence[Array]) -> Proof:
    from doconv_convert.check.proof import check_graph, check_macs

    graph = check_graph(baseline, candidate, values=False)
    status, count = check_macs(baseline, candidate, inputs, ours=graph.state == "passed")
    outputs = Status("outputs", "not checked", "no weights were given (`weights`; or `graph_only`, if that is enough)")
    return Proof(str(candidate), [graph, status, outputs], count.total)
