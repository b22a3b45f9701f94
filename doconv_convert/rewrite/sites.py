"""A site: one convolution kernel of a model, who owns it, and what is done with it."""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from doconv_convert.errors import UsageError
from doconv_convert.nn.arguments import resolve_d_mul
from doconv_convert.nn.composition import kind_of
from doconv_convert.rewrite.options import Options

logger = logging.getLogger(__name__)


class Reason(enum.Enum):
    """Why a convolution is kept as it is. The list is closed."""

    TRANSPOSED = "transposed"
    BLUR_FILTER = "blur filter (buffer)"
    INPUT_DEPENDENT = "input-dependent kernel"
    COMPUTED = "computed from parameters by its own class"
    WRITTEN = "written by its own forward"
    PARAMETRIZED = "already parametrized"
    LAZY = "lazy"
    QUANTIZED = "quantized"
    COMPLEX = "complex"
    TOO_LARGE = "above max_d_params"
    EXCLUDED = "excluded by name"
    DIFFERENT_GROUPS = "one Parameter used with different group counts"


class Action(enum.Enum):
    CONVERT = "convert"
    KEEP = "keep"
    ALREADY = "already DO-Conv"


def site_name(path: str, kernel: str) -> str:
    """A site's name as people type it: the layer's path, or the parameter's where it is not `weight`."""
    return path if kernel == "weight" and path else f"{path}.{kernel}".lstrip(".")


@dataclass(frozen=True)
class Owner:
    """A module of the model that has the kernel among its parameters."""

    path: str
    module: nn.Module
    kernel: str

    @property
    def name(self) -> str:
        return site_name(self.path, self.kernel)


@dataclass
class Site:
    """One kernel, found by the module walk, a trace or a real forward.

    `calls`, `output_size`, `batch` and `macs` (multiply-accumulates of all calls) come from a real forward;
    `rewritten` is set by the pass, which makes the `factors` (D, weight_extra) that every owner shares.
    """

    owners: list[Owner]
    parameter: nn.Parameter | None
    groups: set[int] = field(default_factory=set)
    reason: Reason | None = None
    action: Action = Action.CONVERT
    d_mul: int | None = None
    seen_in_graph: bool = False
    rewritten: bool = False
    calls: int | None = None
    output_size: tuple[int, ...] | None = None
    batch: int | None = None
    macs: int | None = None
    factors: tuple[nn.Parameter, nn.Parameter | None] | None = None

    @property
    def name(self) -> str:
        return self.owners[0].name

    @property
    def names(self) -> list[str]:
        return [owner.name for owner in self.owners]

    @property
    def group_count(self) -> int:
        return min(self.groups, default=1)

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.parameter is None or self.reason is Reason.LAZY else tuple(self.parameter.shape)

    @property
    def in_channels(self) -> int:
        return self.shape[1] * self.group_count if self.shape else 0

    @property
    def positions(self) -> int:
        """K, the number of kernel positions."""
        product = 1
        for extent in self.shape[2:]:
            product *= extent
        return product

    @property
    def kind(self) -> str:
        if self.reason is Reason.TRANSPOSED or not self.shape:
            return "-"
        return kind_of(self.in_channels, self.group_count)

    @property
    def d_parameters(self) -> int:
        return 0 if self.d_mul is None else self.in_channels * self.positions * self.d_mul

    @property
    def added_parameters(self) -> int:
        if self.d_mul is None:
            return 0
        return self.d_parameters + self.shape[0] * self.shape[1] * (self.d_mul - self.positions)

    def keep(self, reason: Reason) -> None:
        self.action, self.reason, self.d_mul = Action.KEEP, reason, None


def matches(site: Site, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in site.names for glob in globs)


def decide(sites: Sequence[Site], options: Options) -> None:
    """Set every site's action, reason and D_mul.

    Raises:
        UsageError: a glob that matches no site, or D_mul below some site's K (all of them are named).
    """
    for option, globs in (("include", options.include), ("exclude", options.exclude)):
        for glob in globs:
            if glob != "*" and not any(matches(site, [glob]) for site in sites):
                known = ", ".join(f"'{site.name}'" for site in sites[:5])
                raise UsageError(
                    f"{option} '{glob}' matches no convolution; the model's are named {known or 'none'}, ..."
                )
    too_small = []
    for site in sites:
        if site.action is not Action.CONVERT or site.reason is not None:
            continue
        if not matches(site, options.include) or matches(site, options.exclude):
            site.keep(Reason.EXCLUDED)
        elif len(site.groups) > 1:
            site.keep(Reason.DIFFERENT_GROUPS)
        elif site.positions > 1 or options.pointwise:
            site.d_mul = resolve_d_mul(options.d_mul, site.positions)
            if site.d_mul < site.positions:
                too_small.append(site)
            elif site.d_parameters > options.max_d_params:
                site.keep(Reason.TOO_LARGE)
    if too_small:
        listed = "; ".join(
            f"'{site.name}': d_mul must be at least {site.positions} "
            f"({'x'.join(map(str, site.shape[2:]))} kernel), got {site.d_mul}"
            for site in too_small
        )
        raise UsageError(f"{listed}. Use `d_mul` K or more, or exclude these layers.")
    for site in sites:
        if site.reason is not None:
            logger.info("'%s' is kept: %s", site.name, site.reason.value)
