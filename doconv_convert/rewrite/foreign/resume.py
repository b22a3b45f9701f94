"""Going on with a foreign checkpoint: the authors' layers of a model as ours, the same function.

Their rows of D are ours where g = 1 or C_out = g. There W and D are kept: D^ = D + identity, so our residual is
D + identity - [I | 0], exactly D where their identity is [I | 0]. Elsewhere, and at D_mul < K, the layer starts
anew from its folded kernel, with D = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from doconv_convert.errors import CheckFailedError
from doconv_convert.nn.factors import StoredKernel
from doconv_convert.nn.layers import fold_kernel, to_float64_cpu
from doconv_convert.rewrite.convert import convert, copy_model, require_sites
from doconv_convert.rewrite.discover import discover
from doconv_convert.rewrite.fold_kernels import FOLD_TOLERANCE, relative_distance
from doconv_convert.rewrite.foreign.authors import (
    AuthorsSite,
    authors_sites,
    fold_authors,
    folded_site,
    pairing_is_ours,
)
from doconv_convert.rewrite.options import Options
from doconv_convert.rewrite.plan import Plan, as_plan
from doconv_convert.rewrite.sites import Action, Site, decide
from doconv_convert.words import listed


@dataclass(frozen=True)
class OurFactors:
    """A foreign layer's W and D in our form, float64: `weight` and `extra` are W's slots, `d` the residual."""

    weight: Tensor
    d: Tensor
    extra: Tensor | None
    groups: int

    def kernel(self) -> Tensor:
        return fold_kernel(self.weight, self.d, self.extra, self.groups)


@dataclass
class Continued:
    """`plain` has the folded kernels, `converted` is over-parameterized. `kept` are the layers that go on with
    their W and D (`rounded`: those whose D is not the stored one but a sum cast once), `restarted` those that
    begin at D = 0."""

    plain: nn.Module
    plan: Plan
    converted: nn.Module | None = None
    kept: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)

    def told(self) -> tuple[str, ...]:
        """What became of the layers, in sentences."""
        kept, restarted = listed(self.kept), listed(self.restarted)
        told = [f"{len(self.kept)} layers go on with their own W and D: {kept}"] if self.kept else []
        if self.rounded:
            told.append(
                f"{len(self.rounded)} of them have another identity than [I | 0]; D + identity was rounded once"
            )
        if self.restarted:
            told.append(
                f"{len(self.restarted)} layers were folded and start anew at D = 0, their rows of D being paired "
                f"otherwise than ours, or left out: {restarted}"
            )
        return tuple(told)


def continue_foreign(model: nn.Module, example_inputs: Any, options: Options, *, dry_run: bool = False) -> Continued:
    """Convert a model with foreign units (`authors_sites`) so that its D and W live on where they can.

    The model itself is not changed; with `dry_run` nothing is converted. Raises UsageError and DoconvError as
    `to_doconv` does, CheckFailedError where our form of a layer is not its kernel to 1e-12 in float64.
    """
    ours = {site.name: _our_factors(site) for site in authors_sites(model) if site.factors[1].D is not None}
    exact = {site.name: folded_site(site) for site in authors_sites(model)}
    plain = copy_model(model)
    fold_authors(plain)
    converted = copy_model(plain)
    discovery = discover(converted, example_inputs)
    decide(discovery.sites, options)
    kept: dict[str, tuple[Site, OurFactors]] = {}
    for site in discovery.sites:
        name = next((name for name in site.names if ours.get(name) is not None), None)
        factors = None if name is None else ours[name]
        if name is None or factors is None or site.action is not Action.CONVERT:
            continue
        _require_same_kernel(name, factors.kernel(), exact[name])
        before, site.d_mul = site.d_mul, factors.d.shape[2]
        if site.d_parameters > options.max_d_params:
            site.d_mul = before
        else:
            kept[name] = site, factors
    result = Continued(plain, as_plan(discovery), kept=list(kept))
    result.restarted = [name for name in ours if name not in kept]
    if dry_run:
        return result
    require_sites(discovery)
    convert(discovery, options)
    result.rounded = [name for name, (site, factors) in kept.items() if not _fill(site, factors)]
    result.converted = converted
    return result


def _our_factors(site: AuthorsSite) -> OurFactors | None:
    """None where the layout is not ours."""
    w, composed = site.factors
    if composed.D is None or composed.identity is None:
        return None
    w, d, identity = map(to_float64_cpu, (w, composed.D, composed.identity))
    positions, d_mul, groups = d.shape[1], d.shape[2], d.shape[0] // w.shape[1]
    if d_mul < positions or not pairing_is_ours(w.shape[0], groups):
        return None
    if composed.mul is not None:
        w = w * to_float64_cpu(composed.mul)
    residual = d + (identity - torch.eye(positions, d_mul, dtype=torch.float64))
    weight = w[..., :positions].reshape(*w.shape[:2], *composed.size)
    return OurFactors(weight, residual, w[..., positions:] if d_mul > positions else None, groups)


def _require_same_kernel(name: str, got: Tensor, expected: Tensor) -> None:
    error = relative_distance(got, expected)
    if not error <= FOLD_TOLERANCE:
        raise CheckFailedError(
            f"'{name}': its W and D in our form give another kernel in float64, by {error:.1e}, expected at "
            f"most {FOLD_TOLERANCE:.0e}; nothing was written. Please report its shapes."
        )


def _fill(site: Site, factors: OurFactors) -> bool:
    """Write W and D into the converted site, cast once; whether nothing was rounded."""
    owner = site.owners[0]
    kernel = StoredKernel(owner.kernel, site.group_count)
    values = {kernel.name: factors.weight, kernel.d_name: factors.d, kernel.extra_name: factors.extra}
    exact = True
    with torch.no_grad():
        for name, value in values.items():
            parameter = owner.module._parameters.get(name)
            if value is not None and parameter is not None:
                parameter.copy_(value)
                exact &= torch.equal(parameter.detach().double(), value)
    return exact
