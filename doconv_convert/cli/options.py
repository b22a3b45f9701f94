"""Options that several commands share, and the reading of their texts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from doconv_convert.cli.console import Format, Output
from doconv_convert.cli.github import GithubReport
from doconv_convert.cli.option_names import with_options
from doconv_convert.errors import UsageError

if TYPE_CHECKING:
    from doconv_convert.artifacts.checkpoints.unwrap import Selection
    from doconv_convert.artifacts.export.job import Flags
    from doconv_convert.rewrite.options import Options as SiteOptions

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
As = Annotated[
    Format | None,
    typer.Option("--format", help="json is --json; github adds annotations and a Markdown step summary."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, and on stderr what was decided and why.")]
Include = Annotated[list[str] | None, typer.Option("--include", metavar="GLOB", help="Only these layers; repeats.")]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Not these layers; repeats.")]
Seed = Annotated[int, typer.Option("--seed", help="For random weights and for weight_extra.")]
ModelArgs = Annotated[
    str | None, typer.Option("--model-args", metavar="JSON", help="Keyword arguments of the builder.")
]
InputShape = Annotated[
    list[str] | None,
    typer.Option("--input-shape", metavar="[NAME=]1,3,224,224", help="An input's shape, batch first; repeats."),
]
InputFile = Annotated[
    Path | None,
    typer.Option("--input", metavar="FILE", help="Samples: .npy, .npz with input names as keys, or an image."),
]
Opset = Annotated[int | None, typer.Option("--opset", help="ONNX opset; default: the exporter's own.")]
InputNames = Annotated[str | None, typer.Option("--input-names", metavar="A,B", help="Names of the ONNX inputs.")]
OutputNames = Annotated[str | None, typer.Option("--output-names", metavar="A,B", help="Names of the ONNX outputs.")]
Dynamic = Annotated[
    list[str] | None,
    typer.Option("--dynamic", metavar="NAME:AXIS=DIM", help="A further dynamic dimension (x:2=height); repeats."),
]
Static = Annotated[bool, typer.Option("--static", help="A fixed batch of 2 instead of a dynamic one.")]

Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="Also write a page for people: one file, no network."),
]
Ema = Annotated[bool, typer.Option("--ema", help="Take the averaged weights of the checkpoint.")]
Prefix = Annotated[
    str, typer.Option("--prefix", metavar="P.", help="Take only the checkpoint's keys under P., without it.")
]
ConstantKernels = Annotated[
    bool,
    typer.Option(
        "--constant-kernels", help="Fold Conv subclasses and parametrized kernels (weight norm, standardization) too."
    ),
]


class MergeChoice(str, Enum):
    """What --merge takes."""

    none = "none"
    branches = "branches"
    all = "all"


MergeOption = Annotated[
    MergeChoice,
    typer.Option(
        "--merge",
        help="Linear regions into one convolution each: branches (RepVGG, ...), or all, batch norms too.",
    ),
]
MinCoverage = Annotated[
    float,
    typer.Option(
        "--min-coverage",
        min=0.0,
        max=1.0,
        help="The part of the kernels that run, a change in which the compared outputs must show.",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="S", min=1.0, help="End the work on a file after S seconds of computing."),
]
Device = Annotated[
    str, typer.Option("--device", metavar="cpu|cuda", help="Where the checks run in torch; exports run on the CPU.")
]


def site_options(include: Sequence[str] | None, exclude: Sequence[str] | None, **others: Any) -> SiteOptions:
    from doconv_convert.rewrite.options import Options

    return Options(include=include or ("*",), exclude=exclude or (), **others)


def selection(ema: bool, prefix: str) -> Selection:
    from doconv_convert.artifacts.checkpoints.unwrap import Selection

    return Selection(ema, prefix)


def flags(
    opset: int | None, input_names: str | None, output_names: str | None, dynamic: list[str] | None, static: bool
) -> Flags:
    from doconv_convert.artifacts.export.job import Flags

    return Flags(opset, parse_names(input_names), parse_names(output_names), not static, parse_dynamic(dynamic))


def chosen_format(form: Format | None, as_json: bool, file: object) -> tuple[bool, GithubReport | None]:
    """Whether to print JSON, and GitHub's report on `file`; --json stands for --format json."""
    if as_json and form not in (None, Format.json):
        raise typer.BadParameter(f"--json and --format {form.value} contradict each other.")
    return as_json or form is Format.json, GithubReport(str(file)) if form is Format.github else None


def check_outputs(
    reads: Mapping[str, str | Path | None], writes: Mapping[str, Path | None], summary: bool = False
) -> None:
    """Refuse, before the work, outputs that would replace what the command `reads` or each other, by any name or link,
    that have another format's suffix, or that cannot be written. `summary`: GitHub's step summary is written too."""
    from doconv_convert.files import check_writable, require_safetensors
    from doconv_convert.workflows.overwrites import refuse_overwrites

    place = os.environ.get("GITHUB_STEP_SUMMARY") if summary else None
    refuse_overwrites(reads, {**writes, "$GITHUB_STEP_SUMMARY": Path(place) if place else None})
    for name, path in writes.items():
        if path is not None and name == "`plain`":
            require_safetensors(path, "plain")
        if path is not None and name in ("`report`", "`attest`"):
            check_writable(path)


def write_report(report: Path | None, command: str, shown: Output) -> None:
    """The page of the document so far, where one is asked for."""
    if report is not None:
        from doconv_convert.cli.report.render import write_report

        write_report(report, command, shown.folders.left_out(with_options(shown.document)))
        shown.say(f"report: {report}")


def parse_dims(texts: Sequence[str] | None) -> dict[str, int]:
    """{dimension: size} from texts like "batch=1". Raises UsageError."""
    sizes = {}
    for text in texts or ():
        name, _, size = text.rpartition("=")
        if not name or not (size.isascii() and size.isdigit()):
            raise UsageError(f"--dim: got '{text}', expected NAME=SIZE such as 'batch=1'.")
        sizes[name] = int(size)
    return sizes


def announce_code(shown: Output, *texts: str | None) -> None:
    """Say which exported programs are about to be opened: loading one can run code."""
    for text in dict.fromkeys(texts):
        if text is not None and text.endswith(".pt2"):
            shown.say(f"opening '{text}', an exported program: loading one can run code that is pickled in it")


def parse_model_args(text: str | None) -> dict[str, Any]:
    """A JSON object. Raises UsageError."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"--model-args: got '{text}', expected JSON such as '{{\"num_classes\": 10}}' ({error})."
        ) from error
    if not isinstance(value, dict):
        raise UsageError(f"--model-args: got a {type(value).__name__}, expected a JSON object.")
    return value


def parse_names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def parse_dynamic(texts: Sequence[str] | None) -> Mapping[str, Mapping[int, str]] | None:
    """{input: {axis: dimension}} from texts like "x:2=height". Raises UsageError."""
    axes: dict[str, dict[int, str]] = {}
    for text in texts or ():
        left, _, dimension = text.partition("=")
        name, _, axis = left.rpartition(":")
        if not name or not axis.isdigit() or not dimension:
            raise UsageError(f"--dynamic: got '{text}', expected NAME:AXIS=DIM such as 'x:2=height'.")
        axes.setdefault(name, {})[int(axis)] = dimension
    return axes or None
