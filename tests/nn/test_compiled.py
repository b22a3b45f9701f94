"""product.c against torch's own operations; and that whoever follows torch's operations still sees them."""

import ctypes
import hashlib
import mmap
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from doconv_convert import DOConv2d
from doconv_convert.nn import compiled, product
from doconv_convert.nn.composition import compose_kernel

REAL = {torch.float32: "float", torch.float64: "double"}
CAPABILITY = torch.backends.cpu.get_cpu_capability().lower()
PROCESSORS = {"avx512": ["avx512", "avx2"], "avx2": ["avx2"]}.get(CAPABILITY, [])
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


def drawn(shape: tuple[Any, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, int]:
    """W, D, a gradient of the kernel, and the groups."""
    c_out, c_in, groups, kernel = shape
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(c_out, c_in // groups, *kernel, generator=generator).to(dtype) for _ in range(2))
    positions = weight.shape[2:].numel()
    d = torch.randn(c_in, positions, positions, generator=generator).to(dtype) / positions**0.5
    return weight, d, gradient, groups


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for dtype, real in REAL.items():
        library = compiled.load(request.param, real)
        if library is None:
            pytest.skip("the package was built without a C compiler")
        monkeypatch.setitem(compiled.LIBRARIES, dtype, library)
    return str(request.param)


def test_built_where_there_is_a_compiler() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("cc") or not PROCESSORS:
        pytest.skip("hatch_build.py builds nothing here")
    assert set(compiled.LIBRARIES) == set(REAL), "pip install -e . builds product.c"


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_product_and_gradients(processor: str, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    weight, d, gradient, groups = drawn(shape, dtype)
    assert compiled.serves(d, groups, weight)
    exact = [tensor.double() for tensor in (weight, d, gradient)]
    kernel = product.by_torch(exact[0], exact[0], exact[1], groups)
    assert (kernel - exact[0]).abs().max() > 0.1
    expected = kernel, *product.differentiated(exact[2], exact[0], exact[1], groups)
    got = compiled.compose(weight, d, groups), *compiled.differentiate(gradient, weight, d, groups)
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == dtype
        assert float((one - other).abs().max() / other.abs().max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_beyond_a_tensor_is_touched(processor: str, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Every tensor ends where the process's memory does: a number further would be a crash."""
    weight, d, gradient, groups = drawn(shape, dtype)
    library, depthwise = compiled.LIBRARIES[dtype], weight.shape[0] == groups == d.shape[0]
    sizes = d.shape[:2] if depthwise else (groups, weight.shape[0] // groups, weight.shape[1], d.shape[1])
    w, matrices, g, kernel, for_w = (at_the_end_of_memory(each) for each in (weight, d, gradient, weight, weight))
    for_d, transposed = at_the_end_of_memory(d), at_the_end_of_memory(d)
    sums = at_the_end_of_memory(d.new_empty(*d.shape[:2], compiled.LANES))
    suffix, room, more = ("_depthwise", [], []) if depthwise else ("", [transposed], [sums])
    compose, differentiate = (getattr(library, name + suffix) for name in ("compose", "differentiate"))
    compose(*(tensor.data_ptr() for tensor in (w, matrices, kernel, *room)), *sizes, 2)
    differentiate(*(tensor.data_ptr() for tensor in (g, w, matrices, for_w, for_d, *more)), *sizes, 2)
    expected = compiled.compose(weight, d, groups), *compiled.differentiate(gradient, weight, d, groups)
    assert all(torch.equal(one, other) for one, other in zip((kernel, for_w, for_d), expected, strict=True))


def at_the_end_of_memory(tensor: Tensor) -> Tensor:
    """A copy whose last number is the last before a page that must not be touched."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    pages = -(-size // page) * page
    memory = mmap.mmap(-1, pages + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(page), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages - size).view(tensor.shape)
    return copy.copy_(tensor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_number_of_threads_changes_no_bit(processor: str, shape: tuple[Any, ...]) -> None:
    weight, d, gradient, groups = drawn(shape, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append([compiled.compose(weight, d, groups), *compiled.differentiate(gradient, weight, d, groups)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for each in results for one, other in zip(each, results[0], strict=True))


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_zero_d_changes_nothing(processor: str, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    weight, d, _, groups = drawn(shape, dtype)
    weight.view(-1)[::3] *= torch.finfo(dtype).max / 8
    weight.view(-1)[::5] *= torch.finfo(dtype).tiny
    assert torch.equal(compiled.compose(weight, torch.zeros_like(d), groups), weight)


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
    layer.get_parameter(frozen).requires_grad_(False)
    layer.effective_kernel().square().sum().backward()
    other = "D" if frozen == "weight" else "weight"
    assert layer.get_parameter(frozen).grad is None
    assert layer.get_parameter(other).grad is not None
    assert layer.get_parameter(other).grad.abs().max() > 0


def count_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that every call of `compiled.<name>` adds to."""
    calls, function = [], getattr(compiled, name)

    def counted_function(*args: Any) -> Any:
        calls.append(name)
        return function(*args)

    monkeypatch.setattr(compiled, name, counted_function)
    return calls


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
        return [y.detach(), layer.weight.grad, layer.D.grad]

    got = step()
    assert all(called)
    monkeypatch.setattr(compiled, "LIBRARIES", {})
    expected = step()
    unit = torch.finfo(y.dtype if (y := got[0]).dtype != torch.float32 else dtype).eps
    for one, other in zip(got, expected, strict=True):
        # The largest seen: 1.0 units of the dtype (bfloat16), 3.2 of float32.
        assert float((one - other).abs().max() / other.abs().max()) <= 8 * unit
        assert one.abs().max() > 0


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
        without.setattr(compiled, "LIBRARIES", {})
        expected = FOLLOWERS[name](weight, d)

    def seen(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("product.c was called")

    monkeypatch.setattr(compiled, "compose", seen)
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
    monkeypatch.setattr(compiled, "LIBRARIES", {})
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
    assert compiled.serves(d, groups, gradient, weight)
    freed = weight.clone()
    freed.untyped_storage().resize_(0)
    for other in (torch._efficientzerotensor(weight.shape, dtype=weight.dtype), torch._neg_view(weight), freed):
        assert not compiled.serves(d, groups, gradient, other)
        assert not compiled.serves(d, groups, other, weight)
    assert not compiled.serves(torch._neg_view(d), groups, weight)
    assert not compiled.serves(torch._to_functional_tensor(d), groups, weight)
    assert not compiled.serves(d, groups, gradient, weight.float())


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
    source = shutil.copy(Path(compiled.__file__).with_name("product.c"), tmp_path)
    monkeypatch.setattr(compiled, "_SOURCE", Path(source))
    assert compiled.load("avx2", "float") is None
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest()[:8]
    (tmp_path / "libraries").mkdir()
    (tmp_path / f"libraries/product_avx2_float_{digest}.so").write_bytes(b"no library")
    with pytest.warns(UserWarning, match=r"'product_avx2_float_.*\.so' cannot be loaded"):
        assert compiled.load("avx2", "float") is None
    Path(source).write_text("/* another */")  # what was built from another source is no longer its library
    assert compiled.load("avx2", "float") is None
    Path(source).unlink()  # a bundle of Python files alone
    assert compiled.load("avx2", "float") is None
