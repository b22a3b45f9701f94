"""composition="auto": features where outputs are few, and what stays as it is."""

import copy
from typing import Any

import pytest
import torch
from support import difference, randomize
from torch import Tensor, nn

from doconv_convert import DOConv1d, DOConv2d, DOConv3d, UsageError, cached, fold, to_doconv
from doconv_convert.nn import layers

# Two float64 evaluations of one linear map, outputs and gradients: the largest seen was 4e-16.
TOLERANCE = 1e-12
# How far D must move the output before agreement is evidence.
MOVED = 0.1
CLASSES: dict[int, Any] = {1: DOConv1d, 2: DOConv2d, 3: DOConv3d}


@pytest.fixture
def by_features(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs whose features were composed."""
    taken: list[Tensor] = []
    compose = layers.convolve_features

    def spy(x: Tensor, *rest: Any) -> Tensor:
        taken.append(x)
        return compose(x, *rest)

    monkeypatch.setattr(layers, "convolve_features", spy)
    return taken


def pair(kernel: tuple[int, ...] = (3, 3), out_channels: int = 16, **options: Any) -> tuple[Any, Any]:
    """The same layer with "auto" and with "kernel", in training."""
    layer = CLASSES[len(kernel)](4, out_channels, kernel, composition="auto", dtype=torch.float64, **options)
    auto = randomize(layer, seed=3).train()
    plain: Any = copy.deepcopy(auto)
    plain.composition = "kernel"
    return auto, plain


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(layer: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]))


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 4, 4, 4)),
        ({}, (1, 4, 4, 4)),
        ({}, (4, 4, 4, 4)),
        ({"stride": 2, "padding": 1}, (2, 4, 4, 4)),
        ({"stride": 2, "padding": 1}, (2, 4, 5, 5)),
        ({"padding": "same", "dilation": 2}, (1, 4, 2, 4)),
        ({"padding": "valid"}, (2, 4, 4, 5)),
        ({"padding": (1, 0), "padding_mode": "circular"}, (2, 4, 2, 4)),
        ({"groups": 2, "d_mul": "K+3"}, (1, 4, 4, 4)),
        ({"groups": 2}, (2, 4, 4, 4)),
        ({"groups": 4, "out_channels": 64}, (2, 4, 4, 4)),
        ({"kernel": (3, 2), "bias": False}, (4, 3, 4)),
        ({"kernel": (3,), "padding": 1}, (2, 4, 4)),
        ({"kernel": (3,), "padding": 1}, (4, 9)),
        ({"kernel": (2, 2, 2), "d_mul": "2K"}, (1, 4, 3, 3, 3)),
        ({"kernel": (2, 2, 2)}, (1, 4, 3, 3, 4)),
    ],
)
def test_features_are_taken_where_outputs_are_half_of_the_rows_a_group_or_fewer(
    by_features: list[Tensor], options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    auto, plain = pair(**options)
    x = image(*shape)
    expected = plain(x)
    assert difference(plain._conv_forward(x, plain.weight_first_slots, plain.bias), expected) > MOVED
    assert not by_features
    result = auto(x)
    outputs = expected.numel() // auto.out_channels
    assert bool(by_features) == (outputs <= auto.out_channels // auto.groups / 2)
    assert result.is_contiguous()
    assert difference(result, expected) <= TOLERANCE
    for got, wanted in zip(gradients(auto, x), gradients(plain, x), strict=True):
        assert difference(got, wanted) <= TOLERANCE


def test_evaluation_and_cached_take_the_kernel_bit_for_bit(by_features: list[Tensor]) -> None:
    auto, plain = pair()
    x = image(1, 4, 4, 4)
    auto(x)
    assert len(by_features) == 1  # the control
    with cached(auto):
        assert torch.equal(auto(x), plain(x))
    assert torch.equal(auto.eval()(x), plain.eval()(x))
    assert len(by_features) == 1


def test_channels_last_stays(by_features: list[Tensor]) -> None:
    auto, _ = pair()
    x = image(2, 4, 4, 4).to(memory_format=torch.channels_last)
    assert auto(x).is_contiguous(memory_format=torch.channels_last)
    assert by_features


@pytest.mark.parametrize("batch", [0, 1])
def test_an_empty_batch_is_as_good_as_any(batch: int) -> None:
    auto, plain = pair()
    x = image(batch, 4, 4, 4)
    assert auto(x).shape == plain(x).shape


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.many = nn.Conv2d(3, 64, 3, stride=2), nn.Conv2d(64, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.many(self.wide(x).relu()).mean((2, 3))


def test_a_converted_model_trains_and_folds(by_features: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = to_doconv(Net(), composition="auto").double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = image(2, 3, 9, 9)
    losses = []
    for _ in range(5):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(by_features) == 5  # of 16 * 2 outputs and 64 rows; the other layer has 4 rows
    assert losses[-1] < 0.5 * losses[0]
    assert all(layer.D.any() for layer in (model.wide, model.many))
    plain = fold(model)
    assert type(plain.wide) is nn.Conv2d
    assert not hasattr(plain.wide, "composition")
    assert difference(plain.train()(x), model.train()(x)) <= TOLERANCE


def test_one_graph_where_it_is_compiled() -> None:
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = to_doconv(Net(), composition="auto")
    randomize(model, seed=0)
    fast = torch.compile(model, fullgraph=True, backend=count)
    x = image(2, 3, 9, 9).float()
    for _ in range(2):
        assert difference(fast(x), model(x)) < 1e-5
    assert len(graphs) == 1


def test_an_unknown_composition_is_refused_first() -> None:
    model = Net()
    with pytest.raises(UsageError, match="composition: got 'both', expected one of kernel, feature, auto"):
        to_doconv(model, composition="both", inplace=True)
    assert type(model.wide) is nn.Conv2d
