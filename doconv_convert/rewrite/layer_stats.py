"""What training made of each over-parameterized kernel: which layers used the freedom that D gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from doconv_convert.nn.composition import kind_of
from doconv_convert.nn.layers import fold_kernel, to_float64_cpu
from doconv_convert.rewrite.discover import discover
from doconv_convert.rewrite.fold_kernels import Factors, relative_distance
from doconv_convert.rewrite.foreign.authors import AuthorsSite, authors_sites, folded_authors_kernel
from doconv_convert.rewrite.passes import kernel_factors
from doconv_convert.rewrite.plan import PlanRow, as_plan


@dataclass(frozen=True)
class Layer:
    """One convolution. `macs` are one sample's, of all calls; None where no forward was run. `d_mul` and what follows
    from D are None where the kernel has none.

    `d_moved` is ||D^ - [I|0]|| / ||[I|0]||, how far D^ left the identity that it started from (Frobenius norms over
    all channels; the second is sqrt(C_in K)). `kernel_changed` is ||k - W|| / ||W||, with k the composed kernel and W
    the kernel that the same weights give at D^ = [I|0].
    """

    name: str
    kind: str
    kernel: list[int]
    groups: int
    d_mul: int | None = None
    added_parameters: int = 0
    macs: int | None = None
    d_moved: float | None = None
    kernel_changed: float | None = None


def planned_layers(rows: list[PlanRow], samples: int) -> list[Layer]:
    """The convolutions of a plan that was made on `samples` samples."""
    return [
        Layer(
            row.name,
            row.kind,
            row.kernel,
            row.groups,
            row.d_mul,
            row.added_parameters,
            None if row.macs is None else row.macs // samples,
        )
        for row in rows
    ]


def trained_layers(trained: nn.Module, folded: nn.Module, example_inputs: Any = None, samples: int = 1) -> list[Layer]:
    """Every convolution of the plain model `folded`, with what training did to its D in `trained`; neither is changed.

    `example_inputs`, which hold `samples` samples, give the MACs. Kernels with a D that only a run would find come
    last where there are no example inputs.
    """
    moved = {layer.name: layer for layer in _moved_layers(trained)}
    layers = []
    rows = as_plan(discover(folded, example_inputs)).rows
    for row, layer in zip(rows, planned_layers(rows, samples), strict=True):
        found = next((moved.pop(name) for name in (row.name, *row.aliases) if name in moved), None)
        untouched = replace(layer, d_mul=None, added_parameters=0)  # not what converting it again would add
        layers.append(untouched if found is None else replace(found, macs=layer.macs))
    return [*layers, *moved.values()]


def _moved_layers(trained: nn.Module) -> Iterator[Layer]:
    for factors in kernel_factors(trained):
        yield moved_layer(factors)
    for site in authors_sites(trained):
        yield _moved_site(site)


def moved_layer(factors: Factors) -> Layer:
    """One kernel of ours, in float64 on the CPU."""
    weight, d, extra = factors.weight, factors.d, factors.extra
    composed = fold_kernel(weight, d, extra, factors.groups)
    start = to_float64_cpu(weight)
    added = d.numel() + (0 if extra is None else extra.numel())
    identity = math.sqrt(d.shape[0] * d.shape[1])
    return _layer(factors.name, weight.shape, d, factors.groups, added, identity, relative_distance(composed, start))


def _moved_site(site: AuthorsSite) -> Layer:
    """One kernel that the authors' formula composes, with the identity that its file stores."""
    w, foreign = site.factors
    shape = (*w.shape[:2], *foreign.size)
    groups = int(getattr(site.module, "groups", 1))
    if foreign.D is None or foreign.identity is None:
        return Layer(site.name, kind_of(w.shape[1] * groups, groups), list(foreign.size), groups)
    composed, start = (
        folded_authors_kernel(site.name, w, d, foreign.identity, foreign.mul)
        for d in (foreign.D, torch.zeros_like(foreign.D))
    )
    identity = float(foreign.identity.double().norm())
    changed = relative_distance(composed, start)
    return _layer(site.name, shape, foreign.D, groups, foreign.D.numel(), identity, changed)


def _layer(
    name: str, shape: tuple[int, ...], d: Tensor, groups: int, added: int, identity: float, changed: float
) -> Layer:
    return Layer(
        name,
        kind_of(d.shape[0], groups),
        list(shape[2:]),
        groups,
        int(d.shape[2]),
        added,
        d_moved=float(d.detach().double().norm()) / identity,
        kernel_changed=changed,
    )
