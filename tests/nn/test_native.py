"""product.c's arithmetic: against torch's own operations, at the edges of memory, on any number of threads."""

import platform
import shutil
import sys
from typing import Any

import pytest
import torch
from support_native import PROCESSORS, REAL, at_the_end_of_memory, count_calls, drawn
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from doconv_convert import DOConv2d
from doconv_convert.nn import native, product
from doconv_convert.nn.composition import compose_kernel

# Against float64, of the largest number; seen at most 4e-7 and 6e-16.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 3e-15}

# (C_out, C_in, groups, kernel): whole blocks of rows, leftovers, one row, rows shorter than a vector, every grouping.
SHAPES = [
    (64, 48, 1, (3, 3)),
    (64, 3, 1, (3, 3)),
    (17, 5, 1, (3, 3)),
    (1, 1, 1, (4, 4)),
    (1, 5, 1, (3, 3)),
    (2, 2, 1, (3, 3)),
    (9, 70, 1, (2, 2)),
    (9, 70, 1, (4, 4)),
    (3, 65, 1, (1, 2)),
    (16, 8, 1, (3,)),
    (8, 6, 1, (2, 2, 3)),
    (64, 64, 32, (3, 3)),
    (24, 12, 4, (1, 3)),
    (30, 33, 3, (5, 1)),
    (16, 8, 8, (3, 3)),
    (8, 8, 8, (3, 3)),
    (6, 6, 6, (5, 5)),
    (5, 5, 5, (7, 7)),
    (4, 4, 4, (9, 9)),
    (120, 120, 120, (7, 7)),  # D's gradient goes past the caches
    (40, 40, 40, (9, 9)),  # it would, but for a channel's matrix
    (3, 3, 3, (2,)),
]


def test_built_where_there_is_a_compiler() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("cc") or not PROCESSORS:
        pytest.skip("hatch_build.py builds nothing here")
    assert set(native.LIBRARIES) == set(REAL), "pip install -e . builds product.c"


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_product_and_gradients(processor: str, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    weight, d, gradient, groups = drawn(shape, dtype)
    assert native.is_supported(d, groups, weight)
    exact = [tensor.double() for tensor in (weight, d, gradient)]
    kernel = product.by_torch(exact[0], exact[0], exact[1], groups)
    assert (kernel - exact[0]).abs().max() > 0.1
    expected = kernel, *product.differentiated(exact[2], exact[0], exact[1], groups)
    got = native.compose(weight, d, groups), *native.differentiate(gradient, weight, d, groups)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == dtype
        assert float((one - other).abs().max() / other.abs().max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_beyond_a_tensor_is_touched(processor: str, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Every tensor ends where the process's memory does: a number further would be a crash."""
    weight, d, gradient, groups = drawn(shape, dtype)
    library, depthwise = native.LIBRARIES[dtype], weight.shape[0] == groups == d.shape[0]
    sizes = d.shape[:2] if depthwise else (groups, weight.shape[0] // groups, weight.shape[1], d.shape[1])
    w, matrices, g, kernel, for_w = (at_the_end_of_memory(each) for each in (weight, d, gradient, weight, weight))
    for_d, transposed = at_the_end_of_memory(d), at_the_end_of_memory(d)
    sums = at_the_end_of_memory(d.new_empty(*d.shape[:2], native.LANES))
    suffix, room, more = ("_depthwise", [], []) if depthwise else ("", [transposed], [sums])
    compose, differentiate = (getattr(library, name + suffix) for name in ("compose", "differentiate"))
    compose(*(tensor.data_ptr() for tensor in (w, matrices, kernel, *room)), *sizes, 2)
    differentiate(*(tensor.data_ptr() for tensor in (g, w, matrices, for_w, for_d, *more)), *sizes, 2)
    expected = native.compose(weight, d, groups), *native.differentiate(gradient, weight, d, groups)
    assert all(torch.equal(one, other) for one, other in zip((kernel, for_w, for_d), expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_number_of_threads_changes_no_bit(processor: str, shape: tuple[Any, ...]) -> None:
    weight, d, gradient, groups = drawn(shape, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append([native.compose(weight, d, groups), *native.differentiate(gradient, weight, d, groups)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for each in results for one, other in zip(each, results[0], strict=True))


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_zero_d_changes_nothing(processor: str, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    weight, d, _, groups = drawn(shape, dtype)
    weight.view(-1)[::3] *= torch.finfo(dtype).max / 8
    weight.view(-1)[::5] *= torch.finfo(dtype).tiny
    assert torch.equal(native.compose(weight, torch.zeros_like(d), groups), weight)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] * len(s[3]) < 30], ids=str)
def test_gradients_of_gradients(processor: str, shape: tuple[Any, ...]) -> None:
    weight, d, _, groups = drawn(shape)
    weight, d = weight[:, :4].clone().requires_grad_(), d[: 4 * groups].clone().requires_grad_()
    few = [tensor for tensor in (weight, d) if tensor.numel() < 400]

    def kernel(*given: Tensor) -> Tensor:
        w, matrices = (next((g for g, f in zip(given, few, strict=True) if f is t), t) for t in (weight, d))
        return compose_kernel(w, matrices, None, groups)

    assert few
    assert gradcheck(kernel, few)
    assert gradgradcheck(kernel, few)


@pytest.mark.parametrize("frozen", ["weight", "D"])
def test_a_frozen_factor_gets_no_gradient(processor: str, frozen: str) -> None:
    layer = DOConv2d(8, 16, 3, bias=False)
    factors = dict(layer.named_parameters())
    factors[frozen].requires_grad_(False)
    layer.effective_kernel().square().sum().backward()
    other = factors["D" if frozen == "weight" else "weight"]
    assert factors[frozen].grad is None
    assert other.grad is not None
    assert other.grad.abs().max() > 0


@pytest.mark.parametrize("how", ["bfloat16", "float16", "channels_last", "autocast"])
def test_a_training_step_is_that_of_torch(processor: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = [count_calls(name, monkeypatch) for name in ("compose", "differentiate")]
    torch.manual_seed(0)
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(how, torch.float32)
    layer = DOConv2d(24, 32, 3, padding=1)
    nn.init.normal_(layer.D, std=0.1)
    layer = layer.to(dtype)
    x = torch.randn(2, 24, 6, 6, dtype=dtype)
    if how == "channels_last":
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)

    def step() -> list[Tensor]:
        layer.zero_grad()
        with torch.autocast("cpu", enabled=how == "autocast"):
            y = layer(x)
        y.float().square().mean().backward()
        assert layer.effective_kernel().stride() == layer.weight.stride()
        return [y.detach(), layer.weight_first_slots.grad, layer.D.grad]

    got = step()
    assert all(called)
    monkeypatch.setattr(native, "LIBRARIES", {})
    expected = step()
    unit = torch.finfo(y.dtype if (y := got[0]).dtype != torch.float32 else dtype).eps
    for one, other in zip(got, expected, strict=True):
        # The largest seen: 1.0 units of the dtype (bfloat16), 3.2 of float32.
        assert float((one - other).abs().max() / other.abs().max()) <= 8 * unit
        assert one.abs().max() > 0
