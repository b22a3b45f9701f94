"""`cached` on real models whose layers run many times in one forward."""

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torchvision
from support import difference, randomize
from torch import Tensor, nn
from torchvision.models.optical_flow import raft

from doconv_convert import cached, to_doconv
from doconv_convert.nn import composition, layers, overlay
from doconv_convert.nn.composition import compose_kernel
from doconv_convert.nn.overlay import stored_kernels

# The same sums in another order; the largest difference seen is 8e-16.
ROUNDING = 1e-12


def retinanet() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    build = torchvision.models.detection.retinanet_resnet50_fpn
    model = build(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)
    image = torch.rand(3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]], dtype=torch.float64), "labels": torch.tensor([1])}
    return model, lambda model: sum(model([image], [target]).values())


def raft_small() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    model = torchvision.models.optical_flow.raft_small(weights=None)
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(2, 1, 3, 128, 128, dtype=torch.float64, generator=generator) * 2 - 1
    return model, lambda model: torch.stack([flow.abs().mean() for flow in model(*frames)]).sum()


def grid_in_float64(*arguments: Any, **keywords: Any) -> Tensor:
    return _grid(*arguments, **keywords).double()


_grid = raft.make_coords_grid


# Of the over-parameterized layers, RetinaNet's two heads have 10 and run on 5 levels; RAFT's update block has 8 and
# runs 12 times.
@pytest.mark.parametrize(("make", "repeated"), [(retinanet, 10 * (5 - 1)), (raft_small, 8 * (12 - 1))])
def test_every_kernel_once_a_forward_and_the_same_gradients(
    make: Callable[[], Any], repeated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raft, "make_coords_grid", grid_in_float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, loss_of = make()
    model = to_doconv(model.double(), inplace=True).train()
    randomize(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".D"):
                parameter.mul_(0.1)
    kernels = sum(len(stored_kernels(module)) for module in model.modules())
    other = copy.deepcopy(model)

    with patch.object(layers, "compose_kernel", wraps=compose_kernel) as each:
        loss = loss_of(model)
        loss.backward()
        calls = each.call_count
    with (
        patch.object(composition, "compose_kernel", wraps=compose_kernel) as once,
        patch.object(layers, "compose_kernel") as layer,
        patch.object(overlay, "compose_kernel") as overlaid,
        cached(other),
    ):
        assert once.call_count == kernels
        cached_loss = loss_of(other)
        cached_loss.backward()
        assert once.call_count == kernels
        layer.assert_not_called()
        overlaid.assert_not_called()
    assert calls - kernels == repeated
    assert torch.equal(cached_loss, loss)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        if a.grad is None or b.grad is None:
            assert a.grad is b.grad, name
        else:
            assert difference(b.grad, a.grad) < ROUNDING, name
