"""A training step on the card: ours, the textbook layer's and torch's own operations over a plain convolution's.

A step is forward, loss, backward and SGD with momentum on random images that lie on the card. All arms of a row take
turns in one process. `tf32`: float32 with TF32 products; `bf16`: autocast, channels_last. The peak of an arm is what
it holds between two steps (parameters, gradients, momentum) and the most that a step adds to it. `device_us` sums what
one step of ours spends in each of its kernels on the card: the largest, and all of the composition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from on_device import Run, quartiles, ratios, reported, torch_operations, turns
from textbook import to_textbook
from torch import Tensor, nn
from torch.nn import functional as F

from doconv_convert import cached, to_doconv

Scope = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Row:
    """`model` of torchvision, `batch` images of `size` pixels; `cost`: about how many seconds to measure it."""

    model: str
    batch: int
    precision: str
    compiled: bool = False
    size: int = 224
    cost: float = 12.0

    @property
    def title(self) -> str:
        mode = "torch.compile" if self.compiled else "eager"
        return f"{self.model}, batch {self.batch}, {self.size} x {self.size}, {self.precision}, {mode}"


ROWS = [
    Row("resnet50", 256, "bf16"),
    Row("resnet18", 256, "bf16"),
    Row("resnet50", 256, "tf32"),
    Row("resnet18", 64, "bf16"),
    Row("resnet50", 64, "bf16"),
    Row("mobilenet_v2", 256, "bf16"),
    Row("convnext_tiny", 64, "bf16"),
    Row("resnet18", 256, "bf16", compiled=True, cost=40),
    Row("retinanet_resnet50_fpn", 4, "bf16", size=512, cost=15),
    Row("resnet18", 256, "tf32"),
    Row("resnet50", 256, "bf16", compiled=True, cost=70),
    Row("mobilenet_v2", 64, "bf16"),
    Row("convnext_tiny", 256, "bf16", cost=20),
    Row("resnet50", 64, "tf32"),
    Row("mobilenet_v2", 256, "tf32"),
    Row("convnext_tiny", 64, "tf32", cost=20),
    Row("mobilenet_v2", 256, "bf16", compiled=True, cost=70),
    Row("convnext_tiny", 64, "bf16", compiled=True, cost=70),
]
DRY = [
    Row("tiny", 2, "bf16", size=32),
    Row("tiny", 2, "tf32", compiled=True, size=32),
    Row("retinanet_resnet50_fpn", 1, "tf32", size=64),
]


class Trainer:
    """One arm: a model, its optimizer, and the step that is timed."""

    def __init__(self, model: nn.Module, row: Row, run: Run, loss: Callable[[Any], Tensor], scope: Scope) -> None:
        self._run, self._loss, self._scope, self._row = run, loss, scope, row
        before = allocated(run)
        layout = torch.channels_last if row.precision == "bf16" else torch.contiguous_format
        self._model = model.to(run.device, memory_format=layout).train()  # type: ignore[call-overload]
        self._called: Any = self._model
        if row.compiled:
            self._called = torch.compile(self._model, backend="aot_eager" if run.dry else "inductor")
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
        for _ in range(3):
            self.step()
        run.wait()
        self.held = allocated(run) - before

    def step(self) -> None:
        self._optimizer.zero_grad()
        bf16 = self._row.precision == "bf16"
        with self._scope(self._model):
            with torch.autocast(self._run.device.type, torch.bfloat16, enabled=bf16):
                loss = self._loss(self._called)
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def peak(self) -> int | None:
        """Bytes, of this arm alone; None on a CPU."""
        if self._run.dry:
            return None
        torch.cuda.reset_peak_memory_stats()
        others = allocated(self._run) - self.held
        self.step()
        self._run.wait()
        return torch.cuda.max_memory_allocated() - others


def allocated(run: Run) -> int:
    return 0 if run.dry else torch.cuda.memory_allocated()


def build(row: Row) -> nn.Module:
    torch.manual_seed(0)
    if row.model == "tiny":  # for a dry run
        tail = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), *tail)
    options: dict[str, Any] = {"weights": None}
    if row.model.startswith("retinanet"):
        options |= {"weights_backbone": None, "min_size": row.size, "max_size": row.size}
    return torchvision.models.get_model(row.model, **options)


def loss_of(row: Row, device: torch.device) -> Callable[[Any], Tensor]:
    """The loss of one fixed batch, as a function of the model."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(row.batch, 3, row.size, row.size, generator=generator).to(device)
    if row.model.startswith("retinanet"):
        half = float(row.size // 2)
        target = {"boxes": torch.tensor([[8.0, 8.0, half, half]], device=device)}
        target["labels"] = torch.tensor([3], device=device)
        return lambda model: torch.stack(list(model(list(images), [target] * row.batch).values())).sum()
    if row.precision == "bf16":
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (row.batch,), generator=generator).to(device)
    return lambda model: F.cross_entropy(model(images), labels)


def nothing(_: nn.Module) -> AbstractContextManager[Any]:
    return nullcontext()


def measure(row: Row, run: Run) -> dict[str, Any]:
    plain, loss = build(row), loss_of(row, run.device)
    models: dict[str, tuple[nn.Module, Scope]] = {
        "plain": (plain, nothing),
        "ours": (to_doconv(plain), nothing),
        "textbook": (to_textbook(plain), nothing),
        "torch": (to_doconv(plain), torch_operations),
    }
    if row.model.startswith("retinanet"):
        models["cached"] = to_doconv(plain), cached
    trainers = {name: Trainer(model, row, run, loss, scope) for name, (model, scope) in models.items()}
    seconds = turns(run, {name: one.step for name, one in trainers.items()}, 3 if run.dry else 11, 0.15)
    peaks = {name: one.peak() for name, one in trainers.items()}
    milliseconds = {name: quartiles([1e3 * each for each in values], 3) for name, values in seconds.items()}
    over = {name: ratios(seconds, name, "plain") for name in trainers if name != "plain"}
    found = {"workload": row.title, "milliseconds": milliseconds, "over_plain": over, "peak_bytes": peaks}
    return found if run.dry else {**found, "device_us": device_time(trainers["ours"])}


def device_time(trainer: Trainer) -> dict[str, float]:
    """Microseconds on the card in one step, of each kind of kernel: the 12 largest, and those of the composition."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer.step()
        torch.cuda.synchronize()
    spent = {event.key[:80]: round(event.self_device_time_total, 1) for event in profiler.key_averages()}
    largest = sorted(spent, key=lambda name: -spent[name])[:12]
    return {name: us for name, us in spent.items() if name in largest or name.startswith(("_product", "_correlation"))}


@contextmanager
def tf32() -> Iterator[None]:
    """What people train float32 networks with on a card that has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def main() -> None:
    run = Run(__doc__)
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    left_out: list[str] = []
    for row in DRY if run.dry else ROWS:
        if run.left < row.cost and not run.dry:
            left_out.append(row.title)
            continue
        with reported(failures, row.title), tf32():
            rows.append(measure(row, run))
            told = "   ".join(f"{name} {r['median']:.3f}" for name, r in rows[-1]["over_plain"].items())
            print(f"{row.title:60s} {rows[-1]['milliseconds']['plain']['median']:8.2f} ms   {told}", flush=True)
        torch._dynamo.reset()
        run.write(rows=rows, failures=failures, left_out=left_out)
    run.write(rows=rows, failures=failures, left_out=left_out)
    if failures:
        raise SystemExit(f"{len(failures)} rows failed")


if __name__ == "__main__":
    main()
