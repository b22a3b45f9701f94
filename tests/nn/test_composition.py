"""Both compositions against the paper's formula, written out slot by slot; and what they cost."""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import difference, randomize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from doconv_convert import DOConv1d, DOConv2d, DOConv3d, UsageError, feature_macs, kernel_macs
from doconv_convert.nn import composition
from doconv_convert.nn.arguments import resolve_d_mul
from doconv_convert.nn.composition import compose_kernel, row_pieces

# Said by torch once a process, of the plain layer too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.usefixtures("both_arithmetics"),
]

# Two float64 evaluations of one linear map, outputs and gradients: the largest seen was 2e-15.
TOLERANCE = 1e-12
# How far random factors must move the output before agreement is evidence.
MOVED = 0.1
CLASSES: dict[int, type[Any]] = {1: DOConv1d, 2: DOConv2d, 3: DOConv3d}


@dataclass(frozen=True)
class Case:
    kernel: tuple[int, ...] = (3, 3)
    groups: int = 1
    multiplier: int = 2  # C_out / C_in
    channels: int = 4
    stride: int = 1
    dilation: int = 1
    padding: Any = 1
    padding_mode: str = "zeros"
    d_mul: str = "K"
    bias: bool = True

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != vars(Case())[k]]
        return ",".join(changed).replace(" ", "") or "default"

    def layer(self, **options: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return CLASSES[len(self.kernel)](
                self.channels,
                self.channels * self.multiplier,
                self.kernel,
                self.stride,
                self.padding,
                self.dilation,
                self.groups,
                self.bias,
                self.padding_mode,
                dtype=torch.float64,
                d_mul=self.d_mul,
                **options,
            )

    def image(self) -> Tensor:
        size = [(k - 1) * self.dilation + 4 for k in self.kernel]
        generator = torch.Generator().manual_seed(1)
        return torch.randn(2, self.channels, *size, generator=generator, dtype=torch.float64)


GROUPINGS = {"full": (1, 2), "grouped": (2, 2), "depthwise": (4, 1), "multiplier": (4, 2)}
CASES = [
    *(
        Case(kernel, g, m, padding=[k // 2 for k in kernel], d_mul=d_mul)
        for kernel, (g, m), d_mul in itertools.product(
            [(3, 3), (5, 5), (1, 7), (2, 2), (7, 7)], GROUPINGS.values(), ["K", "K+3", "2K"]
        )
    ),
    *(
        Case(kernel, g, m, padding=1, d_mul=d_mul)
        for kernel in [(3,), (3, 2, 3)]
        for g, m in GROUPINGS.values()
        for d_mul in ["K", "K+3"]
    ),
    *(
        Case((3, 2), g, m, padding=padding, padding_mode=mode, dilation=dilation, d_mul="K+3")
        for mode in ("zeros", "reflect", "replicate", "circular")
        for padding in (0, 1, (2, 1), (0, 2), "same", "valid")
        for dilation in (1, 2)
        for g, m in [GROUPINGS["grouped"], GROUPINGS["multiplier"]]
    ),
    Case(stride=2),
    Case(stride=2, dilation=2, padding=2, groups=2),
    Case(stride=3, padding=(0, 2), padding_mode="circular", groups=4),
    Case(bias=False, groups=2),
    Case((3,), padding="same", padding_mode="reflect", dilation=2),
    Case((2, 3, 2), padding="same", padding_mode="replicate", groups=2),
]


def textbook_kernel(weight: Tensor, d: Tensor, extra: Tensor | None, groups: int) -> Tensor:
    """k[o, j, p] = sum_s D^[c, p, s] W[o, j, s], one slot at a time."""
    c_out, per_group, *size = weight.shape
    w = weight.reshape(c_out, per_group, -1)
    if extra is not None:
        w = torch.cat([w, extra], 2)
    d_hat = d + torch.eye(d.shape[1], d.shape[2], dtype=d.dtype)
    q = c_out // groups
    rows = [
        torch.stack([torch.einsum("ps,s->p", d_hat[(o // q) * per_group + j], w[o, j]) for j in range(per_group)])
        for o in range(c_out)
    ]
    return torch.stack(rows).reshape(c_out, per_group, *size)


def gradients(layer: nn.Module, result: Tensor, x: Tensor) -> dict[str, Tensor]:
    leaves = {"x": x, **dict(layer.named_parameters())}
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(result.shape, generator=generator, dtype=result.dtype)
    return dict(zip(leaves, torch.autograd.grad((result * direction).sum(), list(leaves.values())), strict=True))


def check_against_textbook(case: Case) -> None:
    by_kernel: Any = randomize(case.layer(), seed=3)
    by_features: Any = randomize(case.layer(composition="feature"), seed=3)
    plain: Any = getattr(nn, f"Conv{len(case.kernel)}d")
    conv = plain(
        by_kernel.in_channels,
        by_kernel.out_channels,
        case.kernel,
        case.stride,
        case.padding,
        case.dilation,
        case.groups,
        case.bias,
        case.padding_mode,
        device="meta",
    )
    x = case.image().requires_grad_()
    kernel = textbook_kernel(by_kernel.weight_first_slots, by_kernel.D, by_kernel.weight_extra, case.groups)
    reference = conv._conv_forward(x, kernel, by_kernel.bias)
    assert difference(by_kernel._conv_forward(x, by_kernel.weight_first_slots, by_kernel.bias), reference) > MOVED
    expected = gradients(by_kernel, reference, x)
    assert difference(by_kernel.effective_kernel(), kernel) <= TOLERANCE
    for layer in (by_kernel, by_features):
        result = layer(x)
        assert difference(result, reference) <= TOLERANCE
        for name, gradient in gradients(layer, result, x).items():
            assert difference(gradient, expected[name]) <= TOLERANCE, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_compositions_are_the_papers(case: Case) -> None:
    check_against_textbook(case)


@pytest.mark.parametrize("composition", ["kernel", "feature"])
@pytest.mark.parametrize(("groups", "multiplier"), GROUPINGS.values(), ids=list(GROUPINGS))
def test_gradcheck(groups: int, multiplier: int, composition: str) -> None:
    layer = randomize(Case((2, 2), groups, multiplier, d_mul="K+3").layer(composition=composition), seed=0)
    names = [name for name, _ in layer.named_parameters()]

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        result = torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))
        assert isinstance(result, Tensor)
        return result

    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *layer.parameters()))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    spatial = draw(st.sampled_from([1, 2, 2, 2, 3]))
    kernel = (*(draw(st.integers(1, 3)) for _ in range(spatial - 1)), draw(st.integers(2, 4)))
    channels = draw(st.sampled_from([1, 2, 4, 6]))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 6) if channels % g == 0]))
    dilation = draw(st.integers(1, 2))
    stride = draw(st.integers(1, 2))
    amounts = st.tuples(*[st.integers(0, 2)] * spatial)
    padding = draw(amounts if stride > 1 else st.one_of(amounts, st.sampled_from(["same", "valid"])))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    extra = draw(st.sampled_from(["K", "K+1", "2K", "3K+2"]))
    multiplier = draw(st.integers(1, 3))
    return Case(kernel, groups, multiplier, channels, stride, dilation, padding, mode, extra, draw(st.booleans()))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(cases())
