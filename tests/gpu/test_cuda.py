"""What only a CUDA device can show: `pytest -m gpu`. GPU_TESTS_DEVICE=cpu runs the same lines on a CPU, which shows
that they run, and nothing about a GPU."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import difference, is_d, randomize, randomize_and_calibrate, varied_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from doconv_convert import cached, fold, save, to_doconv
from doconv_convert.nn import cuda
from doconv_convert.nn.composition import compose_kernel

DEVICE = torch.device(os.environ.get("GPU_TESTS_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
# What the steps move an entry of D by, at least.
MOVED = 1e-4
# Of the largest number, against float64.
TOLERANCE = 2e-6
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no CUDA device"),
]
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the Triton kernels were launched for; reproducible convolutions."""
    calls, launch = [], cuda._launch

    def counted(name: str, *arguments: Any) -> Any:
        calls.append(name)
        return launch(name, *arguments)

    monkeypatch.setattr(cuda, "_launch", counted)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    yield calls
    torch._dynamo.reset()


class Net(nn.Module):
    """Dense, grouped, depthwise, 7x7 and 1x1 kernels; odd and even channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.dense = nn.Conv2d(32, 40, 3, padding=1)
        self.grouped = nn.Conv2d(40, 40, 3, padding=1, groups=5)
        self.depthwise = nn.Conv2d(40, 80, 5, padding=2, groups=40)
        self.pointwise = nn.Conv2d(80, 21, 1)
        self.head = nn.Linear(21, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.dense(x))
        x = torch.relu(self.depthwise(x + self.grouped(x)))
        y: Tensor = self.head(self.pointwise(x).mean((2, 3)))
        return y


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().to(DEVICE)


def images(count: int = 32) -> tuple[Tensor, Tensor]:
    """Images and labels that can be learnt."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 4
    patterns = torch.randn(4, 3, 16, 16, generator=generator) + 2 * torch.randn(4, 3, 1, 1, generator=generator)
    x = patterns[labels] + 0.5 * torch.randn(count, 3, 16, 16, generator=generator)
    return x.to(DEVICE), labels.to(DEVICE)


def train(
    model: nn.Module,
    *,
    forward: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Tensor]:
    """The losses before each step. `dtype`: autocast, with a scaler for float16."""
    x, labels = images()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype is torch.float16)
    model.train()
    losses = []
    for _ in range(STEPS):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy((model if forward is None else forward)(x).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return losses


def assert_trained(model: nn.Module, losses: list[Tensor], expected: list[Tensor]) -> None:
    """Starts at the plain net's bits, learns at least half as much, moves every D, and folds as on the CPU."""
    assert torch.equal(losses[0], expected[0])
    gained, plain_gained = float(losses[0] - losses[-1]), float(expected[0] - expected[-1])
    assert plain_gained > 0.05
    assert gained > plain_gained / 2
    moves = [float(p.detach().abs().max()) for name, p in model.named_parameters() if is_d(name)]
    assert len(moves) == 4
    assert min(moves) > MOVED
    assert_folds_alike(model)


def assert_folds_alike(model: nn.Module) -> None:
    """fold(model on the device) has the bits of fold(model on the CPU)."""
    here, there = fold(model).state_dict(), fold(copy.deepcopy(model).cpu()).state_dict()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key].cpu(), there[key]) for key in here)


