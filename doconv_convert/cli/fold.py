"""`doconv-convert fold`: from a trained checkpoint to a plain model and a proven ONNX file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from doconv_convert.cli import options as o
from doconv_convert.cli.console import Output, check_failed, output
from doconv_convert.errors import UsageError

if TYPE_CHECKING:
    from doconv_convert.artifacts.checkpoints.fold_by_keys import FoldedByKeys

_STEPS = {"loading": 0.27, "folding": 0.03, "exporting": 0.66, "proving": 0.04}


def fold(
    checkpoint: Annotated[Path, typer.Argument(help="A file of ours, a state dict, a foreign DO-Conv checkpoint.")],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="SOURCE", help="The network it belongs to, unless the file says so."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the plain state dict (.safetensors).")
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
    from doconv_convert.artifacts.export.child_process import waiting_children

    # The exporting processes import torch while this one does too, and folds.
    children = 0 if onnx is None else 1 if no_verify else 2
    as_json, github = o.chosen_format(form, as_json, onnx or checkpoint)
    with output(as_json, quiet, debug, _STEPS, github=github) as shown, waiting_children(children) as waiting:
        if out is None and onnx is None:
            raise UsageError("fold: name what to write: -o plain.safetensors, --onnx out.onnx, or both.")
        if out == onnx:
            raise UsageError(f"fold: -o and --onnx both name '{out}', expected two files.")
        o.check_report(report, checkpoint, out, onnx)
        from doconv_convert.artifacts.checkpoints.fold_by_keys import fold_foreign_file
        from doconv_convert.artifacts.checkpoints.unwrap import Selection
        from doconv_convert.artifacts.models import Opened, find_inputs
        from doconv_convert.artifacts.sources.source import parse_source
        from doconv_convert.check.torch_runs.device import find_device
        from doconv_convert.rewrite.sites import Options
        from doconv_convert.workflows.exports import Flags
        from doconv_convert.workflows.fold import release
        from doconv_convert.workflows.trained_model import load_trained

        where = find_device(device)
        selection = Selection(ema, prefix)
        if model is None and onnx is None and out is not None:
            by_keys = fold_foreign_file(checkpoint, selection, kernel or (), out)
            if by_keys is not None:
                _show_by_keys(shown, by_keys, out)
                o.write_report(report, "fold", shown)
                return
        if kernel:
            raise UsageError("--kernel is for foreign layers folded without a model; with --model the model tells.")
        o.announce_code(shown, model)
        source = None if model is None else parse_source(model, o.parse_model_args(model_args))
        options = Options(include=include or ("*",), exclude=exclude or ())
        loaded = load_trained(checkpoint, source, options, selection, constant_kernels)
        inputs = None
        if onnx is not None:
            inputs = find_inputs(Opened(loaded.trained, loaded.source), input_shape, input_file)
            if inputs is None:
                raise UsageError(
                    f"'{loaded.source.text}': its input is not known; give it with --input-shape 1,3,224,224."
                )
        flags = Flags(
            opset, o.parse_names(input_names), o.parse_names(output_names), not static, o.parse_dynamic(dynamic)
        )
        made = release(
            loaded,
            inputs,
            plain=out,
            onnx=onnx,
            flags=flags,
            verify=not no_verify,
            device=where,
            min_coverage=min_coverage,
            certify=True,
            layers=as_json or report is not None,
            waiting=waiting,
            progress=shown.step,
        )
        for note in made.notes:
            shown.say(note)
        proof, export = made.proof, made.export
        written = [] if proof is not None and proof.failed else [str(path) for path in (out, onnx) if path is not None]
        shown.document = {
            "source": loaded.source.to_json(),
            "folded": [*made.fold.folded, *made.fold.by_graph],
            "notes": made.notes,
            "export": None if export is None else {**asdict(export), "path": str(onnx)},
            "proof": None if proof is None else proof.to_json(),
            "proven": proof is not None and proof.proven and not no_verify,
            "written": written,
            "certificate": None if made.certificate is None else str(made.certificate),
            "layers": None if made.layers is None else [asdict(layer) for layer in made.layers],
        }
        if made.certificate is not None:
            written.append(str(made.certificate))
        o.write_report(report, "fold", shown)
        if proof is None:
            shown.say(f"folded {len(shown.document['folded'])} kernels; wrote {out}")
            return
        shown.proof(proof) if not no_verify else shown.say(f"{onnx}: proven: false (--no-verify)")
        if export is not None:
            batch = "dynamic" if export.dynamic_batch else "static"
            shown.say(f"opset {export.opset}, {export.exporter} exporter, {batch} batch")
        if proof.failed:
            shown.say("nothing was written: a check failed")
            check_failed()
        shown.say("wrote " + ", ".join(written))


def _show_by_keys(shown: Output, made: FoldedByKeys, out: Path) -> None:
    shown.document = {
        "source": None,
        "folded": made.folded,
        "notes": made.notes,
        "export": None,
        "proof": None,
        "proven": False,
        "written": [str(out)],
    }
    for note in made.notes:
        shown.say(note)
    shown.say(f"folded {len(made.folded)} kernels; wrote {out}")
