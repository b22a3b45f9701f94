"""`doconv-convert to-doconv`: a model with over-parameterized convolutions, ready to train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from doconv_convert.cli import options as o
from doconv_convert.cli.console import Output, output
from doconv_convert.errors import UsageError

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
    with output(as_json, quiet, debug, _STEPS) as shown:
        if out is None and not dry_run:
            raise UsageError("to-doconv: name the file to write with -o FILE, or pass --dry-run.")
        from doconv_convert.artifacts.checkpoints.checkpoint import save
        from doconv_convert.artifacts.checkpoints.unwrap import Selection
        from doconv_convert.artifacts.models import find_inputs, open_model
        from doconv_convert.check.torch_runs.device import find_device
        from doconv_convert.check.torch_runs.exact_start import require_same_function, require_same_start, run_in_eval
        from doconv_convert.files import check_writable
        from doconv_convert.rewrite.convert import to_doconv as convert
        from doconv_convert.rewrite.cost import cost
        from doconv_convert.rewrite.foreign.authors import authors_sites
        from doconv_convert.rewrite.foreign.resume import continue_foreign
        from doconv_convert.rewrite.plan import plan
        from doconv_convert.rewrite.sites import Options

        o.check_report(report, out)
        if out is not None and not dry_run:
            check_writable(out)
        where = find_device(device)
        o.announce_code(shown, source)
        opened = open_model(source, weights, o.parse_model_args(model_args), seed, Selection(ema, prefix))
        inputs = find_inputs(opened, input_shape, input_file)
        chosen = {
            "d_mul": d_mul,
            "include": include or ("*",),
            "exclude": exclude or (),
            "pointwise": pointwise,
            "max_d_params": max_d_params,
        }
        samples = 2 if inputs is None or inputs.fixed_batch is None else inputs.fixed_batch
        example = None if inputs is None else inputs.arguments(samples, like=opened.model)
        if example is not None:
            run_in_eval(opened.model, example)  # wrong inputs are refused here, in words
        foreign = None
        if any(authors_sites(opened.model)):
            options = Options(**chosen, seed=seed)  # type: ignore[arg-type]
            foreign = continue_foreign(opened.model, example, options, dry_run=dry_run or example is None)
        original = opened.model if foreign is None else foreign.plain
        planned = plan(original, example, **chosen) if foreign is None else foreign.plan  # type: ignore[arg-type]
        expected = cost(planned, original, batch=batch, measured_batch=samples)
        notes = opened.notes if foreign is None else (*opened.notes, *foreign.told())
        shown.document = {
            "source": opened.source.to_json(),
            "plan": {**planned.to_json(), "batch": samples},
            "cost": expected.to_json(),
            "notes": notes,
            "written": None,
        }
        same = "exactly what the original does (torch.equal)"
        if not dry_run and out is not None:
            if example is None:
                raise UsageError(f"'{source}': its input is not known; give it with --input-shape 1,3,224,224.")
            shown.step("comparing with the original")
            if foreign is None or foreign.converted is None:
                converted = convert(original, example_inputs=example, seed=seed, **chosen)  # type: ignore[arg-type]
                require_same_start(original, converted, example, where)
            else:
                converted = foreign.converted
                same = "what the foreign model does, " + require_same_function(
                    opened.model, original, converted, example
                )
            save(converted, out, source=opened.source)
            shown.document["written"] = str(out)
        for note in notes:
            shown.say(note)
        _show(shown, planned, samples)
        if dry_run:
            _show_cost(shown, expected)
        if shown.document["written"]:
            shown.say(f"wrote {out}: computes {same}")
        o.write_report(report, "to-doconv", shown)


def _show(shown: Output, planned: Plan, samples: int) -> None:
    head = ["layer", "kind", "kernel", "groups", "D_mul", "added", "MACs", "action"]
    rows = [
        [
            row.name,
            row.kind,
            "x".join(map(str, row.kernel)) or "-",
            row.groups,
            "-" if row.d_mul is None else row.d_mul,
            row.added_parameters,
            "-" if row.macs is None else row.macs // samples,
            row.action if row.reason is None else f"{row.action}: {row.reason}",
        ]
        for row in planned.rows
    ]
    shown.table(head, rows, right=(3, 4, 5, 6))
    counts = ", ".join(f"{count} {what}" for what, count in planned.counts().items())
    shown.say(
        f"{planned.model}: {counts}; {planned.added_parameters:,} parameters added for training (MACs: one sample)"
    )
    for path in planned.not_looked_into:
        shown.say(f"not looked into: '{path or planned.model}'; give --input-shape")


_FIGURES = ("checkpoint_bytes", "sgd_momentum_bytes", "adam_bytes", "composition_macs", "convolution_macs")


def _show_cost(shown: Output, expected: Cost) -> None:
    """Growth and arithmetic of every over-parameterized kernel, in a table of 80 columns."""
    rows = [
        [site.name, site.added_parameters, *(_short(getattr(site, figure)) for figure in _FIGURES)]
        for site in expected.sites
    ]
    total = [expected.total(figure) for figure in _FIGURES[:-1]]
    rows.append(["total", expected.total("added_parameters"), *map(_short, [*total, expected.convolution_macs])])
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


def _short(number: int | None) -> str:
    """Four digits: 1.234M."""
    if number is None:
        return "-"
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return str(number)
