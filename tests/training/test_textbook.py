"""Our layer against a textbook one: DESIGN §1's formula, with the identity added and nothing clever."""

import pytest
import torch
from support import difference
from torch import Tensor, nn
from torch.nn import functional as F

from doconv_convert import DOConv2d

STEPS = 50
# The same products summed in another order, carried through 50 steps; the largest difference seen is 2e-15.
TOLERANCE = 1e-10


class Textbook(nn.Module):
    """k[o, j, p] = sum_s (I + D)[c, p, s] * W[o, j, s], where c is the input channel that slot j of output o reads."""

    def __init__(self, w: Tensor, d: Tensor, bias: Tensor, kernel_size: tuple[int, int], groups: int) -> None:
        super().__init__()
        self.w, self.d, self.bias = (nn.Parameter(t.detach().clone()) for t in (w, d, bias))
        self.kernel_size, self.groups = kernel_size, groups

    def forward(self, x: Tensor) -> Tensor:
        outputs, inputs_per_group, _ = self.w.shape
        o, j = torch.arange(outputs)[:, None], torch.arange(inputs_per_group)
        channel = o // (outputs // self.groups) * inputs_per_group + j
        d_hat = torch.eye(*self.d.shape[1:], dtype=self.d.dtype) + self.d
        kernel = torch.einsum("ojps,ojs->ojp", d_hat[channel], self.w)
        return F.conv2d(
            x, kernel.reshape(outputs, -1, *self.kernel_size), self.bias, padding="same", groups=self.groups
        )


def slots(layer: DOConv2d) -> Tensor:
    """W with all its slots."""
    first = layer.weight_first_slots.flatten(2)
    return first if layer.weight_extra is None else torch.cat([first, layer.weight_extra], 2)


def curve(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("composition", ["kernel", "feature"])
@pytest.mark.parametrize("d_mul", ["K", "K+3", "2K"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_same_loss_curve(groups: int, d_mul: str, composition: str) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = DOConv2d(4, 8, (3, 5), padding="same", groups=groups, d_mul=d_mul, composition=composition).double()
    assert ours.D is not None
    assert ours.bias is not None
    textbook = Textbook(slots(ours), ours.D, ours.bias, (3, 5), groups)
    x, target = (torch.randn(4, n, 6, 6, dtype=torch.float64, generator=generator) for n in (4, 8))
    start = textbook.w.detach().clone()
    losses, expected = curve(ours, x, target), curve(textbook, x, target)
    assert losses[-1] < losses[0] - 0.01
    assert ours.D.abs().max() > 0.01
    assert difference(textbook.w, start) > 0.01
    assert (losses - expected).abs().max() < TOLERANCE
    assert difference(slots(ours), textbook.w) < TOLERANCE
    assert difference(ours.D, textbook.d) < TOLERANCE
