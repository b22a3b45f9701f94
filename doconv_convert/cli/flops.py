"""`doconv-convert flops`: MACs per node and in total, counted on the ONNX graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from doconv_convert.cli import options as o
from doconv_convert.cli.console import check_failed, output

if TYPE_CHECKING:
    from doconv_convert.check.macs import MacCount


def flops(
    model: Annotated[str, typer.Argument(help="An ONNX file, or a SOURCE (exported for the count).")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="ONNX|SOURCE", help="Exit with 3 unless all MACs are equal.")
    ] = None,
    model_args: o.ModelArgs = None,
    input_shape: o.InputShape = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Count multiply-accumulates (MACs) of one sample; FLOPs = 2 x MACs."""
    with output(as_json, quiet, debug, "counting") as shown:
        from doconv_convert.check.macs import compare_counts, format_macs

        o.announce_code(shown, model, against)
        count = _count(model, model_args, input_shape)
        rows = [[node.name, node.op, node.parameters, node.macs] for node in count.nodes]
        shown.table(["node", "op", "parameters", "MACs"], rows, right=(2, 3))
        shown.say(f"{model}: {format_macs(count.total)} ({count.total:,} MACs; FLOPs = 2 x MACs)")
        for op, number in count.uncounted.items():
            shown.say(f"not counted: {number} {op}")
        shown.document = {
            "model": model,
            "unit": "MACs",
            "total": count.total,
            "nodes": [vars(node) for node in count.nodes],
            "uncounted": count.uncounted,
        }
        if against is not None:
            differences = compare_counts(_count(against, model_args, input_shape), count)
            shown.document |= {"against": against, "differences": differences, "equal": not differences}
            for difference in differences:
                shown.say(f"differs: {difference}")
            if differences:
                check_failed()
            shown.say(f"equal to {against}, node by node")


def _count(model: str, model_args: str | None, input_shape: list[str] | None) -> MacCount:
    from doconv_convert.check.macs import count_macs

    if Path(model).suffix == ".onnx":
        return count_macs(Path(model))
    from doconv_convert.check.verify import count_source

    return count_source(model, o.parse_model_args(model_args), input_shape or ())
