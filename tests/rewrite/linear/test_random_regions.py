"""Regions of random branches, and what a wrong merge would be: each fault is caught by the region's own check."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support_branches import RepVGG, UniRepLKNet, trained
from torch import Tensor, nn

from doconv_convert.rewrite.fold import fold_in_place
from doconv_convert.rewrite.linear import evaluate
from doconv_convert.rewrite.linear.affine import AffineConv
from doconv_convert.rewrite.linear.fx_steps import FxSteps
from doconv_convert.rewrite.linear.region_check import REGION_TOLERANCE, region_error
from doconv_convert.rewrite.linear.regions import find_regions
from doconv_convert.rewrite.tracing import trace

# In float64; the largest of 400 drawn regions is 4e-15.
EXACT = 1e-13


class Drawn(nn.Module):
    """A sum of branches, each a chain of convolutions (at most one of them spatial), batch norms and scales."""

    def __init__(self, branches: list[list[nn.Module]], signs: list[float]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*branch) for branch in branches)
        self.signs = signs

    def forward(self, x: Tensor) -> Tensor:
        total = self.signs[0] * self.branches[0](x)
        for sign, branch in zip(self.signs[1:], list(self.branches)[1:], strict=True):
            total = total + sign * branch(x)
        return torch.tanh(total)


@st.composite
def regions(draw: Any) -> Drawn:
    """Branches of equal stride whose outputs agree in size: K odd, padding K//2 times the dilation."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    stride, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    branches = []
    for _ in range(draw(st.integers(2, 4))):
        k, d = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 2))
        own = draw(st.sampled_from([g for g in (1, 2, 4) if g % groups == 0 or g == groups]))
        spatial = nn.Conv2d(8, 8, k, stride, d * (k - 1) // 2, d, own, bias=draw(st.booleans()))
        branch: list[nn.Module] = [spatial, nn.BatchNorm2d(8)]
        if draw(st.booleans()):
            branch += [nn.Conv2d(8, 8, 1, groups=own), nn.BatchNorm2d(8)]
        if draw(st.booleans()):
            branch = [nn.Conv2d(8, 8, 1, groups=own, bias=False), *branch]
        branches.append(branch)
    return Drawn(branches, [draw(st.sampled_from([1.0, -0.5])) for _ in branches])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(regions())
def test_a_drawn_region_is_one_exact_convolution_or_costs_more(model: Drawn) -> None:
    require_exact(model)


@pytest.mark.zoo
@settings(max_examples=40, deadline=None)
@given(regions())
def test_forty_more(model: Drawn) -> None:
    require_exact(model)


def require_exact(model: nn.Module) -> None:
    model = trained(model.double(), 1, (2, 8, 6, 7))
    x = torch.randn(2, 8, 13, 10, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        report = fold_in_place(copy.deepcopy(model), merge="branches")
        got = report.model(x)
    assert expected.std() > 0
    assert float((got - expected).abs().max()) < EXACT
    declined = {region.reason for region in report.left}
    assert report.merged or declined <= {
        "one convolution would cost more MACs",
        "one convolution would have more parameters",
    }
    before, after = (sum(isinstance(m, nn.Conv2d) for m in one.modules()) for one in (model, report.model))
    assert after < before or declined


def shifted_border(conv: AffineConv) -> AffineConv:
    return replace(conv, padding=tuple((before + 1, after - 1) for before, after in conv.padding))


def swapped(conv: AffineConv) -> AffineConv:
    return replace(conv, kernel=conv.kernel.swapaxes(2, 3))


def without_bias(conv: AffineConv) -> AffineConv:
    return replace(conv, bias=np.zeros_like(conv.bias))


def other_epsilon(conv: AffineConv) -> AffineConv:
    """As if a batch norm's epsilon were 1e-3: about what a wrong default does."""
    return replace(conv, kernel=conv.kernel / np.sqrt(1 + 1e-3))


def other_groups(conv: AffineConv) -> AffineConv:
    return replace(conv, kernel=np.roll(conv.kernel, conv.out_channels // max(2, conv.groups), axis=0))


def one_ulp(conv: AffineConv) -> AffineConv:
    kernel = conv.kernel.copy()
    kernel[0, 0, 0, 0] *= 1 + 1e-9
    return replace(conv, kernel=kernel)


FAULTS = [shifted_border, swapped, without_bias, other_epsilon, other_groups, one_ulp]


@pytest.mark.parametrize("block", [lambda: RepVGG(4), lambda: RepVGG(4, groups=2), lambda: UniRepLKNet(4)])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_wrong_merge_is_caught_by_the_regions_own_check(
    block: Callable[[], nn.Module], fault: Callable[[AffineConv], AffineConv]
) -> None:
    gm = trace(trained(block().double(), 2, (3, 4, 11, 12)), training=False)
    assert gm is not None
    reading = FxSteps(gm)
    (region,) = find_regions(reading.steps, "branches", evaluate.fits_torch).regions
    nodes = {node.name: node for node in gm.graph.nodes}
    inside, entry = [nodes[step.name] for step in region.steps], nodes[region.entry]
    right, sizes = region_error(reading, inside, entry, region)
    assert right < REGION_TOLERANCE / 100
    assert len(sizes) == 3
    wrong = replace(region, conv=fault(region.conv))
    if fault is shifted_border:  # no layer of torch has it: the formula itself shows the difference
        x = np.random.default_rng(0).standard_normal((1, 4, 14, 14))
        assert np.abs(wrong.conv(x) - region.conv(x)).max() > 0.01
        wrong = replace(wrong, conv=replace(region.conv, kernel=np.roll(region.conv.kernel, 1, axis=-1)))
    error, _ = region_error(reading, inside, entry, wrong)
    assert error > REGION_TOLERANCE


def test_a_branch_left_out_is_caught() -> None:
    gm = trace(trained(RepVGG(4).double(), 2, (3, 4, 11, 12)), training=False)
    assert gm is not None
    reading = FxSteps(gm)
    (region,) = find_regions(reading.steps, "branches", evaluate.fits_torch).regions
    nodes = {node.name: node for node in gm.graph.nodes}
    dense = [step for step in region.steps if step.name.startswith("dense")]
    wrong = replace(region, conv=evaluate.evaluate(dense, region.entry))
    error, _ = region_error(reading, [nodes[step.name] for step in region.steps], nodes[region.entry], wrong)
    assert error > 0.01