@layouts
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bfloat16", "float16"])
def test_exact_start(
    precision: str, layout: torch.memory_format, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = getattr(torch, precision, torch.float32)
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        plain = net().to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
        x = images()[0].to(dtype).contiguous(memory_format=layout)
        model = to_doconv(plain, d_mul="K+3" if precision == "tf32" else "K")
        for training in (False, True):
            plain.train(training)
            model.train(training)
            assert torch.equal(model(x), plain(x))
        assert torch.equal(model.norm.running_var, plain.norm.running_var)  # type: ignore[union-attr,arg-type]
        assert ("compose" in launched) == ON_GPU
    finally:
        torch.set_float32_matmul_precision(before)


# (C_out, C_in, groups, side), more slots than K, dtype. A kernel of its own is compiled for most.
KERNELS = [
    (64, 3, 1, 7, 0, torch.float32),
    (512, 256, 1, 3, 0, torch.float32),
    (130, 65, 1, 3, 5, torch.float32),
    (64, 128, 32, 3, 0, torch.float32),
    (96, 96, 96, 7, 0, torch.float32),
    (192, 96, 96, 3, 5, torch.float32),
    (31, 7, 1, 1, 1, torch.float32),
    (130, 65, 1, 3, 5, torch.bfloat16),
    (96, 96, 96, 7, 0, torch.bfloat16),
    (130, 65, 1, 3, 0, torch.float16),
]


@layouts
@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_the_kernels(case: tuple[Any, ...], layout: torch.memory_format, launched: list[str]) -> None:
    """Against float64, to half a unit of the dtype; the same bits again; W's bits where D is zero."""
    c_out, c_in, groups, side, more, dtype = case
    w = torch.randn(c_out, c_in // groups, side, side, device=DEVICE).to(dtype).contiguous(memory_format=layout)
    d = (torch.randn(c_in, side**2, side**2 + more, device=DEVICE) / side).to(dtype)
    extra = torch.randn(c_out, c_in // groups, more, device=DEVICE).to(dtype) if more else None
    g = torch.randn_like(w)

    def results(*given: Tensor | None) -> list[Tensor]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in given]
        kernel = compose_kernel(*leaves, groups)  # type: ignore[arg-type,misc]
        wanted = [leaf for leaf in leaves if leaf is not None]
        return [kernel.detach(), *torch.autograd.grad(kernel, wanted, g.to(kernel.dtype))]

    got, again = results(w, d, extra), results(w, d, extra)
    assert launched == ["compose", "differentiate"] * 2 * ON_GPU
    exact = results(w.double(), d.double(), None if extra is None else extra.double())
    assert difference(exact[0], w.double()) > 0.1
    unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for one, other, same in zip(got, exact, again, strict=True):
        assert ON_GPU is False or torch.equal(one, same)
        assert ((one.double() - other).abs() <= unit * other.abs() + TOLERANCE * other.abs().max()).all()
    assert got[0].stride() == w.stride()
    assert torch.equal(compose_kernel(w, torch.zeros_like(d), extra, groups), w)


def checkpointed(model: nn.Module) -> list[Tensor]:
    return train(model, forward=lambda x: checkpoint(model, x, use_reentrant=False))  # type: ignore[no-any-return]


def fused(model: nn.Module) -> list[Tensor]:
    return train(model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))


WAYS: dict[str, Callable[[nn.Module], list[Tensor]]] = {
    "fp32": train,
    "AMP bf16": lambda model: train(model, dtype=torch.bfloat16),
    "AMP fp16, GradScaler": lambda model: train(model, dtype=torch.float16),
    "channels_last, AMP bf16": lambda model: train(
        model.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        dtype=torch.bfloat16,
    ),
    "checkpointing": checkpointed,
    "AdamW fused": fused,
}


@pytest.mark.parametrize("way", WAYS)
def test_training(way: str, launched: list[str]) -> None:
    plain = net()
    model = to_doconv(plain, d_mul="K+3" if way == "fp32" else "K")
    expected = WAYS[way](plain)
    assert not launched
    losses = WAYS[way](model)
    assert ("differentiate" in launched) == ON_GPU
    assert_trained(model, losses, expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_torch_compile(dtype: torch.dtype | None, launched: list[str]) -> None:
    """Whole graphs; generated code rounds in its own order, so the start is close, and training is alike."""
    model = to_doconv(net())
    eager = train(copy.deepcopy(model), dtype=dtype)
    launched.clear()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    losses = train(model, forward=compiled, dtype=dtype)
    assert ("differentiate" in launched) == ON_GPU
    tolerance = 1e-3 if dtype is None else 3e-2
    for one, other in zip(losses, eager, strict=True):
        assert abs(float(one - other)) <= tolerance * max(1.0, abs(float(other)))
    assert_folds_alike(model)


def test_cuda_graphs(launched: list[str]) -> None:
    """A whole step is recorded once and replayed: the parameters' new values are composed, not the recorded ones."""
    if not ON_GPU:
        pytest.skip("CUDA graphs are a GPU's")
    x, labels = images()
    model, eager = to_doconv(net()), to_doconv(net())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, eager)]

    def step(which: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(which(x), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, optimizers[0])
    losses = []
    for _ in range(STEPS):
        graph.replay()
        losses.append(float(loss))
    expected = [float(step(eager, optimizers[1])) for _ in range(3 + STEPS)][3:]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]


