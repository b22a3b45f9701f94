"""`layer.weight` is the kernel that convolves: every way to read it, every way to write it, for every kind of layer."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import difference, is_d, is_factor, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from doconv_convert import DoconvError, UsageError, cached, fold, to_doconv
from doconv_convert.nn.kernel_view import KernelView

MOVED = 0.1
SHAPE = (6, 2, 3, 3)


class Subclass(nn.Conv2d):
    """A forward of its own, that reads its attribute."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, padding=1, groups=2)


class Standardized(nn.Conv2d):
    """Convolves with a kernel that it computes from its `weight`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, 1, 1, 1, 2)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(SHAPE)), nn.Parameter(torch.randn(6))

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.kernel, self.bias, padding=1, groups=2)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "exact class": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "subclass": lambda: Subclass(4, 6, 3, padding=1, groups=2),
    "standardized": lambda: Standardized(4, 6, 3, padding=1, groups=2),
    "functional": Functional,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, d_mul: str = "K+2") -> tuple[Any, str, nn.Module]:
    """A layer whose D is far from zero, its kernel's name, and the plain layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = KINDS[kind]().double()
    layer = randomize(to_doconv(plain, d_mul=d_mul), seed=0)
    return layer, "kernel" if kind == "functional" else "weight", plain


def image() -> Tensor:
    return torch.randn(2, 4, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def composed(layer: nn.Module, name: str) -> Tensor:
    """The kernel by the formula: sum over s of D^[c, p, s] W[o, j, s], c = (o // 3) 2 + j."""
    p = dict(layer.named_parameters())
    d, extra = (p["D"], p["weight_extra"]) if name == "weight" else (p["kernel_D"], p["kernel_extra"])
    w = torch.cat([p[name].flatten(2), extra], 2)
    rows = (d + torch.eye(*d.shape[1:], dtype=d.dtype)).view(2, 2, 9, -1).repeat_interleave(3, 0)
    return torch.einsum("ojps,ojs->ojp", rows, w).view(SHAPE).detach()


def computes(layer: nn.Module, plain: nn.Module, name: str, kernel: Tensor) -> bool:
    """Whether the layer gives what its plain class gives with `kernel`, bit for bit."""
    other = copy.deepcopy(plain)
    with torch.no_grad():
        other.get_parameter(name).copy_(kernel)
        return torch.equal(layer(image()), other(image()))


def by_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


# Each gives a part of the kernel, `part` says which.
READS: dict[str, tuple[Callable[[Any], Any], Callable[[Tensor], Tensor]]] = {
    "attribute": (lambda w: w, lambda k: k),
    ".data": (lambda w: w.data, lambda k: k),
    ".detach()": (lambda w: w.detach(), lambda k: k),
    ".detach().cpu().numpy()": (lambda w: torch.tensor(w.detach().cpu().numpy()), lambda k: k),
    "numpy.asarray": (lambda w: torch.tensor(np.asarray(w.data)), lambda k: k),
    "slice": (lambda w: w[1:3, 0], lambda k: k[1:3, 0]),
    "view": (lambda w: w.view(6, -1), lambda k: k.view(6, -1)),
    "loop": (lambda w: torch.stack(list(w)), lambda k: k),
    "sum": (lambda w: w.sum(0), lambda k: k.sum(0)),
    "copy.deepcopy": (copy.deepcopy, lambda k: k),
    "copy.copy": (copy.copy, lambda k: k),
    "pickle": (lambda w: pickle.loads(pickle.dumps(w)), lambda k: k),
    "torch.save": (by_torch_save, lambda k: k),
    "nn.Parameter": (nn.Parameter, lambda k: k),
    "getattr under no_grad": (torch.no_grad()(lambda w: w.clone()), lambda k: k),
    "under inference_mode": (torch.inference_mode()(lambda w: w * 1), lambda k: k),
}


@every_kind
@pytest.mark.parametrize("read", READS)
def test_a_read_gives_the_kernel(kind: str, read: str) -> None:
    layer, name, _ = made(kind)
    expected = composed(layer, name)
    assert difference(expected, layer._parameters[name]) > MOVED
    function, part = READS[read]
    got = function(getattr(layer, name))
    assert difference(got.detach(), part(expected)) < 1e-14
    assert torch.equal(layer._parameters[name], dict(layer.named_parameters())[name])
    assert getattr(layer, f"{name}_first_slots") is layer._parameters[name]


def under_no_grad(function: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    return torch.no_grad()(function)


def set_item(layer: Any, name: str) -> None:
    getattr(layer, name)[:, 0] = 0


def in_place_operator(layer: Any, name: str) -> None:
    if name == "weight":
        layer.weight *= 2
    else:
        layer.kernel *= 2


def data_operator(layer: Any, name: str) -> None:
    if name == "weight":
        layer.weight.data += 1
    else:
        layer.kernel.data += 1


def through_two_handles(layer: Any, name: str) -> None:
    """Both were read before either was written; a plain layer's would be one tensor."""
    first, second = getattr(layer, name), getattr(layer, name).data
    first.mul_(2)
    second.add_(1)


def after_a_step(layer: Any, name: str) -> None:
    """Read once, written after D has moved in a way that version counters do not show."""
    handle = getattr(layer, name)
    next(p for n, p in layer.named_parameters() if is_d(n)).data.mul_(0)
    handle.copy_(handle)


def loop(layer: Any, name: str) -> None:
    for row in getattr(layer, name).data:
        row.zero_()


def twice(layer: Any, name: str) -> None:
    nn.init.ones_(getattr(layer, name))
    getattr(layer, name).data.mul_(3)


ONES = torch.ones(SHAPE, dtype=torch.float64)
# What is done to the layer, and the kernel it must have then (a function of the one before).
WRITES: dict[str, tuple[Callable[[Any, str], Any], Callable[[Tensor], Tensor]]] = {
    "a Parameter": (lambda m, n: setattr(m, n, nn.Parameter(2 * ONES)), lambda k: 2 * ONES),
    "a Parameter of itself": (lambda m, n: setattr(m, n, nn.Parameter(getattr(m, n) * 3)), lambda k: k * 3),
    "itself": (lambda m, n: setattr(m, n, getattr(m, n)), lambda k: k),
    "nn.init": (lambda m, n: nn.init.constant_(getattr(m, n), 0.5), lambda k: 0.5 * ONES),
    "nn.init of .data": (lambda m, n: nn.init.zeros_(getattr(m, n).data), lambda k: 0 * ONES),
    ".data.mul_()": (lambda m, n: getattr(m, n).data.mul_(2), lambda k: k * 2),
    ".data = x": (lambda m, n: setattr(getattr(m, n), "data", 4 * ONES), lambda k: 4 * ONES),
    ".data += x": (data_operator, lambda k: k + 1),
    "copy_": (under_no_grad(lambda m, n: getattr(m, n).copy_(5 * ONES)), lambda k: 5 * ONES),
    "detach().fill_": (lambda m, n: getattr(m, n).detach().fill_(6), lambda k: 6 * ONES),
    "[:, 0] = 0": (under_no_grad(set_item), lambda k: torch.cat([0 * k[:, :1], k[:, 1:]], 1)),
    "*= 2": (under_no_grad(in_place_operator), lambda k: k * 2),
    "a slice": (lambda m, n: getattr(m, n).data[1:3, 0].zero_(), lambda k: k * slots(1, 3)),
    "a view": (lambda m, n: getattr(m, n).data.view(-1).mul_(2), lambda k: k * 2),
    "a view's [3] = 7": (lambda m, n: getattr(m, n).data.view(-1).__setitem__(3, 7), lambda k: with_value(k, 3, 7.0)),
    "a transposed view": (lambda m, n: getattr(m, n).data.transpose(0, 1)[0].zero_(), lambda k: k * columns(0)),
    "rows of a loop": (loop, lambda k: 0 * ONES),
    "out=": (lambda m, n: torch.add(ONES, 1, out=getattr(m, n).data), lambda k: 2 * ONES),
    "_foreach": (lambda m, n: torch._foreach_mul_([getattr(m, n).data], 2.0), lambda k: k * 2),
    "inference_mode": (torch.inference_mode()(lambda m, n: getattr(m, n).mul_(2)), lambda k: k * 2),
    "copy.copy": (under_no_grad(lambda m, n: copy.copy(getattr(m, n)).mul_(2)), lambda k: k * 2),
    "two handles": (under_no_grad(through_two_handles), lambda k: k * 2 + 1),
    "twice": (twice, lambda k: 3 * ONES),
}


def slots(first: int, last: int) -> Tensor:
    mask = ONES.clone()
    mask[first:last, 0] = 0
    return mask


def columns(column: int) -> Tensor:
    mask = ONES.clone()
    mask[:, column] = 0
    return mask


def with_value(kernel: Tensor, index: int, value: float) -> Tensor:
    changed = kernel.clone()
    changed.view(-1)[index] = value
    return changed


@every_kind
@pytest.mark.parametrize("write", WRITES)
def test_a_write_sets_the_kernel_exactly(kind: str, write: str) -> None:
    layer, name, plain = made(kind)
    before = getattr(layer, name).detach().clone()
    extra = {n: p.clone() for n, p in layer.named_parameters() if is_factor(n) and not is_d(n)}
    keys = list(layer.state_dict())
    function, expected = WRITES[write]
    function(layer, name)
    assert computes(layer, plain, name, expected(before))
    assert all(not p.any() for n, p in layer.named_parameters() if is_d(n))
    assert all(torch.equal(p, extra[n]) for n, p in layer.named_parameters() if n in extra)
    assert list(layer.state_dict()) == keys
    assert isinstance(dict(layer.named_parameters())[name], nn.Parameter)
    assert torch.equal(fold(layer).get_parameter(name), expected(before))


@every_kind
def test_a_handle_follows_the_layer(kind: str) -> None:
    layer, name, plain = made(kind)
    handle = getattr(layer, name)
    randomize(layer, seed=5)
    assert difference(handle.detach(), composed(layer, name)) < 1e-14
    after_a_step(layer, name)
    assert computes(layer, plain, name, layer._parameters[name].detach())


@every_kind
def test_what_a_read_is(kind: str) -> None:
    layer, name, _ = made(kind)
    kernel = getattr(layer, name)
    assert isinstance(kernel, nn.Parameter)
    assert isinstance(kernel, KernelView)
    assert not isinstance(kernel.data, nn.Parameter)
    assert not isinstance(kernel[0], nn.Parameter)
    for computed in (kernel * 2, kernel.sum(), kernel.clone(), F.conv2d(image(), kernel, groups=2)):
        assert type(computed) is Tensor
    own = nn.Parameter(kernel)
    assert type(own) is nn.Parameter
    assert own.is_leaf
    with torch.no_grad():
        assert not getattr(layer, name).is_leaf
        assert getattr(layer, name).requires_grad
    assert type(copy.deepcopy(kernel)) is nn.Parameter
    assert type(copy.deepcopy(kernel.data)) is Tensor
    assert repr(kernel)


@every_kind
def test_a_read_is_differentiable(kind: str) -> None:
    layer, name, _ = made(kind)
    getattr(layer, name).square().sum().backward()
    gradients = {n: p.grad for n, p in layer.named_parameters() if n == name or is_factor(n)}
    assert len(gradients) == 3
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())


@every_kind
def test_an_optimizer_of_attributes_gets_torchs_error(kind: str) -> None:
    layer, name, _ = made(kind)
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        torch.optim.SGD([getattr(layer, name)], lr=0.1)
    with torch.no_grad(), pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        torch.optim.SGD([getattr(layer, name)], lr=0.1)


@every_kind
@pytest.mark.parametrize("how", ["attribute", "method"])
def test_freezing_the_kernel_freezes_what_it_is_made_of(kind: str, how: str) -> None:
    layer, name, _ = made(kind)
    trained = [n for n, _ in layer.named_parameters() if n == name or is_factor(n)]
    for wanted in (False, True):
        if how == "attribute":
            getattr(layer, name).requires_grad = wanted
        else:
            getattr(layer, name).requires_grad_(wanted)
        assert {n: p.requires_grad for n, p in layer.named_parameters()} == {
            n: wanted or n not in trained for n, _ in layer.named_parameters()
        }
        assert getattr(layer, name).requires_grad is wanted
    assert getattr(layer, name).detach().requires_grad_().is_leaf


@every_kind
def test_gradients_of_the_kernel_can_be_cleared_and_not_set(kind: str) -> None:
    layer, name, _ = made(kind)
    layer(image()).sum().backward()
    getattr(layer, name).grad = None
    assert all(p.grad is None for n, p in layer.named_parameters() if n == name or is_factor(n))
    with pytest.raises(DoconvError, match=f"'{name}' of .*: its gradient cannot be set; set those of"):
        getattr(layer, name).grad = ONES


RAISES: dict[str, tuple[Callable[[Any, str], Any], str]] = {
    "a hook": (lambda m, n: getattr(m, n).register_hook(print), "a hook on it would never run.*register it on"),
    "another shape": (lambda m, n: setattr(m, n, nn.Parameter(ONES[:2])), r"expected the shape \(6.*call fold"),
    "another shape of .data": (lambda m, n: setattr(getattr(m, n), "data", ONES[:2]), r"got \(2, .*call fold"),
    "None": (lambda m, n: setattr(m, n, None), "it cannot be None"),
    "a deletion": (lambda m, n: delattr(m, n), "cannot be deleted"),
    "another layer's kernel": (
        lambda m, n: setattr(m, n, getattr(made("functional" if n == "kernel" else "subclass")[0], n)),
        "tie layers before to_doconv, or assign a copy",
    ),
    "set_": (lambda m, n: getattr(m, n).set_(ONES), "its memory cannot be replaced"),
}


@every_kind
@pytest.mark.parametrize("write", RAISES)
def test_what_cannot_be_done_raises_and_changes_nothing(kind: str, write: str) -> None:
    layer, name, _ = made(kind)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    function, message = RAISES[write]
    with pytest.raises((DoconvError, UsageError), match=message):
        function(layer, name)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


@every_kind
def test_numpy_is_read_only(kind: str) -> None:
    layer, name, _ = made(kind)
    array = getattr(layer, name).detach().cpu().numpy()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


@every_kind
def test_in_a_cached_scope(kind: str) -> None:
    layer, name, _ = made(kind)
    with torch.no_grad(), cached(layer):
        assert torch.equal(getattr(layer, name), getattr(layer, name))
        assert difference(getattr(layer, name).detach(), composed(layer, name)) < 1e-14


@every_kind
def test_another_dtype_takes_d_and_weight_extra_along(kind: str) -> None:
    layer, name, plain = made(kind)
    setattr(layer, name, nn.Parameter(getattr(layer, name).float().detach()))
    assert {p.dtype for n, p in layer.named_parameters() if n != "bias"} == {torch.float32}
    assert torch.equal(layer.float()(image().float()), copy_with(plain.float(), name, layer)(image().float()))


def copy_with(plain: nn.Module, name: str, layer: Any) -> Any:
    with torch.no_grad():
        plain.get_parameter(name).copy_(getattr(layer, name))
    return plain


def test_a_1x1_kernel_without_d_is_the_parameter() -> None:
    layer: Any = to_doconv(nn.Sequential(nn.Conv2d(3, 4, 1)))[0]  # type: ignore[index]
    assert layer.weight is layer.weight_first_slots is dict(layer.named_parameters())["weight"]
    layer.weight.data.fill_(2)
    assert (layer.effective_kernel() == 2).all()


def test_reset_parameters_of_a_subclass() -> None:
    layer, _, _ = made("subclass")
    layer.reset_parameters()
    assert not layer.D.any()
    assert difference(layer.weight.detach(), composed(layer, "weight")) == 0


def test_memory_format_is_kept() -> None:
    layer, name, _ = made("exact class")
    layer.to(memory_format=torch.channels_last)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    assert layer._parameters[name].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.weight, layer.weight_first_slots)
