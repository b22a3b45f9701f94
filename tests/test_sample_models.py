"""Every sample net builds, runs in any dtype, and has the hazard that it is there to show."""

import ast
import copy
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import sample_models

NAMES = ["residual", "grouped", "functional", "tied", "control_flow", "digits"]
FOLDER = Path(sample_models.__file__).parent
PARAMETER_BUDGET = 1_500_000


def module(name: str) -> ModuleType:
    return importlib.import_module(f"sample_models.{name}")


def build(name: str) -> nn.Module:
    net = getattr(module(name), name)()
    assert isinstance(net, nn.Module)
    return net


def images(name: str, batch: int = 2) -> Tensor:
    return torch.randn(batch, *module(name).INPUT_SHAPE[1:])


def convolutions(net: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}


class Kernels(TorchFunctionMode):
    """Notes the kernel of every convolution that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: list[Tensor] = []
        self.transposed: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func in (F.conv2d, torch.conv2d):
            self.plain.append(args[1])
        elif func in (F.conv_transpose2d, torch.conv_transpose2d):
            self.transposed.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_the_folder_holds_these_nets() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*NAMES, "__init__"}
    for name in NAMES:
        assert f"- {name}: " in (sample_models.__doc__ or "")
        shape = f"{module(name).INPUT_SHAPE}"
        rows = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
        assert any(row.startswith(f"| `{name}.py` |") and row.endswith(f"| {shape} |") for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_each_file_stands_alone(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert imported <= {"torch", "numpy", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", NAMES)
def test_runs_and_trains(name: str) -> None:
    net = build(name)
    assert module(name).INPUT_SHAPE[0] == 1
    assert sum(p.numel() for p in net.parameters()) < PARAMETER_BUDGET

    net.train()
    net(images(name)).square().sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key

    net.eval()
    x = images(name, 3)
    y = net(x)
    assert y.shape[0] == 3
    assert y.isfinite().all()
    assert torch.equal(y, net(x))
    torch.testing.assert_close(net(x[:1]), y[:1])
    assert not torch.allclose(y[0], y[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_runs_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    net = build(name).eval()
    x = images(name)
    with torch.no_grad():
        expected, y = net(x), copy.deepcopy(net).to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["residual", "grouped", "functional", "tied", "digits"])
def test_traceable(name: str) -> None:
    fx.symbolic_trace(build(name))


def test_residual_has_batch_norm_and_wide_and_pointwise_layers() -> None:
    net = build("residual")
    convs = convolutions(net).values()
    assert {conv.kernel_size for conv in convs} == {(1, 1), (3, 3)}
    assert all(conv.groups == 1 and conv.out_channels >= 64 for conv in convs)
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert any(isinstance(m, nn.AdaptiveAvgPool2d) for m in net.modules())


def test_grouped_has_every_kind_of_group() -> None:
    convs = list(convolutions(build("grouped")).values())
    assert any(1 < conv.groups < conv.in_channels for conv in convs)
    depthwise = [conv for conv in convs if conv.groups == conv.in_channels]
    assert {conv.out_channels // conv.in_channels for conv in depthwise} == {1, 2}
    assert any(conv.dilation != (1, 1) for conv in convs)
    assert {(1, 7), (7, 1)} <= {conv.kernel_size for conv in convs}
    assert any(conv.padding == "same" for conv in convs)


def test_channel_shuffle_deals_the_groups_out() -> None:
    shuffle = module("grouped").ChannelShuffle(2)
    x = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert shuffle(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_functional_kernels_belong_to_no_conv() -> None:
    net = build("functional").eval()
    in_convs = {id(conv.weight) for conv in convolutions(net).values()}
    names = {id(p): key for key, p in net.named_parameters()}
    with Kernels() as seen:
        net(images("functional"))
    called = [names[id(kernel)] for kernel in seen.plain if id(kernel) not in in_convs]
    assert called == ["stem.weight", "scales.kernel", "scales.kernel"]
    assert len(seen.plain) == 4


def test_tied_kernels_are_shared() -> None:
    net = build("tied").eval()
    assert isinstance(net, module("tied").TiedNet)
    assert net.left is not net.right
    assert net.left.weight is net.right.weight
    assert net.first is net.again
    with Kernels() as seen:
        x = images("tied")
        assert net(x).shape == x.shape
    assert [id(kernel) for kernel in seen.plain] == [
        id(layer.weight) for layer in (net.encode, net.left, net.right, net.first, net.again)
    ]
    assert [id(kernel) for kernel in seen.transposed] == [id(net.encode.weight)]


def test_control_flow_is_beyond_fx_but_not_beyond_export() -> None:
    net = build("control_flow").eval()
    assert isinstance(net, module("control_flow").ControlFlowNet)
    for untraceable in (net, net.refine):
        assert any(isinstance(child, nn.Conv2d) for child in untraceable.children())
        with pytest.raises((fx.proxy.TraceError, TypeError)):
            fx.symbolic_trace(untraceable)
    fx.symbolic_trace(net.reduce)

    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (images("control_flow"),), dynamic_shapes=({0: batch},))
    x = images("control_flow", 3)
    torch.testing.assert_close(program.module()(x), net(x))


def test_control_flow_really_branches() -> None:
    net = build("control_flow").eval()
    calls = {}
    for size in (16, 32):
        with Kernels() as seen:
            net(torch.randn(1, 3, size, size))
        calls[size] = len(seen.plain)
    assert calls == {16: 4, 32: 5}
    with pytest.raises(ValueError, match="expected a batch of images"):
        net(torch.randn(3, 32, 32))


def test_digits_net_has_every_kind_of_convolution() -> None:
    convs = list(convolutions(build("digits")).values())
    assert any(conv.weight.shape == (64, 64, 3, 3) for conv in convs)
    assert any(1 < conv.groups < conv.in_channels for conv in convs)
    assert any(conv.groups == conv.in_channels > 1 for conv in convs)
    assert any(conv.kernel_size == (1, 1) for conv in convs)


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    x, y = module("digits").load_digits()
    assert x.shape == (1797, 1, 8, 8)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert y.tolist() == original.target.tolist()
    assert torch.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]

    raw = torch.from_numpy(original.images).unsqueeze(1)
    slope, offset = x.std() / raw.std(), x.mean() - raw.mean() * x.std() / raw.std()
    torch.testing.assert_close(x.double(), raw * slope.double() + offset.double(), rtol=0, atol=1e-4)
    assert abs(float(x.mean())) < 1e-3
    assert abs(float(x.std()) - 1) < 1e-3


def test_digits_split_is_fixed_and_balanced() -> None:
    digits = module("digits")
    x, y = digits.load_digits()
    (train_x, train_y), (test_x, test_y) = digits.split(x, y)
    assert torch.equal(torch.cat([train_x, test_x]), x)
    assert torch.equal(torch.cat([train_y, test_y]), y)
    assert len(test_x) == 360
    counts = torch.bincount(test_y, minlength=10)
    assert counts.min() == 33
    assert counts.max() == 37


def test_jitter_moves_by_at_most_one_pixel() -> None:
    digits = module("digits")
    x = digits.load_digits()[0][:4]
    wide = F.pad(x, (1, 1, 1, 1), value=float(x.min()))
    moves = [wide[..., i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    met = set()
    for _ in range(100):
        moved = digits.jitter(x)
        met |= {k for k, move in enumerate(moves) if torch.allclose(moved, move, rtol=0, atol=1e-6)}
    assert met == set(range(9))


def test_digits_can_be_learned() -> None:
    digits = module("digits")
    (x, y), (test_x, test_y) = digits.split(*digits.load_digits())
    net = digits.digits().train()
    steps = -(-len(x) // 64)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=3 * steps)
    for _ in range(3):
        for picked in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[picked]), y[picked]).backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        assert (net(test_x).argmax(1) == test_y).float().mean() > 0.85