def test_any_layer_is_the_papers(case: Case) -> None:
    check_against_textbook(case)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_kernel_is_laid_out_like_the_weight(memory_format: torch.memory_format) -> None:
    layer: Any = randomize(DOConv2d(8, 6, 3, groups=2).to(memory_format=memory_format), seed=0)
    assert layer.effective_kernel().stride() == layer.weight.stride()
    assert layer.to_conv().weight.stride() == layer.weight.stride()
    assert layer.weight.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("numbers", [1, 30, 100, 10**6])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("d_mul", ["K", "K+3"])
def test_a_kernel_composed_in_pieces(d_mul: str, groups: int, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = randomize(Case(channels=8, groups=groups, d_mul=d_mul).layer(), seed=0)
    parts = layer.weight_first_slots, layer.D, layer.weight_extra, groups
    whole = compose_kernel(*parts)  # with gradients, never in pieces
    assert difference(whole, layer.weight_first_slots) > MOVED
    monkeypatch.setattr(composition, "PIECE", numbers)
    pieces = list(row_pieces(layer.weight.shape, groups))
    assert [row for rows, _, _ in pieces for row in range(rows.start, rows.stop)] == list(range(16))
    row = layer.weight_first_slots[0].numel()
    assert all((rows.stop - rows.start) * row <= max(numbers, row) for rows, _, _ in pieces)
    assert numbers not in (1, 10**6) or len(pieces) == {1: 16, 10**6: 1}[numbers]
    with torch.no_grad():
        assert difference(compose_kernel(*parts), whole) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_composition_is_never_in_half_precision(dtype: torch.dtype) -> None:
    layer: Any = DOConv2d(4, 6, 3, d_mul="K+3").to(dtype)
    with torch.no_grad():
        layer.D.fill_(1e-3)
    wide = compose_kernel(layer.weight_first_slots.float(), layer.D.float(), layer.weight_extra.float())
    with torch.autocast("cpu", torch.bfloat16):
        kernel = layer.effective_kernel()
    assert kernel.dtype == dtype
    assert not torch.equal(kernel, layer.weight_first_slots)
    assert torch.equal(kernel, wide.to(dtype))


def test_d_mul_texts() -> None:
    assert [resolve_d_mul(text, 9) for text in (12, "12", "K", "2K", "K+3", "2K + 1")] == [12, 12, 9, 18, 12, 19]
    for text in ("k", "K-1", "1.5K", "", "K+", True):
        with pytest.raises(UsageError, match="expected a number such as 9, or 'K', '2K', 'K\\+3'"):
            resolve_d_mul(text, 9)


def textbook_macs(case: Case, x: Tensor, composition: str) -> int:
    """What torch's own counter finds in a composition written with one einsum a group, or two convolutions."""
    layer: Any = case.layer(composition=composition)
    spatial, groups = len(case.kernel), case.groups
    convolve: Any = getattr(F, f"conv{spatial}d")
    w = torch.cat([t for t in (layer.weight_first_slots.flatten(2), layer.weight_extra) if t is not None], 2)
    with FlopCounterMode(display=False) as counter:
        if composition == "feature":
            d = layer.D.transpose(1, 2).reshape(-1, 1, *case.kernel)
            features = convolve(x, d, groups=x.shape[1])
            convolve(features, w.reshape(w.shape[0], -1, *[1] * spatial), groups=groups)
        else:
            split = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # (C_in, C_out/g, D_mul)
            torch.bmm(split, layer.D.transpose(1, 2))
            convolve(x, layer.weight_first_slots, groups=groups)
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize(("groups", "multiplier"), GROUPINGS.values(), ids=list(GROUPINGS))
@pytest.mark.parametrize("d_mul", ["K", "K+3"])
@pytest.mark.parametrize("kernel", [(3, 3), (5,)], ids=str)
@pytest.mark.parametrize("size", [0, 3])
def test_mac_formulas(kernel: tuple[int, ...], d_mul: str, groups: int, multiplier: int, size: int) -> None:
    case = Case(kernel, groups, multiplier, padding=0, d_mul=d_mul)
    x = torch.zeros(2, case.channels, *[k + size for k in kernel], dtype=torch.float64)
    positions = torch.Size(kernel).numel()
    shape = {
        "in_channels": case.channels,
        "out_channels": case.channels * multiplier,
        "kernel_positions": positions,
        "d_mul": resolve_d_mul(d_mul, positions),
        "groups": groups,
        "batch": 2,
        "output_volume": (size + 1) ** len(kernel),
    }
    assert kernel_macs(**shape) == textbook_macs(case, x, "kernel")
    assert feature_macs(**shape) == textbook_macs(case, x, "feature")


def test_kernel_composition_is_cheaper_exactly_where_c_out_per_group_is_below_the_outputs() -> None:
    for c_in, q, g, k, outputs in itertools.product((4, 8), (1, 2, 8), (1, 2, 4), (4, 9), (1, 2, 3, 8, 9)):
        shape = {"in_channels": c_in, "out_channels": q * g, "kernel_positions": k, "d_mul": k, "groups": g}
        costs = kernel_macs(**shape, output_volume=outputs), feature_macs(**shape, output_volume=outputs)
        assert (costs[0] < costs[1]) == (q < outputs)


def test_the_layer_knows_its_name() -> None:
    layers = [Case(groups=g).layer() for g in (1, 2, 4)]
    assert [layer.kind for layer in layers] == ["DO-Conv", "DO-GConv", "DO-DConv"]
    assert "d_mul=9, kind=DO-DConv" in repr(layers[2])
    assert "d_mul=12" in repr(Case(d_mul="K+3").layer())


def test_the_convolution_of_the_textbook_is_torchs() -> None:
    """The reference's own footing: at D = 0 the textbook kernel is `weight`."""
    layer: Any = Case(groups=2).layer()
    kernel = textbook_kernel(layer.weight_first_slots, layer.D, None, 2)
    assert torch.equal(kernel, layer.weight_first_slots)
    x = Case().image()
    assert torch.equal(F.conv2d(x, kernel, layer.bias, padding=1, groups=2), layer(x))
