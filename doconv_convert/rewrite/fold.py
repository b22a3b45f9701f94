"""`fold`: from over-parameterized layers, ours and other people's, back to the plain model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from doconv_convert.errors import UsageError
from doconv_convert.nn.factors import refuse_shards
from doconv_convert.rewrite.convert import copy_model
from doconv_convert.rewrite.fold_kernels import Rounding
from doconv_convert.rewrite.foreign.authors import authors_sites, fold_authors
from doconv_convert.rewrite.foreign.by_graph import Foreign, find_foreign, replace_foreign
from doconv_convert.rewrite.linear.merge import (
    LeftRegion,
    MergedRegion,
    find_in_model,
    merge_in_place,
)
from doconv_convert.rewrite.linear.steps import MERGES, Merge
from doconv_convert.rewrite.linear.wide import in_float64
from doconv_convert.rewrite.passes import check_kernels, fold_kernels, kernel_factors
from doconv_convert.words import counted

logger = logging.getLogger(__name__)

NO_D_TRAINED = "No D was trained: every D is exactly zero. Was the optimizer built before the conversion?"


@dataclass
class FoldReport:
    """The folded model, the names of the kernels composed in it, ours and those told by a file's keys (each passed the
    per-site check), how ours were rounded, foreign layers folded by graph, what the user should know, and the linear
    regions that were merged and left."""

    model: nn.Module
    folded: list[str] = field(default_factory=list)
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    foreign: list[Foreign] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    merged: list[MergedRegion] = field(default_factory=list)
    left: list[LeftRegion] = field(default_factory=list)

    @property
    def by_graph(self) -> list[str]:
        """The foreign layers that became plain convolutions."""
        return [one.name for one in self.foreign if one.conv is not None]


def fold(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    constant_kernels: bool = False,
    merge: Merge = "none",
    inplace: bool = False,
) -> nn.Module:
    """Fold every DO-Conv layer of `model` into an ordinary convolution (k = D^ W, arXiv 2006.12030).

    Kernels are composed in float64 on the CPU, checked by feature composition to 1e-12, and rounded correctly: in a
    float32 model every weight is the float32 number nearest to the exact product of D^ and W. A layer
    of another implementation, recognized by its traced graph and not by its names, becomes a plain convolution
    where its kernel is a pure function of its parameters. Folding a plain model changes nothing.

    With `merge`, linear regions (the branches of a RepVGG block, a convolution with its batch norm) become one
    convolution each, which is checked against the region's own forward in float64. The module that encloses them
    becomes a GraphModule for inference.

    Args:
        model: any nn.Module.
        example_inputs: not needed; accepted so that calls mirror `to_doconv`'s.
        constant_kernels: fold Conv subclasses and parametrized kernels (weight norm, standardization) too.
        merge: "none"; "branches", regions of several convolutions or parallel paths; "all", batch norms behind one
            convolution too.
        inplace: fold `model` itself instead of a copy.

    Returns:
        The folded model: classes, keys, order, shapes and dtypes of the original, except where regions were merged.

    Raises:
        UsageError: a `merge` of another name.
        DoconvError: a kernel that is not finite, or a model that FSDP2 shards; nothing was changed then.

    >>> import torch
    >>> from doconv_convert import to_doconv
    >>> training = to_doconv(nn.Sequential(nn.Conv2d(3, 8, 3)))
    >>> _ = nn.init.normal_(training[0].D, std=0.1)  # in place of a training
    >>> shipped = fold(training)
    >>> type(shipped[0]).__name__, torch.allclose(shipped[0].weight, training[0].effective_kernel())
    ('Conv2d', True)
    """
    refuse_shards(model, "save it with torch.distributed.checkpoint and fold that folder")
    require_merge(merge)
    model = model if inplace else copy_model(model)
    report = fold_in_place(model, constant_kernels=constant_kernels, check_first=inplace, merge=merge)
    for note in report.notes:
        logger.warning(note)
    if merge != "none" or logger.isEnabledFor(logging.INFO):  # to look for regions takes traces
        for note in merge_notes(report, merge):
            logger.info(note)
    return report.model


def require_merge(merge: str) -> None:
    if merge not in MERGES:
        raise UsageError(f"`merge`: got '{merge}', expected one of {', '.join(map(repr, MERGES))}.")


def fold_in_place(
    model: nn.Module, *, constant_kernels: bool = False, check_first: bool = True, merge: Merge = "none"
) -> FoldReport:
    """Fold `model` itself. `check_first` composes every kernel once more up front, so that an error leaves the
    model untouched; a caller who throws the model away on an error saves that."""
    if merge == "none":
        return _fold_kernels_in_place(model, constant_kernels, check_first)
    if check_first:
        check_kernels(model)
    with in_float64(model) as widened:  # what is merged is rounded once, at its end
        report = _fold_kernels_in_place(model, constant_kernels, check_first=False)
        merged = merge_in_place(report.model, merge)
        report.model, report.merged, report.left = merged.model, merged.merged, merged.declined
        widened.model = report.model
    return report


def merge_notes(report: FoldReport, merge: Merge) -> tuple[str, ...]:
    """What the user should know of the linear regions: how many "none" left, how many were declined."""
    if merge == "none":
        regions = find_in_model(report.model)
        convolutions = sum(region.count("convolution") for region in regions)
        if not regions:
            return ()
        found = f"{counted(len(regions), 'linear region')} with {counted(convolutions, 'convolution')}"
        return (f"left as they are: {found}; `merge` branches makes one convolution of each",)
    reasons = Counter(region.reason for region in report.left)
    return tuple(f"{counted(count, 'linear region')} left: {reason}" for reason, count in sorted(reasons.items()))


def _fold_kernels_in_place(model: nn.Module, constant_kernels: bool, check_first: bool) -> FoldReport:
    every_d = _every_d(model)
    units = fold_authors(model)
    foreign = find_foreign(model, constant_kernels)
    rounding, _ = fold_kernels(model, check_first)
    replace_foreign(model, foreign)
    root = next((one.conv for one in foreign if one.name == "" and one.conv is not None), model)
    return FoldReport(root, [*units, *rounding], rounding, foreign, untrained_notes(every_d))


def untrained_notes(every_d: Sequence[Tensor]) -> tuple[str, ...]:
    """A sentence for the user where there are Ds and each is exactly zero: a fact, not an error."""
    return (NO_D_TRAINED,) if every_d and not any(bool(d.any()) for d in every_d) else ()


def _every_d(model: nn.Module) -> list[Tensor]:
    authors = (site.factors[1].D for site in authors_sites(model))
    return [*(factors.d for factors in kernel_factors(model)), *(d for d in authors if d is not None)]
