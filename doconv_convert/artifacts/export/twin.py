"""The float64 twin of an export: the same network once more, with every number in float64."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from doconv_convert.artifacts.export.exporter import export_onnx, is_or_holds_a_detector
from doconv_convert.artifacts.export.job import Flags
from doconv_convert.errors import DoconvError
from doconv_convert.rewrite.tracing import float64_by_default

logger = logging.getLogger(__name__)


def export_twin(module: nn.Module, inputs: tuple[Any, ...], path: Path, flags: Flags) -> str | None:
    """Export `module`, which becomes float64, with these inputs and flags; why there is no twin, if there is none."""
    if is_or_holds_a_detector(module):
        return "TorchScript's exporter writes this network, which computes in float32 in places"
    wide = pytree.tree_map(lambda leaf: leaf.double() if _is_float(leaf) else leaf, inputs)
    try:
        with float64_by_default():
            export_onnx(module.double(), wide, path, **vars(flags))
    except DoconvError as error:
        logger.info("no float64 twin: %s", error)
        return f"the network cannot be exported in float64: {error}"
    return None


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
