"""Random sequences of reads, writes, steps, saves, loads and folds, against a layer that composes by the formula."""

import copy
import io
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import difference
from torch import Tensor, nn
from torch.nn import functional as F

from doconv_convert import fold, to_doconv

# float64; the formula sums in another order, and a step's rounding is carried on. The largest seen is 2e-15.
ROUNDING = 1e-11
C_OUT, C_IN, GROUPS, K = 4, 4, 2, 9


class Same(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1)), self.weight, self.bias, groups=GROUPS)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(C_OUT, C_IN // GROUPS, 3, 3)),
            nn.Parameter(torch.zeros(C_OUT)),
        )

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, padding=1, groups=GROUPS)


MAKERS = {
    "exact class": lambda: nn.Conv2d(C_IN, C_OUT, 3, padding=1, groups=GROUPS),
    "subclass": lambda: Same(C_IN, C_OUT, 3, groups=GROUPS),
    "functional": Functional,
}


class Reference:
    """W, D^ and the bias as they are in the paper: k[o, j, p] = sum_s D^[c, p, s] W[o, j, s]."""

    def __init__(self, layer: nn.Module) -> None:
        p = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
        self.slots = p["weight"].shape[2:].numel()
        extra = p.get("weight_extra", p["weight"].flatten(2)[..., :0])
        self.w = torch.cat([p["weight"].flatten(2), extra], 2).requires_grad_()
        self.d = (p["D"] + self.identity(p["D"])).requires_grad_()
        self.bias = p["bias"].requires_grad_()

    @staticmethod
    def identity(d: Tensor) -> Tensor:
        return torch.eye(*d.shape[1:], dtype=d.dtype).expand(d.shape)

    def kernel(self) -> Tensor:
        rows = self.d.view(GROUPS, C_IN // GROUPS, K, -1).repeat_interleave(C_OUT // GROUPS, 0)
        return torch.einsum("ojps,ojs->ojp", rows, self.w).view(C_OUT, C_IN // GROUPS, 3, 3)

    def set(self, kernel: Tensor) -> None:
        with torch.no_grad():
            self.w[..., :K] = kernel.flatten(2)
            self.d.copy_(self.identity(self.d))

    def output(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.bias, padding=1, groups=GROUPS)

    def step(self, x: Tensor) -> None:
        tensors = (self.w, self.d, self.bias)
        gradients = torch.autograd.grad(self.output(x).square().mean(), tensors)
        with torch.no_grad():
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor -= 0.05 * gradient


def write(layer: Any, how: str, scale: float) -> None:
    with torch.no_grad():
        if how == "mul_":
            layer.weight.mul_(scale)
        elif how == "data.add_":
            layer.weight.data.add_(scale)
        elif how == "data =":
            layer.weight.data = layer.weight.data * scale
        elif how == "item":
            layer.weight[1, 0] = scale
        elif how == "view":
            layer.weight.detach().view(-1)[5] = scale
        elif how == "operator":
            layer.weight *= scale
        else:
            layer.weight = nn.Parameter(layer.weight.detach() * scale)


def written(kernel: Tensor, how: str, scale: float) -> Tensor:
    """The same on a plain tensor."""
    kernel = kernel.detach().clone()
    if how == "data.add_":
        return kernel + scale
    if how == "item":
        kernel[1, 0] = scale
    elif how == "view":
        kernel.view(-1)[5] = scale
    else:
        kernel *= scale
    return kernel


WAYS = ("mul_", "data.add_", "data =", "item", "view", "operator", "Parameter")
ACTIONS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(WAYS), st.floats(-2, 2).filter(lambda s: abs(s) > 0.1)),
    st.tuples(st.sampled_from(["train", "train", "read", "save", "copy", "fold", "plain"]), st.just(""), st.just(0.0)),
)


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(sorted(MAKERS)),
    d_mul=st.sampled_from(["K", "K+2"]),
    actions=st.lists(ACTIONS, min_size=1, max_size=10),
)
def test_any_sequence_is_the_formulas(kind: str, d_mul: str, actions: list[tuple[str, str, float]]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = MAKERS[kind]().double()
        x = torch.randn(3, C_IN, 6, 6, dtype=torch.float64)
        layer: Any = to_doconv(plain, d_mul=d_mul)
        layer.D.data.normal_(std=0.2)
    reference = Reference(layer)
    for action, how, scale in actions:
        if action == "write":
            before = reference.kernel()
            write(layer, how, scale)
            reference.set(written(before, how, scale))
        elif action == "train":
            layer(x).square().mean().backward()
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
            reference.step(x)
        elif action == "save":
            file = io.BytesIO()
            torch.save(layer.state_dict(), file)
            file.seek(0)
            layer = to_doconv(copy.deepcopy(plain), d_mul=d_mul, seed=7)
            layer.load_state_dict(torch.load(file))
        elif action == "copy":
            layer = copy.deepcopy(layer)
        elif action == "fold":
            folded = fold(layer)
            assert type(folded) is type(plain)
            assert difference(folded(x), reference.output(x)) < ROUNDING
        elif action == "plain":
            layer.load_state_dict(plain.state_dict())
            state = plain.state_dict()
            reference.set(state["weight"])
            with torch.no_grad():
                reference.bias.copy_(state["bias"])
        assert difference(layer.weight.detach(), reference.kernel()) < ROUNDING
        assert difference(layer(x), reference.output(x)) < ROUNDING
