"""Tiny nets and the pieces of a training loop; also a source file, for the command line and for torchrun's scripts.

`layers` has ordinary convolutions (they become DOConv layers), `functional` has kernels of its own in F.conv2d
calls and a Conv subclass with its own forward (they become run-time subclasses).
"""

import io
from collections.abc import Callable, Iterable
from typing import Any

import torch
from support import difference, is_d, run, signature
from torch import Tensor, nn
from torch.nn import functional as F

from doconv_convert import fold, to_doconv
from doconv_convert.nn.overlay import is_overlaid, stored_kernels
from doconv_convert.rewrite.convert import copy_model

INPUT_SHAPE = (1, 3, 8, 8)
CLASSES = 4
STEPS = 8
# What the few steps move D's entries by, at least; the exactness of a fold of D = 0 would show nothing.
MOVED = 1e-4
# Two float64 ways to compute the same convolutions.
ROUNDING = 1e-12


def _norm(kind: str, channels: int) -> nn.Module:
    """ "group" treats every image alone: two half batches give what a whole one does."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(2, channels)


class Layers(nn.Module):
    def __init__(self, norm: str, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = _norm(norm, width)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=2, bias=False)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.depthwise(x + self.grouped(x)))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


class Bounded(nn.Conv2d):
    """A Conv subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-6, 6)


class Functional(nn.Module):
    def __init__(self, norm: str, width: int = 8) -> None:
        super().__init__()
        self.kernel = nn.Parameter(nn.init.kaiming_normal_(torch.empty(width, 3, 3, 3)))
        self.norm = _norm(norm, width)
        self.bounded = Bounded(width, width, 3, padding=1, groups=2)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(F.conv2d(x, self.kernel, padding=1)))
        x = torch.relu(x + self.bounded(x))
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def layers(norm: str = "batch") -> nn.Module:
    return _seeded(lambda: Layers(norm))


def functional(norm: str = "batch") -> nn.Module:
    return _seeded(lambda: Functional(norm))


NETS: dict[str, Callable[..., nn.Module]] = {"layers": layers, "functional": functional}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def converted(plain: nn.Module, **options: Any) -> nn.Module:
    """The converted net; asserts that its kernels are of the one kind that the net is there for."""
    model = to_doconv(plain, **options)
    owners = [module for module in model.modules() if stored_kernels(module)]
    assert len(owners) == (2 if isinstance(plain, Functional) else 3)
    assert {is_overlaid(module) for module in owners} == {isinstance(plain, Functional)}
    return model


def images(count: int = 32) -> tuple[Tensor, Tensor]:
    """Images and labels that can be learned: each class has a color and a pattern of its own under noise."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(CLASSES, *INPUT_SHAPE[1:], generator=generator)
    patterns += 2 * torch.randn(CLASSES, 3, 1, 1, generator=generator)
    labels = torch.arange(count) % CLASSES
    return patterns[labels] + 0.5 * torch.randn(count, *INPUT_SHAPE[1:], generator=generator), labels


def sgd(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


def loss_of(model: Any, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x).float() if x.dtype != torch.float64 else model(x), labels)


def train(model: Any, optimizer: torch.optim.Optimizer | None = None, steps: int = STEPS) -> list[Tensor]:
    """The plainest loop; the losses before each step."""
    x, labels = images()
    x = x.to(next(model.parameters()).dtype)
    optimizer = optimizer or sgd(model.parameters())
    losses = []
    model.train()
    for _ in range(steps):
        loss = loss_of(model, x, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def through_pickle(model: nn.Module) -> nn.Module:
    """The whole model, saved by torch.save and loaded again."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def least_moved_d(model: nn.Module) -> float:
    """The smallest, over all D, of the largest entry's size."""
    return min(float(p.detach().abs().max()) for name, p in model.named_parameters() if is_d(name))


def assert_trained(model: nn.Module, losses: list[Tensor], expected: list[Tensor]) -> None:
    """Starts where the plain net starts, bit for bit, learns at least half as much, and moved every D."""
    assert torch.equal(losses[0], expected[0])
    gained, plain_gained = float(losses[0] - losses[-1]), float(expected[0] - expected[-1])
    assert plain_gained > 0.1
    assert gained > plain_gained / 2
    assert least_moved_d(model) > MOVED


def assert_folds(model: nn.Module, plain: nn.Module) -> None:
    """The fold has the plain net's classes and keys and, in float64, computes what the trained net does."""
    assert signature(fold(model)) == signature(plain)
    exact = copy_model(model).double().eval()
    x = images()[0].double()
    without = copy_model(exact)
    with torch.no_grad():
        for name, parameter in without.named_parameters():
            if is_d(name):
                parameter.zero_()
    expected = run(exact, x)
    assert difference(run(without, x), expected) > MOVED
    assert difference(run(fold(exact), x), expected) < ROUNDING