def test_cached(launched: list[str]) -> None:
    model = to_doconv(net())
    randomize(model, 0)
    x, labels = images()
    expected = torch.autograd.grad(F.cross_entropy(model(x) + model(x), labels), list(model.parameters()))
    launched.clear()
    with cached(model):
        got = torch.autograd.grad(F.cross_entropy(model(x) + model(x), labels), list(model.parameters()))
        inside = list(launched)
    assert inside == (["compose_many"] + ["differentiate"] * 4) * ON_GPU
    assert all(difference(one, other) < 1e-4 for one, other in zip(got, expected, strict=True))


def test_gradients_of_gradients() -> None:
    w, d = torch.randn(8, 4, 3, 3, device=DEVICE), torch.randn(4, 9, 9, device=DEVICE) / 3

    def twice(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (w, d)]
        first = torch.autograd.grad(compose_kernel(*leaves).pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), leaves)

    for one, other in zip(twice(torch.float32), twice(torch.float64), strict=True):
        assert difference(one, other) < 10 * TOLERANCE


def test_functions_of_functions() -> None:
    """torch.func, per-sample gradients too, and an exported program that needs nothing of ours."""
    model = to_doconv(net()).eval()
    randomize(model, 0)
    x, labels = images(4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, p, (one[None],)), label[None])

    each = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, labels)
    for index in range(2):
        single = torch.autograd.grad(
            F.cross_entropy(model(x[index : index + 1]), labels[index : index + 1]), list(model.parameters())
        )
        for (name, _), gradient in zip(model.named_parameters(), single, strict=True):
            assert difference(each[name][index], gradient) < 1e-3, name
    program = torch.export.export(model, (x,))
    assert not any("doconv" in str(node.target) for node in program.graph.nodes)
    assert difference(program.module()(x), model(x)) < 1e-4


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Any]:
    import torch.distributed as dist

    backend = "nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist
    dist.destroy_process_group()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "fsdp2, bf16"])
def test_distributed(engine: str, one_process: Any, launched: list[str]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if "bf16" in engine and not ON_GPU:
        pytest.skip("batch norm of mixed dtypes is a GPU's")
    expected, model = train(net()), to_doconv(net())
    wrapped: Any
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if "bf16" in engine else None)
        wrapped = fully_shard(model, mesh=init_device_mesh(DEVICE.type, (1,)), mp_policy=policy)
    losses = train(wrapped)
    assert ("differentiate" in launched) == ON_GPU
    if "bf16" in engine:
        assert float(losses[0] - expected[0]) == pytest.approx(0.0, abs=0.05)
    else:
        assert torch.equal(losses[0], expected[0])
    assert float(losses[0] - losses[-1]) > float(expected[0] - expected[-1]) / 2


def command(*arguments: str, folder: Path) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-m", "doconv_convert", *arguments, "--device", DEVICE.type, "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_commands(tmp_path: Path) -> None:
    """to-doconv, fold and verify with --device: proven there."""
    pytest.importorskip("onnxscript")
    source = f"{ROOT / 'sample_models/residual.py'}:residual"
    from doconv_convert.artifacts.sources import build, parse_source

    command("to-doconv", source, "-o", "start.safetensors", folder=tmp_path)
    model = to_doconv(build(parse_source(source)).eval())
    randomize_and_calibrate(model, varied_images(8, 3, 32, 32), 0)
    save(model, tmp_path / "trained.safetensors", source=source)
    folded = command("fold", "trained.safetensors", "--model", source, "--onnx", "out.onnx", folder=tmp_path)
    assert folded["proven"] is True
    command("verify", "out.onnx", "--against", "trained.safetensors", "--model", source, folder=tmp_path)
