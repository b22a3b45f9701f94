"""Other people's counters see a converted layer as the convolution that it is."""

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from doconv_convert import DOConv2d, fold, kernel_macs, to_doconv

IMAGE = torch.zeros(1, 3, 32, 32)
# Of D for the two layers with one: kernel composition, D_mul K C_in C_out / g.
COMPOSING = sum(
    kernel_macs(in_channels=c_in, out_channels=16, kernel_positions=9, d_mul=9, groups=groups, output_volume=0)
    for c_in, groups in ((3, 1), (16, 4))
)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 8, 1)
    ).eval()


def test_counters_that_look_up_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """As thop and ptflops do: a table by type, asked in `model.apply`."""
    rule = object()
    module: Any = types.ModuleType("thop.profile")
    module.register_hooks = {nn.Conv2d: rule}
    monkeypatch.setitem(sys.modules, "thop.profile", module)
    found = []
    model = to_doconv(net())
    model.apply(lambda layer: found.append((type(layer), module.register_hooks.get(type(layer)))))
    assert [entry for entry in found if entry[0] is DOConv2d] == [(DOConv2d, rule)] * 3


def test_thop() -> None:
    thop = pytest.importorskip("thop")
    plain, converted = (thop.profile(model, (IMAGE,), verbose=False)[0] for model in (net(), to_doconv(net())))
    assert converted == plain > 0


def test_ptflops() -> None:
    ptflops = pytest.importorskip("ptflops")
    options = {"as_strings": False, "print_per_layer_stat": False, "verbose": False, "backend": "pytorch"}
    plain, converted = (
        ptflops.get_model_complexity_info(model, (3, 32, 32), **options)[0] for model in (net(), to_doconv(net()))
    )
    assert converted == plain > 0


def test_torchinfo() -> None:
    torchinfo = pytest.importorskip("torchinfo")
    plain, converted = (
        torchinfo.summary(model, input_data=IMAGE, verbose=0).total_mult_adds for model in (net(), to_doconv(net()))
    )
    assert converted == plain > 0


def test_fvcore() -> None:
    """It counts the composition too, under its own operator."""
    fvcore = pytest.importorskip("fvcore.nn")
    counts = []
    for model in (net(), to_doconv(net())):
        analysis = fvcore.FlopCountAnalysis(model, IMAGE).unsupported_ops_warnings(False)
        counts.append(analysis.by_operator())
    plain, converted = counts
    assert converted["conv"] == plain["conv"] > 0
    assert converted["bmm"] == COMPOSING


def test_torchs_own() -> None:
    counts = []
    converted = to_doconv(net())
    for model in (net(), converted, fold(converted)):
        with FlopCounterMode(display=False) as counter:
            model(IMAGE)
        counts.append(counter.get_total_flops())
    assert counts[1] == counts[0] + 2 * COMPOSING
    assert counts[2] == counts[0]
