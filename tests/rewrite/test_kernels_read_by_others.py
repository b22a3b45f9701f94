"""Other people's code that takes `conv.weight` for the kernel, written from its description, on converted models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import difference, equal, is_d, randomize, run, signature, varied_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from doconv_convert import fold, plan, to_doconv

MOVED = 0.1
# float64: a fused kernel and the layers one by one sum in two orders.
TOLERANCE = 1e-12


class Unit(nn.Module):
    """Convolution, batch norm, activation."""

    def __init__(self, c_in: int, c_out: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, groups=groups, bias=False)
        self.bn, self.act = nn.BatchNorm2d(c_out), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def units() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(Unit(3, 8), Unit(8, 8, 4), Unit(8, 4)).double()
        for _ in range(3):
            model(torch.randn(8, 3, 9, 9, dtype=torch.float64) * 2 + 1)
    return model.eval()


def image() -> Tensor:
    return varied_images(2, 3, 9, 9).double()


def by_torch(unit: Any) -> None:
    unit.conv, unit.bn = fuse_conv_bn_eval(unit.conv, unit.bn), nn.Identity()


def by_new_layer(unit: Any) -> None:
    """As YOLO's code does: a new Conv2d, the kernel as a matrix, multiplied by the norm's diagonal."""
    conv, bn = unit.conv, unit.bn
    fused = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups, bias=True
    ).requires_grad_(False)
    fused = fused.to(conv.weight.device, conv.weight.dtype)
    matrix = conv.weight.clone().view(conv.out_channels, -1)
    scale = torch.diag(bn.weight.div(torch.sqrt(bn.eps + bn.running_var)))
    fused.weight.copy_(torch.mm(scale, matrix).view(fused.weight.shape))
    fused.bias.copy_(bn.bias - bn.weight.mul(bn.running_mean).div(torch.sqrt(bn.running_var + bn.eps)))
    unit.conv, unit.bn = fused, nn.Identity()


def in_place(unit: Any) -> None:
    """The norm's scale multiplied into the layer's own kernel."""
    scale = unit.bn.weight / torch.sqrt(unit.bn.running_var + unit.bn.eps)
    unit.conv.weight.data.mul_(scale.view(-1, 1, 1, 1))
    unit.conv.bias = nn.Parameter(unit.bn.bias - unit.bn.running_mean * scale)
    unit.bn = nn.Identity()


@pytest.mark.parametrize("d_mul", ["K", "2K"])
@pytest.mark.parametrize("fuse", [by_torch, by_new_layer, in_place])
def test_a_fused_batch_norm(fuse: Callable[[Any], None], d_mul: str) -> None:
    original = units()
    model: Any = randomize(to_doconv(original, d_mul=d_mul), seed=0)
    expected = run(model, image())
    assert difference(expected, run(original, image())) > MOVED
    with torch.no_grad():
        for unit in model:
            fuse(unit)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert difference(run(model, image()), expected) < TOLERANCE
    if fuse is not by_new_layer:
        assert difference(run(fold(model), image()), expected) < TOLERANCE


class Lora(nn.Module):
    """A low-rank change beside a frozen convolution, and its merge into that."""

    def __init__(self, base: nn.Conv2d, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Conv2d(base.in_channels, rank, 3, padding=1, bias=False, dtype=torch.float64)
        self.b = nn.Conv2d(rank, base.out_channels, 1, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + self.b(self.a(x))
        return y

    def change(self) -> Tensor:
        return F.conv2d(self.a.weight.permute(1, 0, 2, 3), self.b.weight).permute(1, 0, 2, 3)


@pytest.mark.parametrize("how", ["data +=", "data = sum", "no_grad +="])
def test_a_low_rank_change_is_merged(how: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)).double()
        layer: Any = randomize(to_doconv(plain, d_mul="K+2"), seed=0)[0]  # type: ignore[index]
        model = Lora(layer)
    expected = run(model, image())
    assert not any(p.requires_grad for p in layer.parameters())
    if how == "data +=":
        layer.weight.data += model.change()
    elif how == "data = sum":
        layer.weight.data = layer.weight.data + model.change().detach()
    else:
        with torch.no_grad():
            layer.weight += model.change()
    assert difference(run(layer, image()), expected) < TOLERANCE


def test_a_weight_norm_of_ones_own_reads_the_kernel() -> None:
    """A penalty on the kernel, written over the modules, trains D."""
    model = randomize(to_doconv(units()), seed=0)
    penalty = sum(m.weight.square().sum() for m in model.modules() if isinstance(m, nn.Conv2d))
    penalty.backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if is_d(name))


def test_initialization_loops_take_on_every_kind() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)

    original = nn.Sequential(Same(3, 4, 3), nn.Conv2d(4, 4, 3)).double()
    model: Any = randomize(to_doconv(original, d_mul="K+2"), seed=0)

    def initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=torch.Generator().manual_seed(1))

    model.apply(initialize)
    original.apply(initialize)
    assert not any(p.any() for name, p in model.named_parameters() if is_d(name))
    original.load_state_dict({k: v for k, v in model.state_dict().items() if k in original.state_dict()})
    assert equal(run(model, image()), run(original, image()))


def test_clipping_the_kernel_as_wgan_does() -> None:
    """The list of kernels is made once, before the training."""
    model: Any = randomize(to_doconv(units()), seed=0)
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        model(image()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = [m.conv.weight.detach().clamp(-0.05, 0.05) for m in model]
        for kernel in kernels:
            kernel.data.clamp_(-0.05, 0.05)
        assert all(torch.equal(m.conv.weight, e) for m, e in zip(model, expected, strict=True))


def timm_zoo(name: str) -> Any:
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = to_doconv(timm.create_model(name, num_classes=5))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if is_d(parameter_name):
                    parameter.normal_(0, 0.2)
            model.train()(varied_images(4, 3, 64, 64))
    return model.eval()


# repvit's and tiny_vit's own fuse() raise in float64: it makes float32 layers.
HALF_WAY = {"repvit_m0_9"}
CHEAP = ("mobileone_s0", "repvit_m0_9")
# timm's fuse sums in float32 what the layers sum one by one; the largest seen is below.
FP32, FP64 = 1e-6, 1e-12


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in CHEAP else [pytest.mark.zoo])
        for name in ("repvgg_a0", "mobileone_s0", "repvit_m0_9", "fastvit_t8", "repghostnet_050", "shvit_s1")
    ],
)
def test_timm_reparameterizes_an_unfolded_model(name: str) -> None:
    utils = pytest.importorskip("timm.utils")
    model = timm_zoo(name)
    x = varied_images(2, 3, 64, 64)
    for dtype, bound in ((torch.float32, FP32), (torch.float64, FP64)):
        if dtype is torch.float64 and name in HALF_WAY:
            continue
        model = copy.deepcopy(model).to(dtype)
        expected = run(model, x.to(dtype))
        merged = utils.reparameterize_model(model)
        assert len(list(merged.modules())) < len(list(model.modules()))
        assert difference(run(merged, x.to(dtype)), expected) < bound


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["dm_nfnet_f0", "nfnet_l0", "nf_resnet50", "resnetv2_50x1_bit"])
def test_nets_of_standardized_kernels(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = timm.create_model(name, num_classes=5)
    _standardized_net(original.eval(), varied_images(2, 3, 64, 64))


def test_a_small_net_of_standardized_kernels() -> None:
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = timm.create_model("test_nfnet", num_classes=5)
    _standardized_net(original.eval(), varied_images(2, 3, 64, 64))


def _standardized_net(original: nn.Module, x: Tensor) -> None:
    """Converts whole, starts exactly, trains every D by a step, folds to the original's classes and keys."""
    rows = plan(original).rows
    assert {row.action for row in rows} == {"convert"}
    model = to_doconv(original, example_inputs=None)
    assert equal(run(model, x), run(original, x))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):  # a last norm's gain may be zero at first
        F.cross_entropy(model(x), torch.tensor([0, 3])).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [name for name, p in model.named_parameters() if is_d(name) and p.any()]
    assert len(moved) == sum(row.d_mul is not None for row in rows)
    exact = copy.deepcopy(model).double().eval()
    folded = fold(exact)
    assert signature(fold(model)) == signature(original)
    assert difference(run(folded, x.double()), run(exact, x.double())) < FP64
