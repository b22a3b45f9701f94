"""What over-parameterization costs in training, before it is paid: memory, files, and arithmetic a step.

At D_mul and K positions a kernel is composed by D_mul*K*C_in*C_out/g multiply-accumulates each time its layer
runs, whatever the batch; its convolution costs B*V*C_out*K*C_in/g (the two terms of `kernel_macs`). Folded, none
of this is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from doconv_convert.nn.composition import kernel_macs
from doconv_convert.rewrite.plan import Plan, PlanRow


@dataclass(frozen=True)
class SiteCost:
    """One kernel's growth, in bytes where not said otherwise, and its MACs in one training forward.

    A frozen kernel has no optimizer state. `convolution_macs` is None where no forward was run.
    """

    name: str
    added_parameters: int
    checkpoint_bytes: int
    sgd_momentum_bytes: int
    adam_bytes: int
    composition_macs: int
    convolution_macs: int | None


@dataclass(frozen=True)
class Cost:
    """All over-parameterized kernels; `convolution_macs` is that of every convolution, the kept ones too."""

    batch: int
    sites: list[SiteCost]
    convolution_macs: int | None

    def total(self, figure: str) -> int:
        """The sum of one of a SiteCost's figures over the sites."""
        return sum(getattr(site, figure) or 0 for site in self.sites)

    def to_json(self) -> dict[str, Any]:
        grown = ("added_parameters", "checkpoint_bytes", "sgd_momentum_bytes", "adam_bytes", "composition_macs")
        total = {figure: self.total(figure) for figure in grown} | {"convolution_macs": self.convolution_macs}
        return {**asdict(self), "total": total}


def cost(plan: Plan, model: nn.Module, *, batch: int, measured_batch: int) -> Cost:
    """The cost of `plan`, which was made of `model` on example inputs of `measured_batch` samples; MACs are scaled
    from those to `batch`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    measured = [row.macs for row in plan.rows if row.macs is not None]
    sites = [_site(row, parameters, batch, measured_batch) for row in plan.rows if row.d_mul is not None]
    return Cost(batch, sites, _scaled(sum(measured), batch, measured_batch) if measured else None)


def _site(row: PlanRow, parameters: Mapping[str, nn.Parameter], batch: int, measured_batch: int) -> SiteCost:
    kernel = parameters[row.name if row.name in parameters else f"{row.name}.weight"]
    positions = kernel.shape[2:].numel()
    grown = row.added_parameters * kernel.element_size()
    state = grown if kernel.requires_grad else 0
    composed = kernel_macs(
        in_channels=row.in_channels,
        out_channels=row.out_channels,
        kernel_positions=positions,
        d_mul=row.d_mul or positions,
        groups=row.groups,
        batch=0,
    )
    calls = 1 if row.calls is None else row.calls
    macs = None if row.macs is None else _scaled(row.macs, batch, measured_batch)
    return SiteCost(row.name, row.added_parameters, grown, state, 2 * state, calls * composed, macs)


def _scaled(macs: int, batch: int, measured_batch: int) -> int:
    return round(macs * batch / measured_batch) if macs % measured_batch else macs // measured_batch * batch
