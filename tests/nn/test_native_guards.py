"""Where product.c must not be used: whoever follows torch's operations still sees them, and what does not fit is
torch's error."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support_native import count_calls, drawn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from doconv_convert.nn import native
from doconv_convert.nn.composition import compose_kernel


def jvp(weight: Tensor, d: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, weight), forward_ad.make_dual(d, d)
        return forward_ad.unpack_dual(compose_kernel(*dual)).tangent


def counted(weight: Tensor, d: Tensor) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        kernel = compose_kernel(weight, d)
    assert counter.get_total_flops() > 0
    return kernel


# Whoever follows torch's operations: the kernel, or what is made of it, as torch's operations alone give it.
FOLLOWERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch.compile": lambda w, d: torch.compile(compose_kernel, backend="eager", fullgraph=True)(w, d),
    "torch.export": lambda w, d: torch.export.export(Composed(), (w, d)).module()(w, d),
    "torch.jit.trace": lambda w, d: torch.jit.trace(Composed(), (w, d), check_trace=False)(2 * w, d),
    "make_fx": lambda w, d: make_fx(Composed())(w, d)(2 * w, d),
    "FlopCounterMode": counted,
    "vmap": lambda w, d: torch.vmap(compose_kernel)(w[None], d[None])[0],
    "vmap of grad": lambda w, d: torch.vmap(torch.func.grad(lambda a, b: compose_kernel(a, b).square().sum()))(
        w[None], d[None]
    )[0],
    "torch.func.jvp": lambda w, d: torch.func.jvp(compose_kernel, (w, d), (w, d))[1],
    "forward-mode gradients": jvp,
}


class Composed(nn.Module):
    def forward(self, weight: Tensor, d: Tensor) -> Tensor:
        return compose_kernel(weight, d)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", FOLLOWERS)
def test_followers_see_torch_operations(processor: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, d, _, _ = drawn((8, 6, 1, (3, 3)), torch.float32)
    with monkeypatch.context() as without:
        without.setattr(native, "LIBRARIES", {})
        expected = FOLLOWERS[name](weight, d)

    def seen(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("product.c was called")

    monkeypatch.setattr(native, "compose", seen)
    with pytest.raises(RuntimeError, match=r"product\.c was called"):
        compose_kernel(weight, d)
    assert torch.equal(FOLLOWERS[name](weight, d), expected)


def backward_under(weight: Tensor, d: Tensor, gradient: Tensor, follow: Callable[[Callable[..., Any]], Any]) -> Any:
    """The gradients that `follow` gets from a backward whose forward nobody followed."""
    factors = weight.clone().requires_grad_(), d.clone().requires_grad_()
    kernel = compose_kernel(*factors)
    return follow(lambda g: torch.autograd.grad(kernel, factors, g))


def flops_of(backward: Callable[..., Any], gradient: Tensor) -> Any:
    with FlopCounterMode(display=False) as counter:
        result = backward(gradient)
    assert counter.get_total_flops() > 0
    return result


def dual(backward: Callable[..., Any], gradient: Tensor) -> Any:
    with forward_ad.dual_level():
        result = backward(forward_ad.make_dual(gradient, 2 * gradient))
        return [forward_ad.unpack_dual(each).tangent for each in result]


BACKWARD_FOLLOWERS: dict[str, Callable[[Callable[..., Any], Tensor], Any]] = {
    "FlopCounterMode": flops_of,
    "make_fx": lambda backward, g: make_fx(backward)(g)(2 * g),
    "forward-mode gradients": dual,
    "torch.func.jvp": lambda backward, g: torch.func.jvp(backward, (g,), (g,))[1],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", BACKWARD_FOLLOWERS)
def test_followers_of_a_backward(processor: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, d, gradient, _ = drawn((8, 6, 1, (3, 3)))

    def followed() -> Any:
        return backward_under(weight, d, gradient, lambda backward: BACKWARD_FOLLOWERS[name](backward, gradient))

    calls = count_calls("differentiate", monkeypatch)
    backward_under(weight, d, gradient, lambda backward: backward(gradient))
    assert calls == ["differentiate"]
    got = followed()
    assert calls == ["differentiate"]
    monkeypatch.setattr(native, "LIBRARIES", {})
    for one, other in zip(got, followed(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# W, D and groups that do not belong together: inputs pruned, a D too small, groups forgotten, another K, C_out / g.
MISFITS = [
    ((16, 4, 3, 3), (8, 9, 9), 1),
    ((16, 64, 3, 3), (2, 9, 9), 1),
    ((16, 2, 3, 3), (8, 9, 9), 1),
    ((16, 8, 5, 5), (8, 9, 9), 1),
    ((5, 1, 3, 3), (2, 9, 9), 2),
    ((8, 2, 3, 3), (8, 9, 9), 8),
]


@pytest.mark.parametrize("misfit", MISFITS, ids=str)
def test_what_does_not_fit_is_an_error(processor: str, misfit: tuple[Any, ...]) -> None:
    w_shape, d_shape, groups = misfit
    with pytest.raises(RuntimeError):
        compose_kernel(torch.randn(w_shape), torch.randn(d_shape), None, groups)


def test_what_has_no_numbers_is_left_to_torch(processor: str) -> None:
    weight, d, gradient, groups = drawn((8, 6, 1, (3, 3)))
    assert native.is_supported(d, groups, gradient, weight)
    freed = weight.clone()
    freed.untyped_storage().resize_(0)
    for other in (torch._efficientzerotensor(weight.shape, dtype=weight.dtype), torch._neg_view(weight), freed):
        assert not native.is_supported(d, groups, gradient, other)
        assert not native.is_supported(d, groups, other, weight)
    assert not native.is_supported(torch._neg_view(d), groups, weight)
    assert not native.is_supported(torch._to_functional_tensor(d), groups, weight)
    assert not native.is_supported(d, groups, gradient, weight.float())


def test_what_hooks_made_of_saved_tensors(processor: str) -> None:
    weight, d, gradient, groups = drawn((8, 6, 1, (3, 3)), torch.float32)
    factors = weight.requires_grad_(), d.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.half() if t.dim() == 4 else t):
        kernel = compose_kernel(*factors, None, groups)
    with pytest.raises(RuntimeError, match="dtype"):  # torch's own
        torch.autograd.grad(kernel, factors, gradient)


def test_fake_tensors(processor: str) -> None:
    weight, d, _, _ = drawn((8, 6, 1, (3, 3)), torch.float32)
    with FakeTensorMode() as mode:
        kernel = compose_kernel(mode.from_tensor(weight), mode.from_tensor(d))
    assert kernel.shape == weight.shape


@pytest.mark.parametrize("shape", [(8, 6, 1, (3, 3)), (8, 8, 4, (3, 3)), (6, 6, 6, (3, 3))], ids=str)
def test_gradients_batched_by_vmap(processor: str, shape: tuple[Any, ...]) -> None:
    """`is_grads_batched` runs the backward under vmap, whose tensors have no memory of their own."""
    weight, d, gradient, groups = drawn(shape)
    factors = weight.requires_grad_(), d.requires_grad_()
    kernel = compose_kernel(*factors, None, groups)
    batch = torch.stack([gradient, 2 * gradient])
    batched = torch.autograd.grad(kernel, factors, batch, is_grads_batched=True, retain_graph=True)
    single = torch.autograd.grad(kernel, factors, gradient)
    for many, one in zip(batched, single, strict=True):
        torch.testing.assert_close(many, torch.stack([one, 2 * one]), rtol=1e-12, atol=1e-12)


def test_a_gradient_with_a_sign_still_to_be_changed(processor: str) -> None:
    weight, d, gradient, groups = drawn((8, 6, 1, (3, 3)))
    factors = weight.requires_grad_(), d.requires_grad_()
    got = torch.autograd.grad(compose_kernel(*factors, None, groups), factors, torch._neg_view(gradient))
    expected = torch.autograd.grad(compose_kernel(*factors, None, groups), factors, -gradient)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_library_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = shutil.copy(Path(native.__file__).with_name("product.c"), tmp_path)
    monkeypatch.setattr(native, "_SOURCE", Path(source))
    assert native.load("avx2", "float") is None
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()[:8]
    (tmp_path / "libraries").mkdir()
    (tmp_path / f"libraries/product_avx2_float_{digest}.so").write_bytes(b"no library")
    with pytest.warns(UserWarning, match=r"'product_avx2_float_.*\.so' cannot be loaded"):
        assert native.load("avx2", "float") is None
    Path(source).write_text("/* another */")  # what was built from another source is no longer its library
    assert native.load("avx2", "float") is None
    Path(source).unlink()  # a bundle of Python files alone
    assert native.load("avx2", "float") is None
