"""Tiny nets, one hazard each: what the plan says of it, an exact start, copies, and an exact fold."""

import pickle
import random
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import difference, equal, random_state_untouched, randomize, run, signature, varied_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

from doconv_convert import fold, plan, to_doconv
from doconv_convert.rewrite.convert import copy_model
from doconv_convert.rewrite.sites import Reason

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:.*_aminmax.*"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]

MOVED = 0.1
# float64, folded against unfolded: the largest seen was 0, one composition in both.
TOLERANCE = 1e-12
CONVERT = "convert"


def conv(c_in: int = 3, c_out: int = 3, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, padding=size // 2, **options)


class Alias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = conv()
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x).relu())


class TwoParents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = conv()
        self.left, self.right = nn.Sequential(shared, nn.ReLU()), nn.Sequential(nn.ReLU(), shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(x))


class TiedParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(), conv(dilation=1)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) - self.right(x.flip(-1))


class TiedDifferentGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.full, self.grouped = conv(3, 4), conv(4, 8), conv(8, 8, groups=2)
        self.grouped.weight = self.full.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.full(self.stem(x)))


class TiedToTransposed(nn.Module):
    """The transposed layer comes first in the tree."""

    def __init__(self) -> None:
        super().__init__()
        self.decode = nn.ConvTranspose2d(4, 3, 3, padding=1)
        self.encode = conv(3, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class ReadOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = conv(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv_transpose2d(self.encode(x), self.encode.weight, padding=1)
        return y * (1 + self.encode.weight.square().mean())


class ReadOutsideUntraceable(ReadOutside):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 1 else x


class SamePadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        pads = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(x.shape[-2:], self.stride, (3, 3), strict=True)]
        if any(pads):
            x = F.pad(x, [pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Octave(nn.Module):
    """A layer that convolves with parts of its kernel, and gives a tuple."""

    class Split(nn.Conv2d):
        def forward(self, x: Tensor) -> Any:
            return F.conv2d(x, self.weight[:1], padding=1), F.conv2d(F.avg_pool2d(x, 2), self.weight[1:], padding=1)

    def __init__(self) -> None:
        super().__init__()
        self.split, self.high = self.Split(3, 3, 3), conv(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.split(x)
        return self.high(high).mean((2, 3)) + low.mean((2, 3)).sum(1, keepdim=True)


class Mixer(nn.Module):
    """Its layer only holds the kernel for a functional call, in a forward that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(3, 3, 4, groups=3, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2) if x.shape[0] > 1 else x
        kernel = self.conv1d.weight.squeeze(1).unsqueeze(1)
        return F.conv1d(x, kernel, self.conv1d.bias, padding=3, groups=3)


class Masked(nn.Conv2d):
    def __init__(self, *arguments: int) -> None:
        super().__init__(*arguments, padding=1)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.mask[:, :, 2:] = 0

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


class MaskedByItems(Masked):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data[:, :, 2:] = 0
        return nn.Conv2d.forward(self, x)


class MaskedUntraceable(Masked):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 1 else x


class MaxNorm(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


class MaxNormInTraining(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class WrittenByParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        self.conv.weight.data = torch.renorm(self.conv.weight.data, 2, 0, 0.5)
        return self.conv(self.stem(x))


class WrittenByParentUntraceable(WrittenByParent):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 1 else x


class Rebuilt(nn.Module):
    """In eval one layer has the kernel of two in a row (SPAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.eval_conv = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 5)
        self.first.bias = self.second.bias = self.eval_conv.bias = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.second(self.first(x))
        flipped = self.second.weight.data.flip(2, 3)
        product = F.conv2d(self.first.weight.data.permute(1, 0, 2, 3), flipped, padding=2)
        self.eval_conv.weight.data = product.permute(1, 0, 2, 3).contiguous()
        return self.eval_conv(x)


class OtherKernel(nn.Conv2d):
    """Its `weight` is not what it convolves with."""

    def __init__(self) -> None:
        super().__init__(3, 3, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(3, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel * self.weight.mean(), self.bias)


class Plain(nn.Conv2d):
    """A subclass that adds nothing."""


def patched_forward(self: Any, x: Tensor) -> Tensor:
    return self._conv_forward(x.relu(), self.weight, self.bias)


def standardizing_forward(self: Any, x: Tensor) -> Tensor:
    return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def with_forward(module: nn.Module, forward: Any) -> nn.Module:
    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
    return module


class Functional(nn.Module):
    def __init__(self, c_out: int = 3) -> None:
        super().__init__()
        self.weight, self.kernel = nn.Parameter(torch.randn(c_out, 3, 3, 3)), nn.Parameter(torch.randn(c_out, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, padding=1)
        return F.conv2d(x, weight=self.kernel, groups=x.shape[1], padding=1)


class FixedGroups(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.weight, padding=1), self.kernel, groups=3)


class FunctionalUntraceable(FixedGroups):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.stem(x)) if x.shape[0] > 1 else x


class ControlFlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.rare = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[-1] // 4):
            x = self.mix(x).tanh()
        return self.rare(x) if x.mean() > 1e9 else x


class TrainingOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kernel = conv(), nn.Parameter(torch.randn(3, 3, 3, 3))

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return (y, F.conv2d(y, self.kernel)) if self.training else y


class Blur(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv()
        self.register_buffer("filt", torch.ones(3, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.stem(x), self.filt, groups=x.shape[1])  # type: ignore[arg-type]


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bank = conv(), nn.Parameter(torch.randn(2, 3 * 3 * 9))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.softmax(x.mean((0, 2, 3))[:2], 0)
        return F.conv2d(x, (gate @ self.bank).view(3, 3, 3, 3), padding=1)


class ConditionalUntraceable(Conditional):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[0] > 1 else x


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.w = conv(), nn.Parameter(torch.randn(3, 27))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.stem(x), torch.sigmoid(self.w).view(3, 3, 3, 3))


class WritesAttributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls, self.seen = conv(), 0, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.seen.append(x)
        return self.body(x)


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ParameterList([torch.randn(3, 3, 3, 3), torch.randn(3, 1, 3, 3)])
        self.named = nn.ParameterDict({"weight": torch.randn(3, 3, 3, 3), "edge": torch.randn(3, 3, 1, 5)})

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.conv2d(x, self.rows[0], padding=1), self.rows[1], groups=3, padding=1)
        return F.conv2d(F.conv2d(x, self.named["weight"], padding=1), self.named["edge"])


class Spatial(nn.Module):
    """1-D and 3-D beside 2-D."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv1d(3, 4, 3), conv(4, 4, groups=2), nn.Conv3d(1, 2, (1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x.flatten(2)).unsqueeze(-1))
        return self.three(x.unsqueeze(1).expand(-1, -1, -1, -1, 2))


def frozen() -> nn.Module:
    model = nn.Sequential(conv(), conv())
    model[0].requires_grad_(False)
    return model


def parametrized(norm: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = conv()
        norm(layer)
        return nn.Sequential(conv(), layer)

    return make


class Halve(nn.Module):
    def forward(self, bias: Tensor) -> Tensor:
        return bias / 2


@dataclass
class Hazard:
    """`rows` is the plan: name -> "convert" or the reason to keep. `example` passes example inputs."""

    make: Callable[[], nn.Module]
    rows: dict[str, str | Reason]
    example: bool = False
    aliases: dict[str, list[str]] = field(default_factory=dict)


HAZARDS = {
    "root": Hazard(conv, {"weight": CONVERT}),
    "alias": Hazard(Alias, {"first": CONVERT}, aliases={"first": ["again"]}),
    "two parents": Hazard(TwoParents, {"left.0": CONVERT}, aliases={"left.0": ["right.1"]}),
    "tied parameter": Hazard(TiedParameter, {"left": CONVERT}, aliases={"left": ["right"]}),
    "tied, different groups": Hazard(TiedDifferentGroups, {"stem": CONVERT, "full": Reason.DIFFERENT_GROUPS}),
    "tied to a transposed layer": Hazard(TiedToTransposed, {"decode": CONVERT}, aliases={"decode": ["encode"]}),
    "read outside": Hazard(ReadOutside, {"encode": CONVERT}),
    "read outside, untraceable": Hazard(ReadOutsideUntraceable, {"encode": CONVERT}, example=True),
    "same padding": Hazard(
        lambda: nn.Sequential(SamePadding(3, 4, 3, 2), SamePadding(4, 4, 3)), {"0": CONVERT, "1": CONVERT}
    ),
    "plain subclass": Hazard(lambda: nn.Sequential(Plain(3, 3, 3)), {"0": CONVERT}),
    "root subclass": Hazard(lambda: SamePadding(3, 4, 3, 2), {"weight": CONVERT}),
    "standardized": Hazard(lambda: nn.Sequential(conv(), Standardized(3, 3, 3)), {"0": CONVERT, "1": CONVERT}),
    "two outputs": Hazard(Octave, {"split": CONVERT, "high": CONVERT}),
    "held for a functional call": Hazard(Mixer, {"conv1d": CONVERT}),
    "held for a functional call, run": Hazard(Mixer, {"conv1d": CONVERT}, example=True),
    "masked": Hazard(lambda: nn.Sequential(conv(), Masked(3, 3, 3)), {"0": CONVERT, "1": Reason.WRITTEN}),
    "masked by items": Hazard(
        lambda: nn.Sequential(conv(), MaskedByItems(3, 3, 3)), {"0": CONVERT, "1": Reason.WRITTEN}
    ),
    "masked, untraceable": Hazard(
        lambda: nn.Sequential(conv(), MaskedUntraceable(3, 3, 3)), {"0": CONVERT, "1": Reason.WRITTEN}
    ),
    "max norm": Hazard(lambda: nn.Sequential(conv(), MaxNorm(3, 3, 3)), {"0": CONVERT, "1": Reason.WRITTEN}),
    "max norm in training": Hazard(
        lambda: nn.Sequential(conv(), MaxNormInTraining(3, 3, 3)), {"0": CONVERT, "1": Reason.WRITTEN}
    ),
    "written by its parent": Hazard(WrittenByParent, {"stem": CONVERT, "conv": Reason.WRITTEN}),
    "written by its parent, untraceable": Hazard(
        WrittenByParentUntraceable, {"stem": CONVERT, "conv": Reason.WRITTEN}, example=True
    ),
    "written in eval": Hazard(Rebuilt, {"first": CONVERT, "second": CONVERT, "eval_conv": Reason.WRITTEN}),
    "other kernel": Hazard(lambda: nn.Sequential(conv(), OtherKernel()), {"0": CONVERT, "1": Reason.COMPUTED}),
    "instance forward": Hazard(lambda: nn.Sequential(with_forward(conv(), patched_forward)), {"0": CONVERT}),
    "standardizing instance forward": Hazard(
        lambda: nn.Sequential(conv(), with_forward(conv(), standardizing_forward)),
        {"0": CONVERT, "1": CONVERT},
    ),
    "instance forward of a block": Hazard(
        lambda: nn.Sequential(with_forward(nn.Sequential(conv(), conv()), lambda self, x: self[1](self[0](x)) + x)),
        {"0.0": CONVERT, "0.1": CONVERT},
    ),
    "functional": Hazard(FixedGroups, {"weight": CONVERT, "kernel": CONVERT}),
    "functional, computed groups": Hazard(Functional, {"weight": CONVERT, "kernel": CONVERT}, example=True),
    "functional, untraceable": Hazard(
        FunctionalUntraceable, {"weight": CONVERT, "kernel": CONVERT, "stem": CONVERT}, example=True
    ),
    "control flow": Hazard(ControlFlow, {"mix": CONVERT, "rare": CONVERT}),
    "control flow, run": Hazard(ControlFlow, {"mix": CONVERT, "rare": CONVERT}, example=True),
    "training only": Hazard(TrainingOnly, {"kernel": CONVERT, "body": CONVERT}),
    "transposed": Hazard(
        lambda: nn.Sequential(conv(), nn.ConvTranspose2d(3, 3, 3)), {"0": CONVERT, "1": Reason.TRANSPOSED}
    ),
    "blur": Hazard(Blur, {"filt": Reason.BLUR_FILTER, "stem": CONVERT}),
    "blur, run": Hazard(Blur, {"filt": Reason.BLUR_FILTER, "stem": CONVERT}, example=True),
    "conditional": Hazard(Conditional, {"conv2d": Reason.INPUT_DEPENDENT, "stem": CONVERT}),
    "conditional, untraceable": Hazard(
        ConditionalUntraceable, {"weight": Reason.INPUT_DEPENDENT, "stem": CONVERT}, example=True
    ),
    "computed": Hazard(Computed, {"conv2d": Reason.COMPUTED, "stem": CONVERT}),
    "weight norm": Hazard(parametrized(parametrizations.weight_norm), {"0": CONVERT, "1": Reason.PARAMETRIZED}),
    "old weight norm": Hazard(parametrized(nn.utils.weight_norm), {"0": CONVERT, "1": Reason.PARAMETRIZED}),
    "spectral norm": Hazard(parametrized(parametrizations.spectral_norm), {"0": CONVERT, "1": Reason.PARAMETRIZED}),
    "pruned": Hazard(
        parametrized(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
        {"0": CONVERT, "1": Reason.PARAMETRIZED},
    ),
    "parametrized bias": Hazard(
        parametrized(lambda layer: register_parametrization(layer, "bias", Halve())), {"0": CONVERT, "1": CONVERT}
    ),
    "frozen": Hazard(frozen, {"0": CONVERT, "1": CONVERT}),
    "1x9": Hazard(lambda: nn.Sequential(nn.Conv2d(3, 3, (1, 5), groups=3)), {"0": CONVERT}),
    "31x31 depthwise": Hazard(
        lambda: nn.Sequential(conv(), nn.Conv2d(32, 32, 31, groups=32)), {"0": CONVERT, "1": Reason.TOO_LARGE}
    ),
    "writes attributes": Hazard(WritesAttributes, {"body": CONVERT}),
    "lists": Hazard(Lists, {"rows.0": CONVERT, "rows.1": CONVERT, "named": CONVERT, "named.edge": CONVERT}),
    "1-D and 3-D": Hazard(Spatial, {"one": CONVERT, "two": CONVERT, "three": CONVERT}),
    "batch norm": Hazard(
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(3), nn.Dropout(), conv(groups=3)), {"0": CONVERT, "3": CONVERT}
    ),
}
UNRUNNABLE = {"31x31 depthwise"}  # only planned: its input would be too large for a test
# Not before the conversion either.
NOT_PICKLABLE = {"weight norm", "spectral norm", "parametrized bias"} | {n for n in HAZARDS if "instance forward" in n}


def make(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return HAZARDS[name].make().double().eval()


def image() -> Tensor:
    return varied_images(2, 3, 8, 8).double()


def convert(name: str, model: nn.Module, **options: Any) -> nn.Module:
    return to_doconv(model, example_inputs=(image(),) if HAZARDS[name].example else None, **options)


@pytest.mark.parametrize("name", HAZARDS)
def test_plan(name: str) -> None:
    hazard, model = HAZARDS[name], make(name)
    state = {key: (id(t), t._version) for key, t in model.state_dict(keep_vars=True).items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    rows = plan(model, (image(),) if hazard.example else None).rows
    got = {row.name: CONVERT if row.action == CONVERT else Reason(row.reason) for row in rows}
    assert got == hazard.rows
    assert len(rows) == len(got)
    for row in rows:
        assert hazard.aliases.get(row.name, row.aliases) == row.aliases
    assert {key: (id(t), t._version) for key, t in model.state_dict(keep_vars=True).items()} == state
    assert [dict(vars(module)) for module in model.modules()] == attributes


def test_training_and_eval_agree_where_a_layer_is_rebuilt() -> None:
    """The forward that rebuilds the kernel for eval reads those that train."""
    model, x = randomize(convert("written in eval", make("written in eval")), seed=0), image()
    trained = model.train()(x)
    assert difference(trained, make("written in eval").train()(x)) > MOVED
    assert difference(run(model.eval(), x), trained) < TOLERANCE


def test_looking_at_a_forward_that_writes_changes_nothing() -> None:
    for name in ("masked", "masked, untraceable", "max norm", "written by its parent, untraceable"):
        model = make(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        plan(model, (image(),))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        run(model, image())
        assert not all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("d_mul", ["K", "K+3"])
@pytest.mark.parametrize("name", [name for name in HAZARDS if name not in UNRUNNABLE])
def test_convert_copy_and_fold(name: str, d_mul: str) -> None:
    original, x = make(name), image()
    expected = signature(original)
    requires_grad = {key: p.requires_grad for key, p in original.named_parameters()}
    converted = convert(name, original, d_mul=d_mul)
    assert equal(run(converted, x), run(original, x))
    assert equal(run(copy_model(converted).train(), x), run(copy_model(original).train(), x))
    moved = run(randomize(converted, seed=0), x)
    assert difference(moved, run(original, x)) > MOVED
    assert equal(run(copy_model(converted), x), moved)
    if name not in NOT_PICKLABLE:
        assert equal(run(pickle.loads(pickle.dumps(converted)), x), moved)
    again = convert(name, converted)
    assert signature(again)[0] == signature(converted)[0]
    assert equal(run(again, x), moved)
    folded = fold(converted)
    assert difference(run(folded, x), moved) <= TOLERANCE
    assert signature(folded) == expected
    assert {key: p.requires_grad for key, p in folded.named_parameters()} == requires_grad
    original.load_state_dict(folded.state_dict())
    assert difference(run(original, x), moved) <= TOLERANCE


def test_a_hazard_of_each_reason_is_here() -> None:
    shown = {reason for hazard in HAZARDS.values() for reason in hazard.rows.values()}
    elsewhere = {Reason.LAZY, Reason.QUANTIZED, Reason.COMPLEX, Reason.EXCLUDED}
    assert {reason for reason in Reason if reason not in shown} == elsewhere


def test_pickling_fails_only_where_it_failed_before() -> None:
    for name in NOT_PICKLABLE:
        with pytest.raises((RuntimeError, AttributeError, pickle.PicklingError)):
            pickle.loads(pickle.dumps(make(name)))


@pytest.mark.parametrize(
    "name", ["functional, untraceable", "functional, computed groups", "read outside, untraceable"]
)
def test_what_was_not_looked_into_is_named(name: str) -> None:
    model = make(name)
    assert plan(model).not_looked_into == [""]
    assert plan(model, (image(),)).not_looked_into == []
    assert "not looked into" in str(plan(model))


def test_calls_and_sizes_come_from_one_forward() -> None:
    model, x = make("control flow"), image()
    mix, rare = plan(model, (x,)).rows
    assert (mix.calls, mix.output_size, mix.macs) == (2, [8, 8], 2 * 2 * 64 * 3 * 27)
    assert (rare.calls, rare.output_size, rare.macs) == (0, None, None)
    assert mix.added_parameters == 3 * 81
    for given in ((x,), [x], {"x": x}, x):
        again = plan(convert("control flow", model), given).rows[0]
        assert (again.action, again.added_parameters) == ("already DO-Conv", 0)
        assert (again.calls, again.output_size, again.macs) == (mix.calls, mix.output_size, mix.macs)


def test_nothing_leaks_from_tracing() -> None:
    for name in ("writes attributes", "control flow", "lists"):
        converted = convert(name, make(name))
        for module in converted.modules():
            assert not any("Proxy" in repr(value) for value in vars(module).values())
    converted = convert("writes attributes", make("writes attributes"))
    assert (converted.calls, converted.seen, hasattr(converted, "last")) == (0, [], False)
    run(converted, image())
    assert converted.calls == 1


class Draws(nn.Module):
    """Draws while it is traced, from both global generators."""

    def __init__(self) -> None:
        super().__init__()
        self.body = SamePadding(3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + torch.rand(1).item() * random.random())


def test_a_forward_that_draws_leaves_the_random_states_alone() -> None:
    model = Draws()
    with random_state_untouched():
        plan(model, (varied_images(2, 3, 8, 8),))
        fold(to_doconv(model, d_mul="2K"))


def test_d_takes_requires_grad() -> None:
    converted = convert("frozen", make("frozen"), d_mul="K+3")
    assert {key: p.requires_grad for key, p in converted.named_parameters()} == {
        f"{layer}.{name}": layer == 1 for layer in (0, 1) for name in ("weight", "bias", "D", "weight_extra")
    }


def test_parameters_that_share_a_kernel_share_d() -> None:
    tied: Any = convert("tied parameter", make("tied parameter"))
    assert tied.left is not tied.right
    assert tied.left.D is tied.right.D
    alias: Any = convert("alias", make("alias"))
    assert alias.first is alias.again


def test_repr_and_isinstance_survive() -> None:
    for name in ("lists", "same padding", "read outside"):
        model = make(name)
        converted = convert(name, model)
        assert repr(converted)
        for before, after in zip(model.modules(), converted.modules(), strict=True):
            assert isinstance(after, type(before))


def test_assigning_a_kernel_starts_anew() -> None:
    converted: Any = randomize(convert("functional", make("functional")), seed=0)
    kernel = nn.Parameter(torch.randn(3, 1, 3, 3, dtype=torch.float64))
    converted.kernel = kernel
    assert not converted.kernel_D.any()
    assert converted.D.any()
    assert torch.equal(converted.kernel, kernel)


def test_a_plain_state_dict_loads_into_overlaid_modules() -> None:
    original, x = make("functional"), image()
    converted = randomize(convert("functional", original, d_mul="K+3"), seed=0)
    assert difference(run(converted, x), run(original, x)) > MOVED
    converted.load_state_dict(original.state_dict())
    assert equal(run(converted, x), run(original, x))
    state = converted.state_dict()
    del state["kernel_extra"]
    assert converted.load_state_dict(state, strict=False).missing_keys == ["kernel_extra"]


def test_hooks_survive() -> None:
    calls = []
    model: Any = make("tied parameter")
    model.left.register_forward_hook(lambda *_: calls.append("left"))
    converted = to_doconv(model)
    calls.clear()
    run(converted, image())
    run(fold(converted), image())
    assert calls == ["left", "left"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    for name in ("functional", "read outside", "same padding"):
        original, x = make(name).to(dtype), image().to(dtype)
        converted = convert(name, original)
        assert {p.dtype for p in converted.parameters()} == {dtype}
        assert equal(run(converted, x), run(original, x))
        moved = run(randomize(converted, seed=0), x)
        assert difference(moved, run(original, x)) > MOVED
        # The fold rounds once what training rounded once: the same bits, but for two orders of summation.
        assert difference(run(fold(converted), x), moved) < 1e-3


@pytest.mark.parametrize("name", ["same padding", "functional", "read outside", "batch norm"])
def test_channels_last_is_kept(name: str) -> None:
    original = make(name).to(memory_format=torch.channels_last)
    x = image().to(memory_format=torch.channels_last)
    converted = convert(name, original)
    assert equal(run(converted, x), run(original, x))
    moved = run(randomize(converted, seed=0), x)
    folded = fold(converted)
    assert difference(run(folded, x), moved) <= TOLERANCE
    assert [p.stride() for p in folded.parameters()] == [p.stride() for p in original.parameters()]


@pytest.mark.parametrize("name", ["functional", "lists", "read outside", "same padding"])
def test_overlaid_modules_under_torchs_engines(name: str) -> None:
    original, x = make(name), image()
    converted = randomize(convert(name, original, d_mul="K+3"), seed=0)
    moved = run(converted, x)
    assert difference(moved, run(original, x)) > MOVED
    assert equal(run(torch.compile(converted, backend="eager", fullgraph=True), x), moved)
    assert equal(run(torch.export.export(converted, (x,)).module(), x), moved)
    doubled = {key: 2 * p.detach() for key, p in converted.named_parameters()}
    by_hand = copy_model(converted)
    with torch.no_grad():
        for p in by_hand.parameters():
            p.mul_(2)
    assert equal(torch.func.functional_call(converted, doubled, (x,)), by_hand(x))
    assert difference(by_hand(x), moved) > MOVED
    loaded = convert(name, original, d_mul="K+3")
    loaded.load_state_dict(converted.state_dict(), assign=True)
    assert equal(run(fold(loaded), x), run(fold(converted), x))


def test_every_parameter_of_an_overlaid_module_gets_its_gradient() -> None:
    converted = randomize(convert("functional", make("functional"), d_mul="K+3"), seed=0)
    names = [name for name, _ in converted.named_parameters()]
    assert names == ["weight", "kernel", "D", "weight_extra", "kernel_D", "kernel_extra"]

    def function(*tensors: Tensor) -> Tensor:
        result = torch.func.functional_call(converted, dict(zip(names, tensors, strict=True)), (image()[..., :4, :4],))
        assert isinstance(result, Tensor)
        return result

    assert torch.autograd.gradcheck(function, tuple(converted.parameters()))
