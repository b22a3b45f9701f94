"""`doconv-convert verify`: an ONNX file against a checkpoint, a source, another ONNX file or its certificate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from doconv_convert.cli import options as o
from doconv_convert.cli.console import Output, check_failed, output
from doconv_convert.errors import UsageError

if TYPE_CHECKING:
    from doconv_convert.check.status import Proof

_STEPS = {"loading": 0.2, "folding": 0.03, "exporting the original": 0.57, "running both": 0.2}


def verify(
    candidate: Annotated[Path, typer.Argument(help="The ONNX file to check.")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="ONNX|CHECKPOINT|SOURCE", help="What it should equal.")
    ] = None,
    certificate: Annotated[
        Path | None,
        typer.Option("--certificate", metavar="FILE", help="What `fold --onnx` wrote beside it; needs no torch."),
    ] = None,
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
    merge: o.MergeOption = o.MergeChoice.none,
    device: o.Device = "cpu",
    min_coverage: o.MinCoverage = 0.0,
    timeout: o.Timeout = None,
    graph_only: Annotated[
        bool, typer.Option("--graph-only", help="Pass on equal graphs and MACs where a SOURCE has no weights.")
    ] = False,
    equivalent: Annotated[
        bool, typer.Option("--equivalent", help="Pass on equal outputs where another ONNX file has other weights.")
    ] = False,
    attest: Annotated[
        Path | None,
        typer.Option(
            "--attest", metavar="FILE", help="Write the certificate, once it holds, as an in-toto statement to sign."
        ),
    ] = None,
    report: o.Report = None,
    form: o.As = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Graph, MACs, outputs and coverage; or hashes, MACs and outputs of a certificate. Exits with 3 where one fails."""
    if (against is None) is (certificate is None):
        raise typer.BadParameter("say what to check against: --against or --certificate, one of them.")
    if attest is not None and certificate is None:
        raise typer.BadParameter("--attest writes a certificate as a statement: pass --certificate too.")
    as_json, github = o.chosen_format(form, as_json, candidate)
    files = (candidate, against, certificate, model, weights, input_file, report)
    with output(as_json, quiet, debug, _STEPS, github=github, files=files) as shown:
        reads = {"the candidate": candidate, "`against`": against, "`certificate`": certificate}
        reads |= {"`model`": model, "`weights`": weights, "`input_file`": input_file}
        o.check_outputs(reads, {"`report`": report, "`attest`": attest}, github is not None)
        if certificate is not None:
            if model is not None or weights is not None:
                from doconv_convert.workflows.verify import CERTIFICATE_ALONE

                raise UsageError(CERTIFICATE_ALONE)
            _with_certificate(shown, candidate, certificate, input_file, timeout, report, attest)
            return
        from doconv_convert.workflows.verify import Reference, verify_file

        reference = Reference(
            against=str(against),
            model=model,
            weights=weights,
            model_args=o.parse_model_args(model_args),
            options=o.site_options(include, exclude),
            selection=o.selection(ema, prefix),
            flags=o.flags(opset, input_names, output_names, dynamic, static),
            constant_kernels=constant_kernels,
            merge=merge.value,
            input_shapes=input_shape or (),
            input_file=input_file,
            device=device,
            min_coverage=min_coverage,
            timeout=timeout,
            layers=as_json or report is not None,
        )
        o.announce_code(shown, against, model)
        proof = verify_file(candidate, reference, shown.step)
        _show(shown, proof, report, enough=_is_enough(proof, graph_only, equivalent))


def _is_enough(proof: Proof, graph_only: bool, equivalent: bool) -> bool:
    """Whether the user asked for no more than what was found, though it proves nothing."""
    unchecked = {status.name for status in proof.statuses if status.state == "not checked"}
    return not proof.failed and ((graph_only and unchecked == {"outputs"}) or (equivalent and proof.equivalent))


def _with_certificate(
    shown: Output,
    candidate: Path,
    certificate: Path,
    samples: Path | None,
    timeout: float | None,
    report: Path | None,
    attest: Path | None,
) -> None:
    from doconv_convert.check.certificate.certificate import write_statement
    from doconv_convert.check.certificate.verify import verify_certificate

    _show(shown, verify_certificate(candidate, certificate, samples, timeout), report, enough=False)
    if attest is not None:
        write_statement(certificate, attest)
        shown.say(f"wrote {attest}, an in-toto statement; it is not signed yet")


def _show(shown: Output, proof: Proof, report: Path | None, *, enough: bool) -> None:
    """`enough`: what was found is what was asked for, though it proves nothing."""
    shown.document = proof.to_json()
    shown.proof(proof)
    o.write_report(report, "verify", shown)
    if not (proof.proven or enough):
        check_failed()
