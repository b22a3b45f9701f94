"""`plan`: every convolution of a model, a row each, before anything is changed."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from doconv_convert.errors import UsageError
from doconv_convert.rewrite.discover import Discovery, discover
from doconv_convert.rewrite.levers import OWN_LOSS, measure_levers
from doconv_convert.rewrite.linear.merge import find_in_model
from doconv_convert.rewrite.options import Options
from doconv_convert.rewrite.sites import Action, Site, decide
from doconv_convert.words import counted


@dataclass(frozen=True)
class PlanRow:
    """One convolution. `calls`, `output_size` and `macs` (of all calls, at the example inputs' batch) are None
    where no forward was run; `d_mul` is None where the layer has no D. `lever` is what D would add to an SGD step at
    equal learning rates, relative to W's own part (`lever`), None where it was not measured."""

    name: str
    aliases: list[str]
    kind: str
    kernel: list[int]
    in_channels: int
    out_channels: int
    groups: int
    d_mul: int | None
    added_parameters: int
    calls: int | None
    output_size: list[int] | None
    macs: int | None
    action: str
    reason: str | None
    lever: float | None = None


@dataclass(frozen=True)
class Plan:
    """What `to_doconv` would do. `not_looked_into` names modules whose own forward could neither be traced nor
    was run: a functional convolution in there would be missed (its layers are not). `levers_of` says of what gradient
    the rows' levers are, None where there are none. `linear_regions` are branches that `fold(merge="branches")` would
    make one convolution each of, with `region_convolutions` in them now."""

    model: str
    rows: list[PlanRow]
    not_looked_into: list[str]
    levers_of: str | None = None
    linear_regions: int = 0
    region_convolutions: int = 0

    @property
    def median_lever(self) -> float | None:
        """Over the layers that have one."""
        known = [row.lever for row in self.rows if row.lever is not None]
        return statistics.median(known) if known else None

    @property
    def added_parameters(self) -> int:
        return sum(row.added_parameters for row in self.rows)

    def with_levers(self, levers: Mapping[str, float], of: str) -> Plan:
        """The same with the levers, by the rows' names."""
        rows = [replace(row, lever=levers.get(row.name)) for row in self.rows]
        return replace(self, rows=rows, levers_of=of if levers else None)

    def counts(self) -> dict[str, int]:
        """How many convolutions are converted, have no D (1x1), are already DO-Conv, and are kept by reason."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            if row.action == Action.CONVERT.value and row.d_mul is None:
                counts["convert, no D (1x1)"] += 1
            else:
                counts[row.action if row.reason is None else f"{row.action}: {row.reason}"] += 1
        return dict(counts)

    def to_json(self) -> dict[str, Any]:
        more = {"added_parameters": self.added_parameters, "counts": self.counts(), "median_lever": self.median_lever}
        return {**asdict(self), **more}

    @property
    def note_on_regions(self) -> tuple[str, ...]:
        """A sentence on the linear regions, where there are some."""
        if not self.linear_regions:
            return ()
        found = (
            f"{counted(self.linear_regions, 'linear region')} with {counted(self.region_convolutions, 'convolution')}"
        )
        return (f'{found}: fold(merge="branches"), `fold --merge branches`, ships one convolution of each.',)

    def __str__(self) -> str:
        head = ["name", "kind", "kernel", "groups", "D_mul", "added", "calls", "output", "MACs", "lever", "action"]
        lines = [[_text(value) for value in _cells(row)] for row in self.rows]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [head, *lines]
        ]
        summary = ", ".join(f"{count} {what}" for what, count in self.counts().items()) or "no convolution"
        table.append(f"{self.model}: {summary}; {self.added_parameters:,} parameters added for training.")
        if self.median_lever is not None:
            table.append(f"The median lever is {self.median_lever:.2g} (of {self.levers_of}).")
        table += [f"not looked into: '{path or self.model}' (pass example_inputs)" for path in self.not_looked_into]
        return "\n".join([*table, *self.note_on_regions])


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    d_mul: int | str = "K",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    pointwise: bool = False,
    max_d_params: int = 16_000_000,
    loss: Callable[[Any], Tensor] | None = None,
) -> Plan:
    """Every convolution of `model` with what `to_doconv` would do to it; the model is not changed.

    Arguments are `to_doconv`'s; with `example_inputs` one forward in eval mode adds calls, output sizes and MACs. With
    a `loss` too, a function from the model's output to a scalar, one forward and backward of a converted copy, in the
    model's own mode, add each layer's lever: how much D would add to the first SGD step.
    `.rows` has a row a convolution, `.counts()` sums them up, `print` shows all.

    Raises UsageError as `to_doconv` does, for a `loss` without `example_inputs`, and for one that gives no scalar.

    >>> import torch
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 3, 2))
    >>> planned = plan(net, torch.zeros(1, 3, 8, 8))
    >>> planned.counts()
    {'convert': 1, 'convert, no D (1x1)': 1, 'keep: transposed': 1}
    >>> planned.rows[0].kind, planned.rows[0].macs, planned.added_parameters
    ('DO-Conv', 7776, 243)
    """
    discovery = discover(model, example_inputs)
    options = Options(d_mul, include, exclude, pointwise, max_d_params)
    decide(discovery.sites, options)
    planned = with_regions(as_plan(discovery), model)
    if loss is None:
        return planned
    if example_inputs is None:
        raise UsageError("plan: `loss` needs `example_inputs`; pass a batch of your data.")
    return planned.with_levers(measure_levers(model, example_inputs, options, loss), OWN_LOSS)


def with_regions(planned: Plan, model: nn.Module) -> Plan:
    """The plan with the linear regions of its model, which has no DO-Conv layers yet, counted."""
    regions = find_in_model(model)
    convolutions = sum(region.count("convolution") for region in regions)
    return replace(planned, linear_regions=len(regions), region_convolutions=convolutions)


def as_plan(discovery: Discovery) -> Plan:
    return Plan(type(discovery.model).__name__, [_row(site) for site in discovery.sites], discovery.not_looked_into)


def _row(site: Site) -> PlanRow:
    shape = site.shape
    return PlanRow(
        name=site.name,
        aliases=site.names[1:],
        kind=site.kind,
        kernel=list(shape[2:]),
        in_channels=site.in_channels,
        out_channels=shape[0] if shape else 0,
        groups=site.group_count,
        d_mul=site.d_mul,
        added_parameters=site.added_parameters if site.action is Action.CONVERT else 0,
        calls=site.calls,
        output_size=None if site.output_size is None else list(site.output_size),
        macs=site.macs,
        action=site.action.value,
        reason=None if site.reason is None else site.reason.value,
    )


def _cells(row: PlanRow) -> list[Any]:
    action = row.action if row.reason is None else f"{row.action}: {row.reason}"
    if row.action == Action.CONVERT.value and row.d_mul is None:
        action += " (no D)"
    kernel = "x".join(map(str, row.kernel))
    size = None if row.output_size is None else "x".join(map(str, row.output_size))
    return [
        row.name,
        row.kind,
        kernel,
        row.groups,
        row.d_mul,
        row.added_parameters,
        row.calls,
        size,
        row.macs,
        None if row.lever is None else f"{row.lever:.2g}",
        action,
    ]


def _text(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)
