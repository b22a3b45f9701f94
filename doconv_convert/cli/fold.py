"""`doconv-convert fold`: from a trained checkpoint to a plain model and a proven ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from doconv_convert.cli import options as o
from doconv_convert.cli.console import Output, check_failed, output
from doconv_convert.errors import UsageError
from doconv_convert.words import counted

if TYPE_CHECKING:
    from doconv_convert.rewrite.linear.steps import Merge
    from doconv_convert.workflows.fold_request import FoldRequest
    from doconv_convert.workflows.fold_result import FoldResult

_FILE_STEPS = {"folding": 0.4, "proving": 0.6}
_STEPS = {"loading": 0.27, "folding": 0.03, "exporting": 0.66, "proving": 0.04}


def fold(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A file of ours, a state dict, a foreign DO-Conv checkpoint; or, with --merge, ONNX."),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="SOURCE", help="The network it belongs to, unless the file says so."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the plain state dict (.safetensors), or ONNX."),
    ] = None,
    onnx: Annotated[Path | None, typer.Option("--onnx", metavar="FILE", help="Export to ONNX and prove it.")] = None,
    model_args: o.ModelArgs = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    ema: o.Ema = False,
    prefix: o.Prefix = "",
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", metavar="GLOB=1x9", help="Without --model: a foreign layer's kernel size; repeats."),
    ] = None,
    constant_kernels: o.ConstantKernels = False,
    merge: o.MergeOption = o.MergeChoice.none,
    input_shape: o.InputShape = None,
    input_file: o.InputFile = None,
    opset: o.Opset = None,
    input_names: o.InputNames = None,
    output_names: o.OutputNames = None,
    dynamic: o.Dynamic = None,
    static: o.Static = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the proof; never counts as proven.")] = False,
    device: o.Device = "cpu",
    min_coverage: o.MinCoverage = 0.0,
    report: o.Report = None,
    form: o.As = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Fold DO-Conv layers into ordinary convolutions; with --onnx export and prove that nothing changed."""
    as_json, github = o.chosen_format(form, as_json, onnx or checkpoint)
    files = (checkpoint, model, out, onnx, input_file, report, onnx and onnx.with_suffix(".certificate.json"))
    if checkpoint.suffix == ".onnx":
        with output(as_json, quiet, debug, _FILE_STEPS, github=github, files=files) as shown:
            _merge_file(shown, checkpoint, out, merge.value, input_shape, input_file, others=(model, onnx, report))
        return
    with output(as_json, quiet, debug, _STEPS, github=github, files=files) as shown:
        reads = {"the checkpoint": checkpoint, "`model`": model, "`input_file`": input_file}
        o.check_outputs(reads, {"`plain`": out, "`onnx`": onnx, "`report`": report}, github is not None)
        from doconv_convert.workflows.fold_request import FoldRequest

        request = FoldRequest(
            checkpoint,
            plain=out,
            onnx=onnx,
            model=model,
            model_args=o.parse_model_args(model_args),
            options=o.site_options(include, exclude),
            selection=o.selection(ema, prefix),
            kernels=kernel or (),
            constant_kernels=constant_kernels,
            merge=merge.value,
            input_shapes=input_shape or (),
            input_file=input_file,
            flags=o.flags(opset, input_names, output_names, dynamic, static),
            verify=not no_verify,
            device=device,
            min_coverage=min_coverage,
            layers=as_json or report is not None,
        )
        o.announce_code(shown, model)
        _show(shown, _folded(shown, request), report)


def _folded(shown: Output, request: FoldRequest) -> FoldResult:
    """The exporting processes import torch while this one does too, and folds."""
    from doconv_convert.artifacts.export.child_process import waiting_children

    with waiting_children(0 if request.onnx is None else 1 + request.verify) as waiting:
        from doconv_convert.workflows.fold import fold_checkpoint

        return fold_checkpoint(request, waiting=waiting, progress=shown.step)


def _merge_file(
    shown: Output,
    file: Path,
    out: Path | None,
    merge: Merge,
    shapes: list[str] | None,
    samples: Path | None,
    others: tuple[object, object, object],
) -> None:
    """From ONNX to ONNX, without torch; `others` are options that go with a checkpoint."""
    from doconv_convert.workflows.merge_file import MergeRequest, merge_file

    o.check_outputs({"the model": file, "`input_file`": samples}, {"-o": out}, shown.github is not None)
    if out is None or others != (None, None, None):
        raise UsageError("fold: an ONNX file takes --merge and -o FILE.onnx, no --model, --onnx and --report.")
    result = merge_file(MergeRequest(file, out, merge, shapes or (), samples), shown.step)
    shown.document = result.to_json()
    shown.proof(result.proof)
    before, after = result.nodes
    regions, left = counted(len(result.merged.regions), "linear region"), len(result.merged.left)
    shown.say(f"{regions} merged, {left} left; {before} nodes before, {after} after")
    shown.say("nothing was written: a check failed" if result.written is None else f"wrote {result.written}")
    if result.proof.failed:
        check_failed()


def _show(shown: Output, result: FoldResult, report: Path | None) -> None:
    shown.document = result.to_json()
    o.write_report(report, "fold", shown)
    for note in result.notes:
        shown.say(note)
    _show_merged(shown, result)
    written = "wrote " + ", ".join(map(str, result.written))
    if result.proof is None or result.export is None:
        shown.say(f"folded {counted(len(result.folded), 'kernel')}; {written}")
        return
    if result.verified:
        shown.proof(result.proof)
    else:
        shown.say(f"{result.export.path}: proven: false (--no-verify)")
    batch = "dynamic" if result.export.dynamic_batch else "static"
    shown.say(f"opset {result.export.opset}, {result.export.exporter} exporter, {batch} batch")
    shown.say("nothing was written: a check failed" if result.proof.failed else written)
    if result.proof.failed:
        check_failed()


def _show_merged(shown: Output, result: FoldResult) -> None:
    """A row a region: what it was, what it is."""
    if result.merged is None or not result.merged.regions:
        return
    head = [
        "merged into",
        "nodes",
        "convs",
        "norms",
        "kernel",
        "MACs before",
        "MACs",
        "params before",
        "params",
        "error",
    ]
    rows = [
        [
            region["name"],
            len(region["nodes"]),
            region["convolutions"],
            region["batch_norms"],
            "x".join(map(str, region["kernel"])),
            *(region[key] for key in ("macs_before", "macs", "parameters_before", "parameters")),
            f"{region['error']:.0e}",
        ]
        for region in result.merged.regions
    ]
    shown.table(head, rows, right=(1, 2, 3, 5, 6, 7, 8, 9))
