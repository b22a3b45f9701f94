"""Other people's layers, folded by what they compute and not by what their parameters are called."""

import copy
import math
from typing import Any

import pytest
import torch
from support import difference, equal, run, varied_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torchvision.models.convnext import CNBlock

from doconv_convert import DoconvError, fold, to_doconv
from doconv_convert.rewrite.convert import copy_model
from doconv_convert.rewrite.fold import fold_in_place
from doconv_convert.rewrite.foreign import by_graph
from doconv_convert.rewrite.foreign.torch_export import sample_input

MOVED = 0.1
# float64: the largest seen was 0.
TOLERANCE = 1e-12


class Foreign(nn.Module):
    """The published layer, from its description: W, D, a stored identity; with groups, output o reads group o % g."""

    def __init__(
        self, c_in: int, c_out: int, size: int = 3, *, groups: int = 1, bias: bool = True, mode: str = "zeros"
    ) -> None:
        super().__init__()
        self.c_in, self.c_out, self.size, self.groups, self.mode = c_in, c_out, size, groups, mode
        self.W = nn.Parameter(torch.randn(c_out, c_in // groups, size * size) / size)
        self.D = nn.Parameter(torch.randn(c_in, size * size, size * size) / size)
        self.register_buffer("d_diag", torch.eye(size * size).repeat(c_in, 1, 1))
        self.bias = nn.Parameter(torch.randn(c_out)) if bias else None

    def kernel(self) -> Tensor:
        w = self.W.reshape(self.c_out // self.groups, self.c_in, -1)
        dow = torch.einsum("ims,ois->oim", self.D + self.d_diag, w)
        return dow.reshape(self.c_out, self.c_in // self.groups, self.size, self.size)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel()
        if self.mode == "zeros":
            return F.conv2d(x, kernel, self.bias, 1, self.size // 2, groups=self.groups)
        x = F.pad(x, (self.size // 2,) * 4, mode=self.mode)
        return F.conv2d(x, kernel, self.bias, groups=self.groups)


class Scaled(Foreign):
    """Kernel and bias times a learned number."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.mul = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel() * self.mul, self.bias * self.mul, padding=1)


class Gated(Foreign):
    """Keys like Foreign's; a module without parameters stands between the composition and the convolution."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__(3, 4)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.gate(self.kernel()), self.bias, padding=1)


class Brand(nn.Module):
    """Parameters whose names sound random."""

    def __init__(self) -> None:
        super().__init__()
        self.brand, self.dropout_gain = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.brand * self.dropout_gain)


class ReadsShapes(Foreign):
    """The channels come from the input's shape, the kernel's dtype from the input's."""

    def __init__(self) -> None:
        super().__init__(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel().reshape(self.c_out, x.shape[1] // self.groups, self.size, -1).to(x.dtype)
        if x.shape[1] != self.c_in or x.dim() != 4:
            raise ValueError("wrong input")
        return F.conv2d(x, kernel, self.bias, padding=1)


class PadsByLayer(Foreign):
    """The padding is a layer of torch's own before the convolution."""

    def __init__(self, pad: nn.Module) -> None:
        super().__init__(3, 4)
        self.pad = pad

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.kernel(), self.bias)


class BranchesInTraining(Foreign):
    """A kernel that is dropped in training, and a factor in a buffer."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.register_buffer("scale", torch.full((4, 1, 1, 1), 1.25))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel() * self.scale
        if self.training:
            x, kernel = x + torch.randn_like(x), F.dropout(kernel)
        return F.conv2d(x, kernel, self.bias, padding=1)


class Row(nn.Module):
    """1-D, strided and dilated, the kernel's names and formula its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 3 * 5))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, (self.a @ self.b).view(4, 3, 5), None, 2, 4, 2)


def image() -> Tensor:
    return varied_images(2, 3, 8, 8).double()


def seeded(factory: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return factory().double().eval()


FOLDED = {
    "plain": lambda: Foreign(3, 4),
    "no bias": lambda: Foreign(3, 4, bias=False),
    "depthwise": lambda: Foreign(3, 6, groups=3),
    "5x5": lambda: Foreign(3, 4, 5),
    "one number a channel": lambda: Foreign(3, 3, 1, groups=3),
    "reflect": lambda: Foreign(3, 4, mode="reflect"),
    "replicate": lambda: Foreign(3, 4, mode="replicate"),
    "circular": lambda: Foreign(3, 4, mode="circular"),
    "constant": lambda: Foreign(3, 4, mode="constant"),
    "scaled": Scaled,
    "gated": lambda: Gated(nn.Sigmoid()),
    "dropped in training only": lambda: Gated(nn.Dropout()),
    "names": Brand,
    "shape reads": ReadsShapes,
    "zeros by a layer": lambda: PadsByLayer(nn.ZeroPad2d(1)),
    "reflection by a layer": lambda: PadsByLayer(nn.ReflectionPad2d(1)),
    "a training branch and a buffer": BranchesInTraining,
    "1-D": Row,
}


@pytest.mark.parametrize("at_root", [False, True], ids=["inside", "root"])
@pytest.mark.parametrize("name", FOLDED)
def test_folded_by_graph(name: str, at_root: bool) -> None:
    layer, x = seeded(FOLDED[name]), image().flatten(2) if name == "1-D" else image()
    model = layer if at_root else nn.Sequential(layer, nn.ReLU()).eval()
    before = run(model, x)
    folded = fold(model)
    conv: Any = folded if at_root else folded[0]
    assert type(conv) in (nn.Conv1d, nn.Conv2d)
    assert set(folded.state_dict()) <= {"weight", "bias", "0.weight", "0.bias"}
    assert difference(run(folded, x), before) <= TOLERANCE
    with torch.no_grad():
        conv.weight.copy_(conv.weight.roll(1, 0))
    assert difference(run(folded, x), before) > MOVED


def test_grouped_units_follow_the_classs_own_pairing() -> None:
    """Theirs pairs rows of D with outputs otherwise than ours does: only the class's own code tells."""
    layer, x = seeded(lambda: Foreign(4, 8, groups=2)), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    before = run(layer, x)
    folded = fold(nn.Sequential(layer))
    assert difference(run(folded, x), before) <= TOLERANCE
    assert folded[0].groups == 2  # type: ignore[index, union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plain_layer_is_like_the_foreign_one(dtype: torch.dtype) -> None:
    layer = seeded(lambda: Foreign(3, 4)).train().to(dtype).requires_grad_(False)
    exact = copy.deepcopy(layer).double().kernel()  # type: ignore[operator]
    conv: Any = fold(nn.Sequential(layer).train())[0]  # type: ignore[index]
    assert conv.training
    assert torch.equal(conv.weight, exact.to(dtype))
    assert not conv.weight.requires_grad


def test_one_layer_under_two_names_stays_one() -> None:
    layer = seeded(lambda: Foreign(3, 3))
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, layer)})
    before = run(model["b"], image())
    folded: Any = fold(model)
    assert folded["a"] is folded["b"][0] is folded["b"][1]
    assert difference(run(folded["b"], image()), before) <= TOLERANCE


class InputDependent(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel() * x.mean(), padding=1)


class InputBias(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), x.mean((0, 2, 3)).sum() * self.bias)


class Random(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, F.dropout(self.kernel(), 0.5, True), self.bias)


class Noise(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel()
        return F.conv2d(x, kernel + torch.empty_like(kernel).normal_(), self.bias)


class PadsFromSize(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        return F.conv2d(x, self.kernel(), self.bias)


class BranchesOnSize(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        return F.conv2d(x, self.kernel(), self.bias)


class SamePadding(Foreign):
    """Pads that make the output as large as the input, as hand-written copies of TensorFlow's do."""

    def forward(self, x: Tensor) -> Tensor:
        needed = [max((math.ceil(n / 2) - 1) * 2 + self.size - n, 0) for n in x.shape[-2:]]
        if any(needed):
            x = F.pad(x, (needed[1] // 2, needed[1] - needed[1] // 2, needed[0] // 2, needed[0] - needed[0] // 2))
        return F.conv2d(x, self.kernel(), self.bias, 2)


class Remembers(Foreign):
    """Its trace is a plain convolution, its forward is not: it looks at the values of its input outside of torch."""

    def forward(self, x: Tensor) -> Tensor:
        bright = 1.0 if isinstance(x, torch.fx.Proxy) else 1.0 + float(x.detach().numpy().mean() > -9)
        return F.conv2d(x, self.kernel() * bright, self.bias)


class UnequalPads(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1)), self.kernel(), self.bias)


class ValuePad(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0), self.kernel(), self.bias)


class Activated(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel(), self.bias).relu()


class Normalized(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x - x.mean(), self.kernel(), self.bias)


class Twice(Foreign):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.kernel()), self.kernel())


DECLINED = {
    InputDependent: "its kernel depends on the input",
    InputBias: "its bias depends on the input",
    Random: "its kernel is drawn at random",
    Noise: "its kernel is drawn at random",
    PadsFromSize: "its pads are computed from the input's size",
    BranchesOnSize: "its path or its pads are computed from the input's size",
    SamePadding: "its path or its pads are computed from the input's size",
    Remembers: "its output is not the convolution's",
    UnequalPads: "its pads differ on the two sides",
    ValuePad: "it pads with 1.0",
    Activated: "it does more than convolve: its output is not the convolution's",
    Normalized: "it does more than pad its input before the convolution",
    Twice: "it makes 2 convolution calls, expected 1",
}


@pytest.mark.parametrize("cls", DECLINED)
def test_declined_with_the_reason(cls: Any) -> None:
    model, x = nn.Sequential(seeded(lambda: cls(3, 3)), seeded(lambda: Foreign(3, 3))).double(), image()
    before = run(model, x)
    report = fold_in_place(copy_model(model))
    told = {one.name: one.declined for one in report.foreign}
    assert DECLINED[cls] in str(told["0"])
    assert told["1"] is None
    assert type(report.model[0]) is cls  # type: ignore[index]
    assert difference(run(report.model, x), before) <= TOLERANCE


def test_a_foreign_kernel_that_is_not_finite_is_declined() -> None:
    layer: Any = seeded(lambda: Foreign(3, 4))
    with torch.no_grad():
        layer.W[0, 0, 0] = float("inf")
    (one,) = fold_in_place(nn.Sequential(layer)).foreign
    assert one.declined == "its kernel is not finite"


def test_a_block_that_owns_a_scale_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []
    monkeypatch.setattr(by_graph, "trace", lambda module, **_: traced.append(type(module).__name__))
    block = CNBlock(4, 1.0, 0.0)
    for network in (nn.Sequential(block), nn.Sequential(block, Foreign(3, 3, 1, groups=3))):
        fold_in_place(network)
    assert traced == ["Foreign"]


def test_modules_that_own_parameters_but_no_convolution_are_not_mentioned() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 3, 8, 8))
            self.layer = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.position)

    report = fold_in_place(nn.Sequential(Embedding(), nn.Linear(4, 4)))
    assert report.foreign == []


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


CONSTANT = {
    "weight norm": lambda: weight_norm(nn.Conv2d(3, 4, 3, padding=1)),
    "spectral norm": lambda: spectral_norm(nn.Conv2d(3, 4, 3, padding=1)),
    "weight standardization": lambda: Standardized(3, 4, 3, padding=1),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_constant_kernels_are_folded_on_demand(name: str) -> None:
    model, x = nn.Sequential(seeded(CONSTANT[name]), nn.ReLU()).eval(), image()
    before = run(model, x)
    kept = fold(model)
    assert type(kept[0]) is type(model[0])  # type: ignore[index]
    assert equal(run(kept, x), before)
    folded = fold(model, constant_kernels=True)
    assert type(folded[0]) is nn.Conv2d  # type: ignore[index]
    assert list(folded.state_dict()) == ["0.weight", "0.bias"]
    assert difference(run(folded, x), before) <= TOLERANCE


def test_foreign_layers_are_not_converted_on_top() -> None:
    model = nn.Sequential(seeded(lambda: Foreign(3, 4)))
    with pytest.raises(DoconvError, match="computed from parameters by its own class"):
        to_doconv(model)


def test_a_layer_alone_is_not_tried_on_inputs_that_fill_the_memory() -> None:
    """A CondConv holds its kernels as rows of millions of numbers; none is a number of channels."""
    tried: list[int] = []

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 50_000_000, device="meta"))

        def forward(self, x: Tensor) -> Tensor:
            tried.append(x.numel())
            raise ValueError("not its input")

    assert sample_input(Rows()) is None
    assert tried == [2 * 4 * 37 * 38, 2 * 4 * 37, 2 * 4 * 37 * 38 * 39]
