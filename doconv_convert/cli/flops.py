"""`doconv-convert flops`: MACs per node and in total, counted on the ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from doconv_convert.cli import options as o
from doconv_convert.cli.console import check_failed, output
from doconv_convert.errors import UsageError

if TYPE_CHECKING:
    from doconv_convert.check.macs.counting import MacCount


def flops(
    model: Annotated[str, typer.Argument(help="An ONNX file, or a SOURCE (exported for the count).")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="ONNX|SOURCE", help="Exit with 3 unless all MACs are equal.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--max", metavar="4.1G", help="Exit with 3 if there are more MACs, or uncounted ones.")
    ] = None,
    dim: Annotated[
        list[str] | None, typer.Option("--dim", metavar="NAME=SIZE", help="A dynamic dimension's size; repeats.")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="OP", help="An uncounted operator that multiplies nothing; repeats."),
    ] = None,
    model_args: o.ModelArgs = None,
    input_shape: o.InputShape = None,
    form: o.As = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Count multiply-accumulates (MACs) of one sample; FLOPs = 2 x MACs."""
    as_json, github = o.chosen_format(form, as_json, model)
    with output(as_json, quiet, debug, {"counting": 1.0}, github=github) as shown:
        from doconv_convert.check.macs.counting import compare_counts, format_macs, parse_macs

        most = None if budget is None else parse_macs(budget)
        sizes = o.parse_dims(dim)
        o.announce_code(shown, model, against)
        count, *others = _counts(
            [model, *([] if against is None else [against])], sizes, ignore, model_args, input_shape
        )
        rows = [[node.name, node.op, node.parameters, node.macs] for node in count.nodes]
        shown.table(["node", "op", "parameters", "MACs"], rows, right=(2, 3))
        shown.say(f"{model}: {format_macs(count.total)} ({count.total:,} MACs; FLOPs = 2 x MACs)")
        for sentence in count.assumed:
            shown.say(f"assumed: {sentence}")
        for op, number in count.uncounted.items():
            shown.say(f"not counted: {number} {op}")
        shown.document = {
            "model": model,
            "unit": "MACs",
            "total": count.total,
            "nodes": [vars(node) for node in count.nodes],
            "uncounted": count.uncounted,
            "assumed": count.assumed,
        }
        failed = False
        if most is not None:
            within = count.total <= most and not count.uncounted
            shown.document |= {"max": most, "within": within}
            failed |= not within
            if count.total > most:
                shown.problem(f"over budget: {format_macs(count.total)}, at most {format_macs(most)} are allowed")
            elif not within:
                ops = ", ".join(f"--ignore {op}" for op in count.uncounted)
                shown.problem(f"the budget cannot be checked, some MACs are not counted; if they are none: {ops}")
            else:
                shown.say(f"within budget: at most {format_macs(most)} are allowed")
        for expected in others:
            differences = compare_counts(expected, count)
            shown.document |= {"against": against, "differences": differences, "equal": not differences}
            for difference in differences:
                shown.problem(f"differs: {difference}")
            if not differences:
                but = ", but for what is not counted" if count.uncounted else ""
                shown.say(f"equal to {against}, node by node{but}")
            failed |= bool(differences)
        if failed:
            check_failed()


def _counts(
    models: Sequence[str],
    sizes: Mapping[str, int],
    ignore: Sequence[str] | None,
    model_args: str | None,
    input_shape: list[str] | None,
) -> list[MacCount]:
    """Each model's count; a size counts where its dimension exists, and must do so in one of them."""
    from doconv_convert.check.macs.counting import count_macs, dynamic_dims

    files = [model for model in models if Path(model).suffix == ".onnx"]
    known = {model: dynamic_dims(model) for model in files}
    for name in sizes:
        if not any(name in names for names in known.values()):
            have = sorted({one for names in known.values() for one in names}) or "none"
            raise UsageError(f"--dim: no dynamic dimension is named '{name}', the files have {have}.")
    counts = []
    for model in models:
        if model in known:
            bound = {name: size for name, size in sizes.items() if name in known[model]}
            counts.append(count_macs(model, bound, ignore or ()))
        else:
            from doconv_convert.workflows.verify import count_source

            counts.append(count_source(model, o.parse_model_args(model_args), input_shape or (), ignore or ()))
    return counts
