"""What the training benchmarks run: a model, its batch, its loss, and one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Workload:
    """`model` of torchvision trained on `batch` random images of `size` pixels."""

    model: str
    batch: int
    size: int

    @property
    def title(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.size} x {self.size}"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        options: dict[str, Any] = {"weights": None}
        if self.model.startswith("retinanet"):
            options |= {"weights_backbone": None, "min_size": self.size, "max_size": self.size}
        return torchvision.models.get_model(self.model, **options)

    def loss(self) -> Callable[[nn.Module], Tensor]:
        """The loss of one fixed batch, as a function of the model in training mode."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        if self.model.startswith("retinanet"):
            half = float(self.size // 2)
            target = {"boxes": torch.tensor([[8.0, 8.0, half, half]]), "labels": torch.tensor([3])}
            return lambda model: torch.stack(list(model(list(images), [target] * self.batch).values())).sum()
        if self.model.startswith("raft"):
            other = torch.randn(images.shape, generator=generator)
            return lambda model: torch.stack(model(images, other)).abs().mean()
        labels = torch.randint(1000, (self.batch,), generator=generator)
        return lambda model: F.cross_entropy(model(images), labels)


class Trainer:
    """One arm of a comparison: a model, SGD with momentum and weight decay, and the step that is timed."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        scope: Callable[[nn.Module], AbstractContextManager[Any]] = lambda _: nullcontext(),
    ) -> None:
        self.model, self._loss, self._scope = model.train(), loss, scope
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def step(self) -> None:
        self._optimizer.zero_grad()
        with self._scope(self.model):
            self._loss(self.model).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
