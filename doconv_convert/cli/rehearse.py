"""`doconv-convert rehearse`: will it work on mine? The whole way, on random weights, before the training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from doconv_convert.cli import options as o
from doconv_convert.cli.console import Output, check_failed, output
from doconv_convert.errors import DoconvError


def rehearse(
    sources: Annotated[list[str], typer.Argument(help="SOURCEs; globs as in 'torchvision:*' or 'timm:resnet*'.")],
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes side by side.")] = 1,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="FILE",
            help="Add each result to FILE (JSON lines), skip what it has of the same settings.",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 where the original cannot be exported.")
    ] = False,
    no_export: Annotated[bool, typer.Option("--no-export", help="Stop after the fold, proven in torch.")] = False,
    merge: o.MergeOption = o.MergeChoice.none,
    model_args: o.ModelArgs = None,
    input_shape: o.InputShape = None,
    seed: o.Seed = 0,
    report: o.Report = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Rehearse conversion, fold, export and proof: a line a model, a status a step."""
    with output(as_json, quiet, debug, files=(*sources, resume, report)) as shown:
        reads = {f"SOURCE {text}": text for text in sources}
        o.check_outputs(reads, {"`resume`": resume, "`report`": report})
        from doconv_convert.workflows.rehearsal.many import Rehearsals, RehearseRequest
        from doconv_convert.workflows.rehearsal.result import CANNOT_EXPORT

        request = RehearseRequest(
            sources,
            jobs,
            resume,
            model_args=o.parse_model_args(model_args),
            input_shapes=input_shape or (),
            seed=seed,
            export=not no_export,
            merge=merge.value,
        )
        rehearsals = Rehearsals.of(request)
        o.announce_code(shown, *rehearsals.wanted)
        todo = len(rehearsals.todo)
        with shown.counting("rehearsing", todo) as advance:
            for index, one in enumerate(rehearsals.run(), 1):
                _show(shown, one, f"{index}/{todo}")
                advance()
        result = rehearsals.result()
        shown.say(
            f"{len(result.models)} models: {result.passed} passed, {result.unexportable} {CANNOT_EXPORT}, "
            f"{result.failed} failed"
        )
        shown.document = result.to_json()
        o.write_report(report, "rehearse", shown)
        if result.failed:
            check_failed()
        if result.unexportable and strict:
            raise DoconvError(f"{result.unexportable} originals cannot be exported (--strict)")


def _show(shown: Output, result: dict[str, Any], where: str) -> None:
    seconds = sum(step["seconds"] for step in result["steps"])
    shown.say(f"[{where}] {result['source']}: {result['status']} ({seconds:.1f} s)")
    for step in result["steps"]:
        shown.say(f"    {step['name']:8} {step['state']:7} {step['seconds']:6.1f} s  {step['detail']}", indent=31)
