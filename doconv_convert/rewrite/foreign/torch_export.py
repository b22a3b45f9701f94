"""A single layer through torch.export, with free batch, height and width: what symbolic tracing cannot follow."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from doconv_convert.rewrite.observe import watch_forward
from doconv_convert.rewrite.sites import Reason

# Above what a kernel covers, so that its own condition on the size (input >= kernel) is none.
_SMALLEST, _LARGEST = 24, 4096
_SIZES = (37, 38, 39)
# A layer alone does not say how many channels it takes: so many of its own numbers are tried.
_TRIED = 12
# Numbers in an input, 512 MiB: CondConv's kernels are rows of millions, which are no channels.
_MOST = 2**26


@dataclass(frozen=True)
class Sample:
    """An input on which a layer runs alone, and whether it convolves with a kernel that it computes."""

    x: Tensor
    computes_kernel: bool


class NotExported(Exception):
    """Why torch.export gave no graph."""


def sample_input(module: nn.Module) -> Sample | None:
    """A float64 input (2, C, *size) that `module`, in float64 on the CPU, runs on; None where none is found."""
    numbers = [value for value in vars(module).values() if type(value) is int and value > 0]
    numbers += [size for parameter in module.parameters() for size in parameter.shape]
    for spatial in (2, 1, 3):
        for channels in list(dict.fromkeys(numbers))[:_TRIED]:
            shape = (2, channels, *_SIZES[:spatial])
            if math.prod(shape) > _MOST:
                continue
            x = torch.zeros(shape, dtype=torch.float64)
            try:
                forward = watch_forward(module, (x,))
            except Exception:  # the user's forward says in its own way that this is not its input
                continue
            reasons = [odd.reason for odd in forward.odd_kernels]
            return Sample(x, Reason.COMPUTED in reasons or Reason.INPUT_DEPENDENT in reasons)
    return None


def exported(module: nn.Module, sample: Sample) -> fx.GraphModule:
    """The layer's graph for every batch and size. Raises NotExported with the reason."""
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=2, max=_LARGEST)}
    for axis in range(2, sample.x.dim()):
        free[axis] = torch.export.Dim(f"size{axis}", min=_SMALLEST, max=_LARGEST)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (sample.x,), dynamic_shapes=(free,))
    except Exception as error:  # torch.export raises many kinds
        if "violated" in str(error):
            raise NotExported("its path or its pads are computed from the input's size") from error
        raise NotExported(f"its forward cannot be traced ({type(error).__name__})") from error
    return program.module()
