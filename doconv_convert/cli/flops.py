"""`doconv-convert flops`: MACs per node and in total, counted on the ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from doconv_convert.cli import options as o
from doconv_convert.cli.console import Output, check_failed, output
from doconv_convert.words import counted, listed

if TYPE_CHECKING:
    from doconv_convert.workflows.count import CountResult

_SHOWN_NODES = 1000  # laying out a table takes a millisecond a row


def flops(
    model: Annotated[str, typer.Argument(help="An ONNX file, or a SOURCE (exported for the count).")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="ONNX|SOURCE", help="Exit with 3 unless all MACs are equal.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--max", metavar="4.1G", help="Exit with 3 if there are more MACs, or uncounted ones.")
    ] = None,
    max_regions: Annotated[
        int | None,
        typer.Option(
            "--max-regions", min=0, metavar="N", help="Exit with 3 if more linear regions (un-fused branches) are left."
        ),
    ] = None,
    dim: Annotated[
        list[str] | None, typer.Option("--dim", metavar="NAME=SIZE", help="A dynamic dimension's size; repeats.")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="OP", help="An uncounted operator that multiplies nothing; repeats."),
    ] = None,
    allow_assumed: Annotated[
        bool, typer.Option("--allow-assumed", help="Believe sizes that the file states and no operator confirms.")
    ] = False,
    timeout: o.Timeout = None,
    model_args: o.ModelArgs = None,
    input_shape: o.InputShape = None,
    form: o.As = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Count multiply-accumulates (MACs) of one run, at a batch of 1 where it is dynamic; FLOPs = 2 x MACs."""
    as_json, github = o.chosen_format(form, as_json, model)
    with output(as_json, quiet, debug, {"counting": 1.0}, github=github, files=(model, against)) as shown:
        o.check_outputs({"the model": model, "`against`": against}, {}, github is not None)
        from doconv_convert.check.confined import SECONDS
        from doconv_convert.check.macs.figures import parse_macs
        from doconv_convert.workflows.count import CountRequest, count_models

        request = CountRequest(
            model,
            against,
            most=None if budget is None else parse_macs(budget),
            max_regions=max_regions,
            dims=o.parse_dims(dim),
            ignore=ignore or (),
            model_args=o.parse_model_args(model_args),
            input_shapes=input_shape or (),
            allow_assumed=allow_assumed,
            timeout=timeout or SECONDS,
        )
        o.announce_code(shown, model, against)
        result = count_models(request)
        shown.document = result.to_json()
        _show(shown, result)
        if result.failed:
            check_failed()


def _show(shown: Output, result: CountResult) -> None:
    from doconv_convert.check.macs.figures import format_macs

    count, asked = result.count, result.request
    rows = [[node.name, node.op, node.parameters, node.macs] for node in count.nodes[:_SHOWN_NODES]]
    shown.table(["node", "op", "parameters", "MACs"], rows, right=(2, 3))
    if len(count.nodes) > _SHOWN_NODES:
        shown.say(f"and {counted(len(count.nodes) - _SHOWN_NODES, 'more node')}; --json has them all")
    sizes = listed([f"{name} {_shape(shape)}" for name, shape in count.inputs.items()])
    run = f"; one run on {sizes}" if sizes else ""
    shown.say(f"{asked.model}: {format_macs(count.total)} ({count.total:,} MACs; FLOPs = 2 x MACs){run}")
    for sentence in count.assumed[:_SHOWN_NODES]:
        shown.say(f"assumed: {sentence}")
    for op, number in list(count.uncounted.items())[:_SHOWN_NODES]:
        shown.say(f"not counted: {number} {op}")
    _show_regions(shown, result)
    _show_budget(shown, result)
    for difference in result.differences:
        shown.problem(f"differs: {difference}")
    if result.unconfirmed and (asked.most is not None or asked.against is not None):
        names = listed([f"'{name}'" for name in result.unconfirmed])
        shown.problem(f"no operator confirms the sizes that the file states for {names}; if right: --allow-assumed")
    elif asked.against is not None and not result.differences:
        but = ", but for what is not counted" if count.uncounted else ""
        shown.say(f"equal to {asked.against}, node by node{but}")


def _show_regions(shown: Output, result: CountResult) -> None:
    from doconv_convert.check.macs.figures import format_macs
    from doconv_convert.check.macs.result import wasted_macs

    regions, most = result.regions, result.request.max_regions
    say = shown.say if result.few_regions else shown.problem
    for region in regions:
        nodes, convolutions = counted(len(region.nodes), "node"), counted(region.convolutions, "convolution")
        wasted = format_macs(region.wasted)
        say(f"linear region: {nodes}, {convolutions} that are one, {wasted} wasted: {', '.join(region.nodes)}")
    if regions:
        total = f"{counted(len(regions), 'linear region')} left, {format_macs(wasted_macs(regions))} wasted"
        say(f"{total}; `doconv-convert fold FILE.onnx --merge branches -o FOLDED.onnx` makes one convolution of each")
    if not result.few_regions:
        shown.problem(f"too many linear regions: {len(regions)}, at most {most} are allowed")


def _show_budget(shown: Output, result: CountResult) -> None:
    from doconv_convert.check.macs.figures import format_macs

    count, asked = result.count, result.request
    if asked.most is None:
        return
    most = format_macs(asked.most)
    if count.total > asked.most:
        shown.problem(f"over budget: {format_macs(count.total)}, at most {most} are allowed")
    elif count.uncounted:
        ops = ", ".join(f"--ignore {op}" for op in list(count.uncounted)[:_SHOWN_NODES])
        shown.problem(f"the budget cannot be checked, some MACs are not counted; if they are none: {ops}")
    elif result.within:
        shown.say(f"within budget: at most {most} are allowed")


def _shape(shape: Sequence[int] | None) -> str:
    return "of unknown size" if shape is None else "x".join(map(str, shape)) or "scalar"
