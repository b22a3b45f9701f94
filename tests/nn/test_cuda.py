"""The Triton kernels and their operator, on the CPU in Triton's interpreter: against torch's operations in float64, at
the edges of memory, and where they must not be used. tests/gpu has what only a device can show."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support_native import at_the_end_of_memory, drawn
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from doconv_convert import DOConv2d, DoconvError, cached
from doconv_convert.nn import composition, native
from doconv_convert.nn.composition import compose_kernel

if platform.system() != "Linux":
    pytest.skip("Triton is for Linux", allow_module_level=True)

from doconv_convert.nn import cuda

# Against float64, of the largest number; seen at most 3e-7.
TOLERANCE = 2e-6

# (C_out, C_in, groups, kernel): odd channels, K = 1 to 49, several programs in every direction, rows in several parts.
SHAPES = [
    (17, 5, 1, (3, 3)),
    (8, 16, 1, (3, 3)),
    (36, 3, 1, (3,)),
    (16, 8, 8, (3, 3)),
    (3, 3, 3, (7, 7)),
    (12, 12, 4, (1, 3)),
    (10, 2, 2, (2, 2, 3)),
    (9, 1, 1, (5, 5)),
    (3, 3, 1, (1, 1)),
    (1, 1, 1, (4, 4)),
]
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
Factors = tuple[Tensor, Tensor, Tensor | None, int]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The CPU in a GPU's place. What was launched, in order."""
    launched, launch = [], cuda._launch

    def counted(name: str, *arguments: Any) -> Any:
        launched.append(name)
        return launch(name, *arguments)

    monkeypatch.setattr(cuda, "_launch", counted)
    monkeypatch.setattr(cuda, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(composition, "_is_on_gpu", lambda weight: True)
    monkeypatch.setattr(native, "LIBRARIES", {})
    yield launched
    torch._dynamo.reset()


def factors(shape: tuple[Any, ...], more: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Factors, Tensor]:
    """W, D, weight_extra and the groups; a gradient of the kernel."""
    weight, d, gradient, groups = drawn(shape, dtype)
    if not more:
        return (weight, d, None, groups), gradient
    generator = torch.Generator().manual_seed(1)
    d = torch.cat([d, torch.randn(*d.shape[:2], more, generator=generator).to(dtype) / 3], 2)
    return (weight, d, torch.randn(*weight.shape[:2], more, generator=generator).to(dtype), groups), gradient


def in_layout(tensor: Tensor, last: bool) -> Tensor:
    return tensor.contiguous(memory_format=LAYOUTS[tensor.dim()]) if last and tensor.dim() in LAYOUTS else tensor


def results(compose: Callable[..., Tensor], given: Factors, gradient: Tensor) -> list[Tensor]:
    """The kernel and the gradients of W, D and, where there is one, weight_extra."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in given[:3]]
    kernel = compose(*leaves, given[3])
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [kernel.detach(), *torch.autograd.grad(kernel, wanted, gradient)]


def by_torch(*given: Any) -> Tensor:
    return composition._composed(*given, torch.promote_types(given[0].dtype, torch.float32))


def exact(given: Factors, gradient: Tensor) -> list[Tensor]:
    weight, d, extra, groups = given
    wide = weight.double(), d.double(), None if extra is None else extra.double(), groups
    return results(by_torch, wide, gradient.double())


def error(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one.double() - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(("more", "last"), [(0, False), (3, True)], ids=["contiguous", "extra slots, channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_papers_kernel_and_gradients(shape: tuple[Any, ...], more: int, last: bool, interpreted: list[str]) -> None:
    given, gradient = factors(shape, more)
    given = in_layout(given[0], last), *given[1:]
    expected = exact(given, gradient)
    assert (expected[0] - given[0]).abs().max() > 0.1
    got = results(compose_kernel, given, gradient)
    assert interpreted == ["compose", "differentiate"]
    assert got[0].stride() == given[0].stride()
    for one, other in zip(got, expected, strict=True):
        assert error(one, other) <= TOLERANCE


@pytest.mark.parametrize("d_dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, d_dtype: torch.dtype) -> None:
    """Sums are float32, results are cast once."""
    (weight, d, extra, groups), gradient = factors((9, 3, 1, (2, 2)), 2, dtype)
    given = in_layout(weight, d_dtype == dtype), d.to(d_dtype), extra, groups
    got = results(compose_kernel, given, gradient)
    for one, other, kind in zip(got, exact(given, gradient), (dtype, dtype, d_dtype, dtype), strict=True):
        assert one.dtype == kind
        # The interpreter, unlike a GPU, cuts numbers off where it makes bfloat16 of them.
        unit = {torch.float32: 0.0, torch.float16: 0.5, torch.bfloat16: 1.0}[kind] * torch.finfo(kind).eps
        assert ((one.double() - other).abs() <= unit * other.abs() + TOLERANCE * other.abs().max()).all()
    assert torch.equal(compose_kernel(given[0], torch.zeros_like(given[1]), extra, groups), weight)


@pytest.mark.parametrize("shape", [(17, 5, 1, (3, 3)), (3, 3, 3, (7, 7)), (10, 2, 2, (2, 2, 3))], ids=str)
def test_a_zero_d_leaves_the_bits(shape: tuple[Any, ...]) -> None:
    (weight, d, extra, groups), _ = factors(shape, 2)
    weight.view(-1)[::3] *= torch.finfo(torch.float32).max / 8
    weight.view(-1)[::5] *= torch.finfo(torch.float32).tiny
    assert torch.equal(compose_kernel(weight, torch.zeros_like(d), extra, groups), weight)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(17, 5, 1, (3, 3)), (4, 2, 2, (3, 3)), (2, 2, 2, (7, 7))], ids=str)
def test_nothing_beyond_a_tensor_is_touched(
    shape: tuple[Any, ...], last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor ends where the process's memory does: a number further would be a crash."""

    def at_the_end(tensor: Tensor) -> Tensor:
        dense = tensor.permute(0, 2, 3, 1) if last and tensor.dim() == 4 else tensor
        copy = at_the_end_of_memory(dense)
        return copy.permute(0, 3, 1, 2) if dense is not tensor else copy

    (weight, d, extra, groups), gradient = factors(shape, 2)
    assert extra is not None
    expected = cuda.kernels.compose(weight, d, extra, groups)  # type: ignore[union-attr]
    more = cuda.kernels.differentiate(weight, gradient, d, extra, groups)  # type: ignore[union-attr]
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **_: at_the_end(torch.zeros(tensor.shape)))
    w, g, matrices, e = at_the_end(weight), at_the_end(gradient), at_the_end(d), at_the_end_of_memory(extra)
    assert torch.equal(cuda.kernels.compose(w, matrices, e, groups), expected)  # type: ignore[union-attr]
    got = cuda.kernels.differentiate(w, g, matrices, e, groups)  # type: ignore[union-attr]
    for one, other in zip(got, more, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # another layout sums in the same order


@pytest.mark.parametrize("size", [(0, 4, 3, 3), (4, 0, 3, 3)], ids=str)
def test_empty_kernels(size: tuple[int, ...]) -> None:
    weight, d = torch.zeros(size, requires_grad=True), torch.ones(size[1], 9, 9, requires_grad=True)
    kernel = compose_kernel(weight, d)
    assert kernel.shape == size
    kernel.sum().backward()
    assert weight.grad is not None
    assert weight.grad.shape == size
    assert d.grad is not None
    assert not d.grad.any()


@pytest.mark.parametrize("weight_layout", ["transposed", "sliced"])
def test_a_weight_in_no_layout_of_its_own(weight_layout: str, interpreted: list[str]) -> None:
    (weight, d, extra, groups), gradient = factors((8, 8, 1, (3, 3)))
    given = weight.transpose(0, 1) if weight_layout == "transposed" else torch.cat([weight, weight], 3)[..., ::2], d
    got = results(compose_kernel, (*given, extra, groups), gradient)
    assert interpreted
    for one, other in zip(got, exact((*given, extra, groups), gradient), strict=True):
        assert error(one, other) <= TOLERANCE


def test_gradients_of_gradients(interpreted: list[str]) -> None:
    given, _ = factors((6, 4, 2, (1, 3)), 2)

    def twice(compose: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in given[:3] if t is not None]
        first = torch.autograd.grad(compose(*leaves, given[3]).pow(3).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(each.square().sum() for each in first), leaves))  # type: ignore[arg-type]

    expected = twice(by_torch, torch.float64)
    for compose in (compose_kernel, cuda.compose):
        interpreted.clear()
        got = twice(compose, torch.float32)
        assert interpreted == ["compose", "differentiate"]  # the gradient's own graph is torch's
        assert all(error(one, other) <= 10 * TOLERANCE for one, other in zip(got, expected, strict=True))


