"""`cached`: every kernel once a scope, the same gradients, and every misuse refused."""

from unittest.mock import patch

import pytest
import torch
from support import randomize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from doconv_convert import DoconvError, cached, to_doconv
from doconv_convert.nn import composition, layers, overlay
from doconv_convert.nn.composition import compose_kernel

# Sums over the same products in another order; the largest difference seen is 5e-16 of the scale.
ROUNDING = 1e-12
pytestmark = pytest.mark.usefixtures("both_arithmetics")


class Repeated(nn.Module):
    """One layer called three times, one functional kernel called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.conv(x).tanh()
        for _ in range(2):
            x = nn.functional.conv2d(x, self.kernel, padding=1, groups=2).tanh()
        return x


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    converted = to_doconv(Repeated().double(), d_mul="K+3")
    randomize(converted, 0)
    return converted


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) <= ROUNDING * float(b.norm())


def test_same_outputs_and_gradients_with_one_composition_a_kernel(model: nn.Module, x: Tensor) -> None:
    expected = model(x)
    expected_gradients = gradients(model, expected.square().sum())
    with (
        patch.object(composition, "compose_kernel", wraps=compose_kernel) as once,
        patch.object(layers, "compose_kernel") as layer,
        patch.object(overlay, "compose_kernel") as other,
        cached(model),
    ):
        outputs = model(x)
        found = gradients(model, outputs.square().sum())
        assert once.call_count == 2
        layer.assert_not_called()
        other.assert_not_called()
    assert torch.equal(outputs, expected)
    assert all(close(a, b) for a, b in zip(found, expected_gradients, strict=True))


def test_nothing_is_cached_outside(model: nn.Module, x: Tensor) -> None:
    with cached(model), torch.no_grad():
        inside = model(x)
    randomize(model, 7)
    assert not torch.equal(model(x), inside)


def test_a_parameter_that_changes_inside_raises(model: nn.Module, x: Tensor) -> None:
    def step_inside() -> None:
        with cached(model):
            model(x)
            model.conv.D.data.add_(0.1)

    with pytest.raises(DoconvError, match=r"changed inside cached\(\) \('conv\.weight'"):
        step_inside()
    model(x)  # the scope is gone all the same


def test_a_scope_inside_a_scope_is_refused(model: nn.Module) -> None:
    with cached(model), pytest.raises(DoconvError, match="inside a cached"), cached(model):
        pass


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_forward_and_backward_inside(model: nn.Module, x: Tensor, reentrant: bool) -> None:
    single = to_doconv(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).double())
    randomize(single, 3)
    x.requires_grad_()
    single(x).square().sum().backward()
    expected = [p.grad.clone() for p in single.parameters()]
    single.zero_grad()
    with cached(single):
        checkpoint(single, x, use_reentrant=reentrant).square().sum().backward()
    assert all(close(p.grad, e) for p, e in zip(single.parameters(), expected, strict=True))


def test_checkpointed_forward_whose_backward_is_outside_is_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(DoconvError, match="Put the backward into the scope"), cached(model):
        checkpoint(model, x, use_reentrant=False)


def test_fsdp_models_are_refused(model: nn.Module) -> None:
    class FSDPModule:
        pass

    model.conv.__class__ = type("FSDPDOConv2d", (FSDPModule, type(model.conv)), {})
    with pytest.raises(DoconvError, match="'conv' is wrapped by fully_shard"), cached(model):
        pass
