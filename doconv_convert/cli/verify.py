"""`doconv-convert verify`: check an ONNX file against a checkpoint, a source or another ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from doconv_convert.cli import options as o
from doconv_convert.cli.console import check_failed, output


def verify(
    candidate: Annotated[Path, typer.Argument(help="The ONNX file to check.")],
    against: Annotated[str, typer.Option("--against", metavar="ONNX|CHECKPOINT|SOURCE", help="What it should equal.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="SOURCE", help="The network a checkpoint belongs to.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="DEFAULT|NAME|FILE", help="A SOURCE's weights.")
    ] = None,
    model_args: o.ModelArgs = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    input_shape: o.InputShape = None,
    input_file: o.InputFile = None,
    opset: o.Opset = None,
    input_names: o.InputNames = None,
    output_names: o.OutputNames = None,
    dynamic: o.Dynamic = None,
    static: o.Static = False,
    ema: o.Ema = False,
    prefix: o.Prefix = "",
    constant_kernels: o.ConstantKernels = False,
    device: o.Device = "cpu",
    min_coverage: o.MinCoverage = 0.0,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Graph, MACs, outputs and coverage. Exits with 3 where a check fails."""
    with output(as_json, quiet, debug, "verifying") as shown:
        from doconv_convert.check.verify import Reference, verify_file

        reference = Reference(
            against=against,
            model=model,
            weights=weights,
            model_args=o.parse_model_args(model_args),
            include=include or ("*",),
            exclude=exclude or (),
            input_shapes=input_shape or (),
            input_file=input_file,
            opset=opset,
            input_names=o.parse_names(input_names),
            output_names=o.parse_names(output_names),
            dynamic=o.parse_dynamic(dynamic),
            dynamic_batch=not static,
            device=device,
            min_coverage=min_coverage,
            ema=ema,
            prefix=prefix,
            constant_kernels=constant_kernels,
        )
        o.announce_code(shown, against, model)
        proof = verify_file(candidate, reference, shown.step)
        shown.document = proof.to_json()
        shown.proof(proof)
        if proof.failed:
            check_failed()
