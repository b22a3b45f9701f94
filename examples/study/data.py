"""The study's data: scikit-learn's digits (8 x 8) and Fashion-MNIST (28 x 28), as float images and labels.

Fashion-MNIST (MIT license) is read from the folder $FASHION_MNIST, or from Debian's package `dataset-fashion-mnist`
where that is installed, else torchvision downloads it.
"""

from __future__ import annotations

import gzip
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
Split = tuple[Tensor, Tensor]


def digits() -> tuple[Split, Split]:
    """1,297 images to train on and 500 to test on, drawn once."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.from_numpy(loaded.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(loaded.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:500], order[500:]
    return (images[train], labels[train]), (images[test], labels[test])


def _idx(path: Path) -> Tensor:
    """The numbers of one file in the IDX format: a header of big-endian sizes, then bytes."""
    content = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes).copy())


@cache
def _whole_fashion() -> tuple[Split, Split]:
    """60,000 images to train on and 10,000 to test on."""
    folder = Path(os.environ.get("FASHION_MNIST", DEBIAN))
    if folder.is_dir():
        raw = [
            (_idx(folder / f"{name}-images-idx3-ubyte.gz"), _idx(folder / f"{name}-labels-idx1-ubyte.gz"))
            for name in ("train", "t10k")
        ]
    else:
        from torchvision.datasets import FashionMNIST

        sets = [FashionMNIST(Path.home() / ".cache/doconv-study", train, download=True) for train in (True, False)]
        raw = [(one.data, one.targets) for one in sets]
    train, test = (((images.float().unsqueeze(1) / 255 - 0.286) / 0.353, labels.long()) for images, labels in raw)
    return train, test


def _of_each_class(split: Split, start: int, stop: int) -> Split:
    images, labels = split
    chosen = torch.cat([torch.nonzero(labels == label).flatten()[start:stop] for label in range(10)])
    return images[chosen], labels[chosen]


def fashion() -> tuple[Split, Split]:
    """10,000 of the 60,000 training images (the first 1,000 of each class) and the 10,000 of the test."""
    train, test = _whole_fashion()
    return _of_each_class(train, 0, 1000), test


@cache
def fashion_parts(each: int) -> dict[str, Split]:
    """The first `each` training images of each class, the next 200 to tune on, and the 10,000 of the test."""
    train, test = _whole_fashion()
    return {
        "train": _of_each_class(train, 0, each),
        "validation": _of_each_class(train, each, each + 200),
        "test": test,
    }


DATA = {"digits": digits, "fashion": fashion}
EPOCHS = {"digits": 15, "fashion": 3}
