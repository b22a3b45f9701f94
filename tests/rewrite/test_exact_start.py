"""A converted model starts as exactly what it was, and its fold is exactly what it became."""

import copy

import pytest
import torch
from support import (
    SAMPLES,
    build_model,
    difference,
    equal,
    is_d,
    is_factor,
    random_state_untouched,
    randomize,
    randomize_and_calibrate,
    run,
    signature,
    varied_images,
)
from torch import Tensor, nn

from doconv_convert import fold, to_doconv
from doconv_convert.check.torch_runs.exact_start import require_same_start

ZOO = [
    "torchvision:resnet18",
    "torchvision:resnext50_32x4d",
    "torchvision:mobilenet_v2",
    "torchvision:shufflenet_v2_x1_0",
    "torchvision:convnext_tiny",
    "torchvision:squeezenet1_0",
    "torchvision:googlenet",
]
MODELS = [*ZOO, *SAMPLES]
OTHER_D_MULS = ("K+3", "2K")

# The weights' gradients go through one more matrix product with D = 0: the largest seen was 0.
GRADIENT_TOLERANCE = 1e-6
# Folded against unfolded in float64, over MODELS: the largest seen was 0.
FOLD_TOLERANCE = 1e-12
pytestmark = pytest.mark.usefixtures("both_arithmetics")
# How far randomized factors must move the output before a fold of it is evidence.
MOVED = 0.1


def images(source: str, batch: int = 2) -> Tensor:
    size = 8 if source == "digits" else 32 if source in SAMPLES else 64
    return varied_images(batch, 1 if source == "digits" else 3, size, size)


def train_once(model: nn.Module, x: Tensor, seed: int = 0) -> tuple[object, dict[str, Tensor], dict[str, Tensor]]:
    """Outputs, buffers and gradients of one training step of a fresh copy."""
    model = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        result = model(x)
    leaves = list(result) if isinstance(result, tuple) else [result]
    sum(leaf.square().mean() for leaf in leaves).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result, dict(model.named_buffers()), gradients


@pytest.mark.parametrize("source", MODELS)
def test_the_start_is_exact(source: str) -> None:
    original, x = build_model(source), images(source)
    with random_state_untouched():
        converted = to_doconv(original)
    assert any(is_d(name) for name, _ in converted.named_parameters())
    assert equal(run(converted, x), run(original, x))
    result, buffers, gradients = train_once(converted, x)
    expected, expected_buffers, expected_gradients = train_once(original, x)
    assert equal(result, expected)
    assert buffers.keys() == expected_buffers.keys()
    assert all(torch.equal(buffers[name], expected_buffers[name]) for name in buffers)
    assert {name for name in gradients if not is_factor(name)} == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert difference(gradients[name], gradient) <= GRADIENT_TOLERANCE, name
    assert any(gradients[name].any() for name in gradients if is_d(name))
    half, x = original.bfloat16(), x.bfloat16()
    assert equal(run(to_doconv(half), x), run(half, x))


@pytest.mark.parametrize("d_mul", OTHER_D_MULS)
@pytest.mark.parametrize("source", MODELS)
def test_the_start_is_exact_at_any_d_mul(source: str, d_mul: str) -> None:
    original, x = build_model(source), images(source)
    with random_state_untouched():
        converted = to_doconv(original, d_mul=d_mul)
    assert any(name.endswith("_extra") for name, _ in converted.named_parameters())
    assert equal(run(converted, x), run(original, x))
    assert equal(run(converted.train(), x), run(original.train(), x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d_mul", ["K", *OTHER_D_MULS])
def test_the_start_is_exact_in_every_dtype(dtype: torch.dtype, d_mul: str) -> None:
    original = build_model("grouped").to(dtype)
    x = images("grouped").to(dtype)
    converted = to_doconv(original, d_mul=d_mul)
    assert equal(run(converted, x), run(original, x))
    result, buffers, _ = train_once(converted, x)
    expected, expected_buffers, _ = train_once(original, x)
    assert equal(result, expected)
    assert all(torch.equal(buffers[name], expected_buffers[name]) for name in expected_buffers)


@pytest.mark.parametrize("source", MODELS)
def test_the_fold_is_exact(source: str) -> None:
    original, x = build_model(source).double(), images(source).double()
    expected_signature = signature(original)
    randomize_and_calibrate(original, x, seed=1)
    converted = to_doconv(original, d_mul="K+3")
    before = run(converted, x)
    assert difference(run(randomize(converted, seed=2), x), before) > MOVED
    randomize_and_calibrate(converted, x, seed=2)
    trained = run(converted, x)
    folded = fold(converted)
    assert signature(folded) == expected_signature
    assert difference(run(folded, x), trained) <= FOLD_TOLERANCE
    original.load_state_dict(folded.state_dict())
    assert difference(run(original, x), trained) <= FOLD_TOLERANCE


@pytest.mark.parametrize("source", ["torchvision:resnet18", *SAMPLES])
def test_a_plain_state_dict_loads_strictly(source: str) -> None:
    original, x = build_model(source), images(source)
    converted = randomize(to_doconv(original, d_mul="K+3"), seed=0)
    assert difference(run(converted, x), run(original, x)) > MOVED
    extra = {n: p.clone() for n, p in converted.named_parameters() if n.endswith("_extra")}
    converted.load_state_dict(original.state_dict())
    assert not any(p.any() for name, p in converted.named_parameters() if is_d(name))
    assert all(torch.equal(p, extra[n]) for n, p in converted.named_parameters() if n in extra)
    assert equal(run(converted, x), run(original, x))


def test_ranks_and_reruns_agree() -> None:
    first, second = (to_doconv(build_model("grouped"), d_mul="K+3").state_dict() for _ in range(2))
    other = to_doconv(build_model("grouped"), d_mul="K+3", seed=1).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["grouped.weight_extra"], other["grouped.weight_extra"])
    assert not torch.equal(first["dilated.weight_extra"], first["grouped.weight_extra"])
    assert float(first["grouped.weight_extra"].abs().max()) > 0


@pytest.mark.parametrize("inplace", [False, True])
def test_conversion_keeps_or_replaces_the_users_model(inplace: bool) -> None:
    original = build_model("residual")
    state = {key: t.clone() for key, t in original.state_dict().items()}
    converted = to_doconv(original, inplace=inplace)
    assert (converted is original) == inplace
    folded = fold(converted, inplace=inplace)
    assert (folded is converted) == inplace
    assert folded.state_dict().keys() == state.keys()
    assert inplace or original.state_dict().keys() == state.keys()


def test_channels_last_and_train_mode_survive() -> None:
    original = build_model("torchvision:mobilenet_v2").to(memory_format=torch.channels_last).train()
    converted = to_doconv(original)
    assert all(module.training for module in converted.modules())
    nchw = images("torchvision:mobilenet_v2")
    for x in (nchw, nchw.to(memory_format=torch.channels_last)):
        assert equal(run(converted, x), run(original, x))
    folded = fold(converted)
    strides = {name: p.stride() for name, p in original.named_parameters()}
    assert {name: p.stride() for name, p in folded.named_parameters()} == strides


def test_a_forward_that_changes_its_input_in_place_is_run_on_copies() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.mul_(2))

    net, x = InPlace(), torch.ones(1, 3, 8, 8)
    require_same_start(net, to_doconv(net, example_inputs=x), x)
    assert torch.equal(x, torch.ones_like(x))
