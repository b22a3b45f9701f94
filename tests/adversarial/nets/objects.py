"""Nets whose outputs are more than tensors, and a layer whose size a norm takes back."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

INPUT_SHAPE = (1, 3, 16, 16)


class Cache:
    """No tensor, and unknown to torch's pytree."""

    def __init__(self, held: Tensor) -> None:
        self.held = held


@dataclasses.dataclass
class Result:
    scores: Tensor


class Record(dict[str, Tensor]):
    """Registered without the optional function that names its leaves, as diffusers registers its outputs."""


def _record(values: Any, keys: Any) -> Record:
    return Record(zip(keys, values, strict=True))


pytree.register_pytree_node(
    Record, lambda held: (list(held.values()), list(held)), _record, serialized_type_name=f"{__name__}.Record"
)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def scores(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.enc(x)))


class CacheBeside(Two):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.scores(x)
        return {"scores": y, "cache": Cache(y)}


class DataClass(Two):
    def forward(self, x: Tensor) -> Result:
        return Result(self.scores(x))


class Object(Two):
    def forward(self, x: Tensor) -> Cache:
        return Cache(self.scores(x))


class ObjectList(Two):
    def forward(self, x: Tensor) -> list[Cache]:
        return [Cache(self.scores(x))]


class Registered(Two):
    def forward(self, x: Tensor) -> Record:
        return Record(sample=self.scores(x))


def scale_free() -> nn.Module:
    """One input channel's 1x1 kernel under an instance norm: its size cancels, its sign shows."""
    one = [nn.Conv2d(3, 1, 1), nn.Conv2d(1, 1, 1), nn.InstanceNorm2d(1, affine=True), nn.LeakyReLU(0.1)]
    return nn.Sequential(*one, nn.Conv2d(1, 2, 3))
