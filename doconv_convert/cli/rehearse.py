"""`doconv-convert rehearse`: will it work on mine? The whole way, on random weights, before the training."""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    model_args: o.ModelArgs = None,
    input_shape: o.InputShape = None,
    seed: o.Seed = 0,
    report: o.Report = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Rehearse conversion, fold, export and proof: a line a model, a status a step."""
    with output(as_json, quiet, debug) as shown:
        o.check_report(report, resume)
        from doconv_convert.artifacts.sources.zoos import expand
        from doconv_convert.workflows.rehearsal.result import CANNOT_EXPORT

        wanted = expand(sources)
        o.announce_code(shown, *wanted)
        settings = {
            "model_args": o.parse_model_args(model_args),
            "seed": seed,
            "export": not no_export,
            "input_shapes": input_shape or [],
        }
        known = _read(resume, settings)
        todo = [text for text in wanted if text not in known]
        with shown.counting("rehearsing", len(todo)) as advance:
            for index, result in enumerate(_results(todo, settings, jobs), 1):
                known[result["source"]] = result
                if resume is not None:
                    with resume.open("a") as file:
                        file.write(json.dumps(result) + "\n")
                _show(shown, result, f"{index}/{len(todo)}")
                advance()
        results = [known[text] for text in wanted]
        states = [result["status"] for result in results]
        unexportable = states.count(CANNOT_EXPORT)
        failed = len(states) - states.count("passed") - unexportable
        shown.say(
            f"{len(states)} models: {states.count('passed')} passed, {unexportable} {CANNOT_EXPORT}, {failed} failed"
        )
        shown.document = {"models": results}
        o.write_report(report, "rehearse", shown)
        if failed:
            check_failed()
        if unexportable and strict:
            raise DoconvError(f"{unexportable} originals cannot be exported (--strict)")


def _results(todo: list[str], settings: dict[str, Any], jobs: int) -> Iterator[dict[str, Any]]:
    from doconv_convert.artifacts.export.child_process import waiting_children
    from doconv_convert.workflows.rehearsal.rehearse import rehearse as run

    if jobs == 1 or len(todo) < 2:
        with waiting_children(_children(settings) if todo else 0, reuse=True) as waiting:
            for text in todo:
                yield run(text, **settings, waiting=waiting).to_json()
        return
    from doconv_convert.workflows.rehearsal.workers import rehearse_side_by_side

    yield from rehearse_side_by_side(todo, settings, jobs, _children(settings))


def _children(settings: dict[str, Any]) -> int:
    return 2 if settings["export"] else 0


def _read(resume: Path | None, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results by their sources: those of the same settings, with the export where it is asked for."""
    if resume is None or not resume.exists():
        return {}
    try:
        results = [json.loads(line) for line in resume.read_text().splitlines() if line.strip()]
        serving = [settings, {**settings, "export": True}]
        return {result["source"]: result for result in results if result["settings"] in serving}
    except (ValueError, KeyError, TypeError) as error:
        raise DoconvError(f"'{resume}' is not a file of rehearsal results ({error}); name another one.") from error


def _show(shown: Output, result: dict[str, Any], where: str) -> None:
    seconds = sum(step["seconds"] for step in result["steps"])
    shown.say(f"[{where}] {result['source']}: {result['status']} ({seconds:.1f} s)")
    for step in result["steps"]:
        shown.say(f"    {step['name']:8} {step['state']:7} {step['seconds']:6.1f} s  {step['detail']}", indent=31)
