"""timm's own layers that a search by type gets wrong."""

from typing import Any

import pytest
import torch
from support import difference, equal, randomize, run, signature, varied_images
from torch import Tensor, nn

from doconv_convert import fold, plan, to_doconv
from doconv_convert.rewrite.sites import Reason

layers = pytest.importorskip("timm.layers")

MOVED = 0.1
# float64, folded against unfolded: the largest seen was 0, one composition in both.
TOLERANCE = 1e-12
CONVERT = "convert"


class Routed(nn.Module):
    """CondConv's kernels depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cond = nn.Conv2d(3, 4, 3), layers.CondConv2d(4, 4, 3, num_experts=2)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.cond(x, torch.sigmoid(x.mean((2, 3))[:, :2]))


def efficient() -> nn.Module:
    """A TensorFlow-style inverted residual: static sizes are unknown, so padding is computed in the forward."""
    return nn.Sequential(
        layers.Conv2dSame(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        layers.Conv2dSame(8, 8, 5, stride=2, groups=8),
        layers.create_conv2d(8, 4, 1, padding="same"),
    )


NETS = {
    "Conv2dSame": (efficient, {"0": CONVERT, "3": CONVERT, "4": CONVERT}),
    "StdConv2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), layers.StdConv2d(4, 4, 3)),
        {"0": CONVERT, "1": CONVERT},
    ),
    "StdConv2dSame": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), layers.StdConv2dSame(4, 4, 3, 2)),
        {"0": CONVERT, "1": CONVERT},
    ),
    "ScaledStdConv2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), layers.ScaledStdConv2d(4, 4, 3)),
        {"0": CONVERT, "1": CONVERT},
    ),
    "CondConv2d": (Routed, {"stem": CONVERT, "cond": Reason.INPUT_DEPENDENT.value}),
    "BlurPool2d": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), layers.BlurPool2d(4)),
        {"0": CONVERT, "1.filt": Reason.BLUR_FILTER.value},
    ),
    "MixedConv2d": (
        lambda: nn.Sequential(layers.MixedConv2d(3, 8, [3, 5], depthwise=False), layers.MixedConv2d(8, 8, [3, 5])),
        {"0.0": CONVERT, "0.1": CONVERT, "1.0": CONVERT, "1.1": CONVERT},
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_timm_layers(name: str) -> None:
    make, expected = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = make().double().eval()
    x = varied_images(2, 3, 15, 15).double()
    rows = {row.name: row.reason or row.action for row in plan(original, (x,)).rows}
    assert rows == expected
    for example_inputs in (None, (x,)):
        converted = to_doconv(original, example_inputs=example_inputs, d_mul="K+3")
        assert equal(run(converted, x), run(original, x))
        moved = run(randomize(converted, seed=0), x)
        assert difference(moved, run(original, x)) > MOVED
        folded = fold(converted)
        assert difference(run(folded, x), moved) <= TOLERANCE
        assert signature(folded) == signature(original)