def test_the_torch_formula_of_the_gradients() -> None:
    given, _ = factors((6, 4, 2, (1, 3)), 2, torch.float64)
    gradient = torch.randn(given[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    got = cuda.differentiated(given[0], gradient, *given[1:])
    for one, other in zip(got, exact(given, gradient)[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_operator_is_all_that_a_compiler_sees(interpreted: list[str]) -> None:
    layer = moved(DOConv2d(8, 16, 3, groups=2, d_mul="K+3"))
    x = torch.randn(1, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    graphs = EagerAndRecordGraphs()
    assert torch.equal(torch.compile(layer, backend=graphs, fullgraph=True)(x), layer(x))
    (graph,) = graphs.graphs
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert names[0] == "doconv_convert.compose.default"
    assert len(names) == 2  # and the convolution
    with torch.autocast("cpu", torch.bfloat16):
        differentiable = torch.compile(layer, backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(differentiable(x).float().square().sum(), list(layer.parameters()))
        expected = torch.autograd.grad(layer(x).float().square().sum(), list(layer.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert interpreted[-1] == "differentiate"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize(("more", "last"), [(0, False), (3, True)], ids=["contiguous", "extra slots, channels_last"])
def test_the_operator_is_well_formed(more: int, last: bool) -> None:
    """torch's own checks: the schema, the fake implementation's shapes and strides, the autograd registration."""
    (weight, d, extra, groups), gradient = factors((4, 4, 2, (2, 2)), more)
    weight = in_layout(weight, last)
    leaves = [None if t is None else t.requires_grad_() for t in (weight, d, extra)]
    torch.library.opcheck(torch.ops.doconv_convert.compose.default, (*leaves, groups))
    plain = weight.detach(), gradient, d.detach(), None if extra is None else extra.detach(), groups
    torch.library.opcheck(torch.ops.doconv_convert.compose_backward.default, plain)


def moved(layer: Any) -> Any:
    """A layer with a D that is not zero."""
    nn.init.normal_(layer.D, std=0.3, generator=torch.Generator().manual_seed(4))
    return layer


class Many(nn.Module):
    """Kernels of three kinds, two of them alike and one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = moved(DOConv2d(3, 17, 3)), moved(DOConv2d(17, 8, 3))
        self.grouped = moved(DOConv2d(8, 8, (1, 3), groups=4, d_mul="K+2"))
        self.depthwise = moved(DOConv2d(8, 8, 3, padding=1, groups=8).to(memory_format=torch.channels_last))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(self.second(self.first(x))))
        y: Tensor = self.depthwise(x) + self.depthwise(2 * x)
        return y


@pytest.mark.parametrize("changes", [False, True])
def test_cached_composes_all_at_once(changes: bool, interpreted: list[str]) -> None:
    torch.manual_seed(0)
    model = Many()
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    interpreted.clear()

    def step() -> tuple[Tensor, ...]:
        with cached(model):
            gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            assert interpreted == ["compose_many"] + ["differentiate"] * 4
            if changes:
                model.second.D.data[0, 0, 0] += 1e-6
            return gradients

    if changes:
        with pytest.raises(DoconvError, match=r"1 kernels changed inside cached\(\) \('second.weight'"):
            step()
        return
    got = step()
    assert interpreted[-1] == "compose_many"
    for one, other in zip(got, expected, strict=True):
        assert error(one, other) <= TOLERANCE  # the depthwise kernel's two gradients are added before and after


@pytest.mark.parametrize("more", [0, 2])
def test_many_kernels_at_once_have_the_bits_of_each(more: int) -> None:
    given = [factors(shape, more, dtype)[0] for shape in SHAPES[:7] for dtype in (torch.float32, torch.bfloat16)]
    given += [(in_layout(weight, True), *rest) for weight, *rest in given[:2]]  # type: ignore[misc]
    several: Any = composition.compose_kernels(given)
    for one, each in zip(several, given, strict=True):
        assert torch.equal(one, cuda.kernels.compose(*each))  # type: ignore[union-attr]
        assert one.stride() == each[0].stride()


def counted_flops(weight: Tensor, d: Tensor) -> Tensor:
    with FlopCounterMode(display=False) as counter:
        kernel = compose_kernel(weight, d)
    assert counter.get_total_flops() > 0
    return kernel


def compiled_vmap_of_grad(weight: Tensor, d: Tensor) -> Tensor:
    function = torch.vmap(torch.func.grad(lambda w, m: compose_kernel(w, m).square().sum()))
    return torch.compile(function, backend="eager", fullgraph=True)(weight[None], d[None])[0]  # type: ignore[no-any-return]


class Composed(nn.Module):
    def forward(self, weight: Tensor, d: Tensor) -> Tensor:
        return compose_kernel(weight, d)


FOLLOWERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch.export": lambda w, d: torch.export.export(Composed(), (w, d)).module()(w, d),
    "torch.export, strict": lambda w, d: torch.export.export(Composed(), (w, d), strict=True).module()(w, d),
    "torch.jit.trace": lambda w, d: torch.jit.trace(Composed(), (w, d), check_trace=False)(w, d),
    "make_fx": lambda w, d: make_fx(Composed())(w, d)(w, d),
    "FlopCounterMode": counted_flops,
    "vmap": lambda w, d: torch.vmap(compose_kernel)(w[None], d[None])[0],
    "jvp": lambda w, d: torch.func.jvp(compose_kernel, (w, d), (w, d))[1],
    "compiled vmap of grad": compiled_vmap_of_grad,
    "float64": lambda w, d: compose_kernel(w.double(), d.double()),
    "a D in float64": lambda w, d: compose_kernel(w, d.double()),
    "a tensor's subclass": lambda w, d: compose_kernel(w.as_subclass(Tagged), d).as_subclass(Tensor),
}


class Tagged(Tensor):
    pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", FOLLOWERS)
def test_followers_see_torch_operations(name: str, interpreted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, d, _, _ = drawn((8, 6, 1, (3, 3)), torch.float32)
    compose_kernel(weight, d)
    assert interpreted == ["compose"]
    got = FOLLOWERS[name](weight, d)
    assert interpreted == ["compose"]
    monkeypatch.setattr(composition, "_is_on_gpu", lambda _: False)
    torch._dynamo.reset()
    assert torch.equal(got, FOLLOWERS[name](weight, d))


@pytest.mark.parametrize(
    "misfit",
    [
        ((16, 4, 3, 3), (8, 9, 9), 1),
        ((16, 8, 5, 5), (8, 9, 9), 1),
        ((5, 1, 3, 3), (2, 9, 9), 2),
        ((8, 8, 3, 3), (8, 9, 12), 1),
    ],
    ids=str,
)
def test_what_does_not_fit_is_torchs_error(misfit: tuple[Any, ...], interpreted: list[str]) -> None:
    w_shape, d_shape, groups = misfit
    with pytest.raises(RuntimeError):
        compose_kernel(torch.randn(w_shape), torch.randn(d_shape), None, groups)
    assert not interpreted


@pytest.mark.parametrize("scope", ["checkpointed", "cached", "autocast", "batched gradients"])
def test_a_training_step_is_that_of_torch(scope: str, interpreted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = moved(DOConv2d(8, 16, 3, stride=2, padding=1))
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))

    def step() -> list[Tensor]:
        leaves = list(layer.parameters())
        if scope == "checkpointed":
            y = checkpoint(layer, x, use_reentrant=False)
        elif scope == "cached":
            with cached(layer):
                return list(torch.autograd.grad((layer(x) + layer(x)).square().sum(), leaves))  # one: composed alone
        elif scope == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                y = layer(x)
                assert layer.effective_kernel().dtype == torch.float32
        else:
            y = layer(x)
            batch = torch.stack([y.detach(), -y.detach()])
            return [each[0] for each in torch.autograd.grad(y, leaves, batch, is_grads_batched=True)]
        return list(torch.autograd.grad(y.float().square().sum(), leaves))

    got = step()
    assert "compose" in interpreted
    assert ("differentiate" in interpreted) == (scope != "batched gradients")
    monkeypatch.setattr(composition, "_is_on_gpu", lambda _: False)
    for one, other in zip(got, step(), strict=True):
        # bfloat16 convolutions of two kernels that differ in float32's last bit; else float32 sums
        assert error(one, other) <= (2e-2 if scope == "autocast" else TOLERANCE)


COMPILES = """
import triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
from doconv_convert.nn import triton_batch, triton_kernels as kernels

def build(function, capability, **constants):
    signature = {name: "constexpr" if name in constants else "i32" for name in function.arg_names}
    pointers = ("out", "base", "source", "extra", "d", "gradient")
    signature |= {name: "*bf16" if name == "d" else "*fp32" for name in pointers if name in signature}
    signature |= {name: "*i64" for name in ("table", "owners") if name in signature}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]

for capability, last in ((80, True), (90, False)):
    tile, _ = kernels.correlation_tile(64, 576, 9)
    build(kernels._correlation, capability, X=9, T=9, LAST=last, SOURCE_LAST=last, BLOCK_M=tile.columns,
          BLOCK_T=tile.numbers, UNROLL=tile.rows)
    for q, extra in ((64, 3),) if last else ((1, 0),):
        tile = kernels.product_tile(q, 576, 9, together=True)
        build(kernels._product, capability, X=9, T=9, EXTRA=extra, BASE=True, OUT_LAST=last, SOURCE_LAST=last,
              BLOCK_R=tile.rows, BLOCK_M=tile.columns, BLOCK_T=tile.numbers)
build(triton_batch._compose_many, 90, X=9, EXTRA=3, LAST=True, W=tl.float32, D=tl.bfloat16, E=tl.float32, FIELDS=8,
      BLOCK_R=8, BLOCK_M=128, BLOCK_T=1)
print("compiled")
"""


def test_the_kernels_compile_to_machine_code(tmp_path: Any) -> None:
    """For cards that are not here: what the interpreter forgives, the compiler does not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES], capture_output=True, text=True, check=False, env=environment
    )
    # The assembler comes with Triton's own wheels.
    assert done.stdout.strip() == "compiled", done.stderr


IMPORTS = """
import sys, torch
before = "triton" in sys.modules
import doconv_convert
from doconv_convert import DoconvError, DOConv2d, cached
layer = DOConv2d(4, 4, 3)
with cached(layer):
    layer(torch.zeros(1, 4, 5, 5)).sum().backward()
print(before, "triton" in sys.modules, "doconv_convert.nn.cuda" in sys.modules)
"""


def test_triton_is_not_imported_without_a_cuda_tensor() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    before, after, ours = done.stdout.split()
    assert after == before
    assert ours == "False"
