"""The lever's formula against a real first step, in float64."""

import copy

import pytest
import torch
from torch import Tensor, nn

from doconv_convert import lever, to_doconv
from doconv_convert.errors import UsageError

# The step's own second-order term, -lr^2 m (...), is relative to lr: measured below 1e-7 at lr = 1e-8.
RATE, FIRST_ORDER = 1e-8, 1e-6


def trained(groups: int, d_mul: int | str, moved: float) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.Tanh(), nn.Conv2d(8, 4, 3, groups=groups)).double()
    model = to_doconv(net, d_mul=d_mul)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("D"):
                parameter.normal_(std=moved)
    return model


def loss_of(model: nn.Module) -> Tensor:
    x = torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(1)).double()
    return model(x).square().mean()


def step(model: nn.Module, ratio: float) -> list[Tensor]:
    """How far one SGD step moves each kernel, over -lr."""
    model = copy.deepcopy(model)
    before = [model[index].weight.detach().clone() for index in (0, 2)]  # type: ignore[index]
    loss_of(model).backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            parameter -= RATE * (ratio if name.endswith("D") else 1.0) * parameter.grad
    return [(model[index].weight.detach() - k) / -RATE for index, k in zip((0, 2), before, strict=True)]  # type: ignore[index]


@pytest.mark.parametrize("moved", [0.0, 0.2])
@pytest.mark.parametrize("d_mul", ["K", "2K"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_is_what_d_adds_to_a_real_step(groups: int, d_mul: str, moved: float) -> None:
    """Dense, grouped and depthwise: the step with D less the step without, relative to the latter."""
    model = trained(groups, d_mul, moved)
    alone = step(model, 0.0)
    loss_of(model).backward()
    levers = list(lever(model).values())
    assert min(levers) > 1e-4, "nothing to compare"
    for ratio in (1.0, 10.0):
        added = [(both - w).norm() / w.norm() for both, w in zip(step(model, ratio), alone, strict=True)]
        assert [float(one) for one in added] == pytest.approx([ratio * one for one in levers], rel=FIRST_ORDER)


def test_at_d_zero_it_is_the_papers_product() -> None:
    """||W W^T G|| / ||G||, channel by channel, of a plain network's own gradient."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3)).double()
    loss_of(plain).backward()
    model = to_doconv(plain)
    model.zero_grad()
    loss_of(model).backward()
    for name, value in lever(model).items():
        conv = plain.get_submodule(name)
        w, g = (one.detach().flatten(2).transpose(0, 1) for one in (conv.weight, conv.weight.grad))  # type: ignore[union-attr, operator]
        assert value == pytest.approx(float((w @ w.transpose(1, 2) @ g).norm() / g.norm()), rel=1e-12)


def test_it_needs_converted_layers_and_gradients() -> None:
    with pytest.raises(UsageError, match="has no DO-Conv layer"):
        lever(nn.Conv2d(3, 3, 3))
    with pytest.raises(UsageError, match=r"after loss\.backward"):
        lever(to_doconv(nn.Conv2d(3, 3, 3)))
