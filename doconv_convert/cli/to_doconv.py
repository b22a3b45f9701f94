"""`doconv-convert to-doconv`: a model with over-parameterized convolutions, ready to train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from doconv_convert.cli import options as o
from doconv_convert.cli.console import Output, output
from doconv_convert.errors import UsageError
from doconv_convert.words import short

if TYPE_CHECKING:
    from doconv_convert.rewrite.cost import Cost
    from doconv_convert.rewrite.plan import Plan

_STEPS = {"converting": 0.7, "comparing with the original": 0.3}


def to_doconv(
    source: Annotated[
        str, typer.Argument(help="torchvision:NAME, timm:NAME, package.module:factory, file.py:factory, model.pt2.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="The .safetensors to write.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="DEFAULT|NAME|FILE", help="Start from these weights.")
    ] = None,
    d_mul: Annotated[str, typer.Option("--d-mul", metavar="9|2K|K+3", help="D_mul >= K.")] = "K",
    include: o.Include = None,
    exclude: o.Exclude = None,
    pointwise: Annotated[bool, typer.Option("--pointwise", help="Give 1x1 kernels a D too.")] = False,
    max_d_params: Annotated[
        int, typer.Option("--max-d-params", metavar="N", help="Keep a layer whose D would be larger.")
    ] = 16_000_000,
    seed: o.Seed = 0,
    ema: o.Ema = False,
    prefix: o.Prefix = "",
    model_args: o.ModelArgs = None,
    input_shape: o.InputShape = None,
    input_file: o.InputFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan and what it costs.")] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="The training batch of that cost.")] = 1,
    device: o.Device = "cpu",
    report: o.Report = None,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Over-parameterize a model's convolutions; what it computes stays the same, bit for bit (checked)."""
    files = (source, out, weights, input_file, report)
    with output(as_json, quiet, debug, _STEPS, files=files) as shown:
        if out is None and not dry_run:
            raise UsageError("to-doconv: name the file to write with -o FILE, or pass --dry-run.")
        reads = {"SOURCE": source, "`weights`": weights, "`input_file`": input_file}
        o.check_outputs(reads, {"`plain`": None if dry_run else out, "`report`": report})
        o.announce_code(shown, source)
        from doconv_convert.workflows.convert import ConvertRequest, convert_source

        request = ConvertRequest(
            source,
            out=None if dry_run else out,
            options=o.site_options(
                include, exclude, d_mul=d_mul, pointwise=pointwise, max_d_params=max_d_params, seed=seed
            ),
            weights=weights,
            model_args=o.parse_model_args(model_args),
            selection=o.selection(ema, prefix),
            input_shapes=input_shape or (),
            input_file=input_file,
            batch=batch,
            device=device,
        )
        result = convert_source(request, progress=shown.step)
        shown.document = result.to_json()
        for note in result.notes:
            shown.say(note)
        _show(shown, result.plan, result.samples)
        if dry_run:
            _show_cost(shown, result.cost)
        if result.written is not None:
            shown.say(f"wrote {result.written}: computes {result.same}")
        o.write_report(report, "to-doconv", shown)


def _show(shown: Output, planned: Plan, samples: int) -> None:
    # a dry run has what is added in its table of costs; more than 80 columns do not fit
    measured = planned.levers_of is not None
    head = ["layer", "kind", "kernel", "groups", "D_mul", "MACs", "lever" if measured else "added", "action"]
    rows = [
        [
            row.name,
            row.kind,
            "x".join(map(str, row.kernel)) or "-",
            row.groups,
            "-" if row.d_mul is None else row.d_mul,
            "-" if row.macs is None else row.macs // samples,
            row.added_parameters if not measured else "-" if row.lever is None else f"{row.lever:.2g}",
            row.action if row.reason is None else f"{row.action}: {row.reason}",
        ]
        for row in planned.rows
    ]
    shown.table(head, rows, right=(3, 4, 5, 6))
    counts = ", ".join(f"{count} {what}" for what, count in planned.counts().items())
    shown.say(
        f"{planned.model}: {counts}; {planned.added_parameters:,} parameters added for training (MACs: one sample)"
    )
    if planned.median_lever is not None:
        shown.say(
            f"lever: D changes an SGD step by {planned.median_lever:.2g} of its size in the median layer, at equal "
            f"learning rates (measured at {planned.levers_of}); docs/how_it_works.md"
        )
    for path in planned.not_looked_into:
        shown.say(f"not looked into: '{path or planned.model}'; give --input-shape")


_FIGURES = ("checkpoint_bytes", "sgd_momentum_bytes", "adam_bytes", "composition_macs", "convolution_macs")


def _show_cost(shown: Output, expected: Cost) -> None:
    """Growth and arithmetic of every over-parameterized kernel, in a table of 80 columns."""
    rows = [
        [site.name, site.added_parameters, *(_figure(getattr(site, figure)) for figure in _FIGURES)]
        for site in expected.sites
    ]
    total = [expected.total(figure) for figure in _FIGURES[:-1]]
    rows.append(["total", expected.total("added_parameters"), *map(_figure, [*total, expected.convolution_macs])])
    head = ["layer", "added", "file B", "SGD B", "Adam B", "compose", "convolve"]
    shown.table(head, rows, right=range(1, len(head)))
    shown.say(
        f"training costs, until the fold: {total[0]:,} bytes more in a checkpoint; {total[1]:,} bytes more optimizer "
        f"state with SGD and momentum, {total[2]:,} with Adam"
    )
    macs = f"one forward at batch {expected.batch} (--batch): {total[3]:,} MACs to compose the kernels"
    if expected.convolution_macs:
        share = total[3] / expected.convolution_macs
        macs += f", {share:.2%} of the {expected.convolution_macs:,} MACs of all convolutions"
    shown.say(macs)


def _figure(number: int | None) -> str:
    return "-" if number is None else short(number, 4, "")
