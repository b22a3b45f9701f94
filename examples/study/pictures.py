"""Grey photographs of scikit-image, in [0, 1]: to train on, to tune on, to test on. No picture is in two parts."""

from __future__ import annotations

from functools import cache

import numpy as np
import skimage.data
import torch
from torch import Tensor
from torch.nn import functional as F

PARTS = {
    "train": ("coffee", "coins", "page", "brick", "grass", "gravel", "clock", "moon", "text"),
    "validation": ("stereo_motorcycle", "immunohistochemistry", "hubble_deep_field"),
    "test": ("astronaut", "camera", "rocket", "cat"),
}
SIDE = 192  # pixels: the upper left corner of a picture is what is scored


def grey(name: str) -> Tensor:
    """(height, width); the mean of the channels of a picture in color, the left one of a pair."""
    loaded = getattr(skimage.data, name)()
    pixels = np.asarray(loaded[0] if isinstance(loaded, tuple) else loaded, dtype=np.float32)
    return torch.from_numpy((pixels[..., :3].mean(-1) if pixels.ndim == 3 else pixels) / 255)


@cache
def part(name: str) -> tuple[Tensor, ...]:
    return tuple(grey(one) for one in PARTS[name])


@cache
def scored(name: str) -> Tensor:
    """(pictures, 1, SIDE, SIDE): what a net is scored on."""
    return torch.stack([picture[:SIDE, :SIDE] for picture in part(name)]).unsqueeze(1)


def crops(count: int, side: int, generator: torch.Generator) -> Tensor:
    """(count, 1, side, side), from random places of random training pictures."""
    pictures, drawn = part("train"), torch.rand(count, 3, generator=generator).tolist()
    found = []
    for which, down, right in drawn:
        picture = pictures[int(which * len(pictures))]
        top, left = (int(at * (size - side + 1)) for at, size in zip((down, right), picture.shape, strict=True))
        found.append(picture[top : top + side, left : left + side])
    return torch.stack(found).unsqueeze(1)


def halved(pictures: Tensor) -> Tensor:
    """Half the height and width, bicubic with antialiasing: super-resolution's input."""
    return F.interpolate(pictures, scale_factor=0.5, mode="bicubic", antialias=True)


def psnr(found: Tensor, wanted: Tensor) -> float:
    """dB, the mean over the pictures, as of values cut to [0, 1]."""
    errors = (found.clamp(0, 1) - wanted).double().square().mean((1, 2, 3))
    return float((-10 * errors.log10()).mean())
