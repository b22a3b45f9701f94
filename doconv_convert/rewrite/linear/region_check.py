"""A region's own check: its own forward against its one convolution, both in float64, borders included."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from doconv_convert.rewrite.fold_kernels import relative_distance
from doconv_convert.rewrite.linear.affine import AffineConv
from doconv_convert.rewrite.linear.evaluate import check_sizes
from doconv_convert.rewrite.linear.fx_steps import FxSteps, run_node
from doconv_convert.rewrite.linear.steps import LinearRegion

logger = logging.getLogger(__name__)

# Two float64 sums of at most a few ten thousand terms. The largest seen over ten of timm's families is 2e-15.
REGION_TOLERANCE = 1e-12

_CONVS: dict[tuple[int, bool], type[nn.Module]] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


def region_error(
    reading: FxSteps, nodes: Sequence[fx.Node], entry: fx.Node, region: LinearRegion
) -> tuple[float, tuple[tuple[int, ...], ...]]:
    """The largest relative difference between a region's own forward and its convolution, both in float64 on the CPU,
    and the spatial sizes of the inputs: the smallest, where all is border, and two larger ones, odd and even."""
    conv, sizes = region.conv, check_sizes(region)
    worst = 0.0 if sizes else float("inf")
    layer = layer_of(conv)
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        x = torch.randn(2, conv.in_channels, *size, generator=generator, dtype=torch.float64)
        try:
            with torch.no_grad():
                expected, got = _own_forward(reading, nodes, entry, x), layer(x)
        except Exception as error:  # whatever the model's own layers raise at a size that nobody gave them
            logger.debug("a region that ends in %s does not run on %s: %r", nodes[-1].name, size, error)
            return float("inf"), tuple(sizes)
        distance = relative_distance(got, expected) if got.shape == expected.shape else float("inf")
        worst = max(worst, distance) if distance == distance else float("inf")  # NaN
    return worst, tuple(sizes)


def _own_forward(reading: FxSteps, nodes: Sequence[fx.Node], entry: fx.Node, x: Tensor) -> Tensor:
    values: dict[fx.Node, Any] = {**reading.constants, entry: x.clone()}
    for node in nodes:
        values[node] = run_node(reading.gm, node, values)
    result: Tensor = values[nodes[-1]]
    return result


def layer_of(conv: AffineConv) -> nn.Module:
    """A torch layer in float64 that computes an affine convolution, whose padding torch can have."""
    kernel = torch.from_numpy(conv.kernel)
    arguments: dict[str, Any] = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}
    arguments["padding"] = tuple(before for before, _ in conv.padding)
    if conv.transposed:
        arguments["output_padding"] = tuple(before - after for before, after in conv.padding)
        kernel = kernel.reshape(conv.groups, -1, *kernel.shape[1:]).transpose(1, 2).flatten(0, 1)
    layer = _CONVS[conv.rank, conv.transposed](
        conv.in_channels,
        conv.out_channels,
        conv.size,
        **arguments,
        bias=bool(conv.bias.any()),
        dtype=torch.float64,
        device="meta",
    )
    layer._parameters["weight"] = nn.Parameter(kernel.contiguous())
    if layer.bias is not None:
        layer._parameters["bias"] = nn.Parameter(torch.from_numpy(conv.bias.copy()))
    return layer.eval()
