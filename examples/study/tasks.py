"""The second edition's tasks: what a batch is, what is minimized, and how a trained net is scored.

A task draws batches from a generator alone, so that all arms of a seed see the same ones. Tuning looks at the part
"validation", comparisons at the part "test". A net that scores less than the task's floor, which takes no training
to reach, is said to have diverged and counts as the floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import data
import pictures
import torch
from nets import stack
from restoration import ESPCN, denoiser, fourier, resnet18
from torch import Tensor, nn
from torch.nn import functional as F

SIGMA = 25 / 255
Batch = tuple[Tensor, Tensor]  # inputs, targets


class Task(Protocol):
    unit: str
    margin: float  # of a score: an interval inside of +- margin is no difference that matters
    weight_decay: dict[str, float]  # by optimizer

    def batch(self, generator: torch.Generator) -> Batch: ...
    def loss(self, output: Tensor, target: Tensor) -> Tensor: ...
    def score(self, model: nn.Module, part: str, device: torch.device) -> float: ...
    def floor(self, part: str) -> float: ...


@dataclass(frozen=True)
class Denoising:
    """White noise of sigma 25 of 255 on grey photographs; the net predicts it. Scored in dB of PSNR."""

    count: int = 16
    side: int = 24
    unit = "dB"
    margin = 0.05
    weight_decay = {"sgd": 0.0, "adam": 0.0}  # noqa: RUF012

    def batch(self, generator: torch.Generator) -> Batch:
        clean = pictures.crops(self.count, self.side, generator)
        noise = SIGMA * torch.randn(clean.shape, generator=generator)
        return clean + noise, noise

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target)

    def noisy(self, part: str) -> Tensor:
        """The same noise whoever asks."""
        clean = pictures.scored(part)
        return clean + SIGMA * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))

    def score(self, model: nn.Module, part: str, device: torch.device) -> float:
        noisy = self.noisy(part)
        return pictures.psnr(noisy - model(noisy.to(device)).cpu(), pictures.scored(part))

    def floor(self, part: str) -> float:
        return pictures.psnr(self.noisy(part), pictures.scored(part))


@dataclass(frozen=True)
class SuperResolution:
    """Twice the height and width of halved grey photographs. Scored in dB of PSNR; the floor is bicubic."""

    count: int = 16
    side: int = 32
    unit = "dB"
    margin = 0.05
    weight_decay = {"sgd": 0.0, "adam": 0.0}  # noqa: RUF012

    def batch(self, generator: torch.Generator) -> Batch:
        sharp = pictures.crops(self.count, self.side, generator)
        return pictures.halved(sharp), sharp

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target)

    def score(self, model: nn.Module, part: str, device: torch.device) -> float:
        sharp = pictures.scored(part)
        return pictures.psnr(model(pictures.halved(sharp).to(device)).cpu(), sharp)

    def floor(self, part: str) -> float:
        sharp = pictures.scored(part)
        return pictures.psnr(F.interpolate(pictures.halved(sharp), scale_factor=2, mode="bicubic"), sharp)


@dataclass(frozen=True)
class Fashion:
    """Fashion-MNIST's ten classes. Scored in % of right answers; the floor is that of a guess."""

    count: int = 64
    each: int = 1000  # training images of a class; those behind them are the validation's
    unit = "points"
    margin = 0.2
    weight_decay = {"sgd": 5e-4, "adam": 1e-2}  # noqa: RUF012

    def batch(self, generator: torch.Generator) -> Batch:
        images, labels = data.fashion_parts(self.each)["train"]
        chosen = torch.randint(len(labels), (self.count,), generator=generator)
        return images[chosen], labels[chosen]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def score(self, model: nn.Module, part: str, device: torch.device) -> float:
        images, labels = data.fashion_parts(self.each)[part]
        found = torch.cat([model(some.to(device)).argmax(1).cpu() for some in images.split(500)])
        return 100 * float((found == labels).double().mean())

    def floor(self, part: str) -> float:
        return 10.0


@dataclass(frozen=True)
class Work:
    """A net on a task, and the steps of a training of length 1."""

    task: Task
    build: Callable[[], nn.Module]
    steps: int


WORK: dict[tuple[str, str], Work] = {
    ("denoise", "3x3"): Work(Denoising(), partial(denoiser, 16, 5, 3, False), 700),
    ("denoise", "3x3 bn"): Work(Denoising(), partial(denoiser, 16, 5, 3, True), 700),
    ("denoise", "7x7"): Work(Denoising(), partial(denoiser, 8, 4, 7, False), 700),
    ("superres", "espcn"): Work(SuperResolution(), ESPCN, 700),
    ("fashion", "stack bn"): Work(Fashion(), stack, 156),
    ("denoise", "fourier"): Work(Denoising(16, 64), fourier, 400),
    ("fashion", "resnet18"): Work(Fashion(256, 5800), resnet18, 468),
}
