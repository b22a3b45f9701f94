"""Train with more parameters, ship exactly the network you designed.

DO-Conv (Depthwise Over-parameterized Convolution, arXiv 2006.12030): rewrite a PyTorch model's convolutions
before training, fold them back after it, export to ONNX and prove that nothing changed.

    from doconv_convert import to_doconv, fold

    model = to_doconv(model)  # before the optimizer
    ...                       # train as ever
    model = fold(model)       # a plain model again

Names load on first use, so that importing the package does not import torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# onnxruntime's wheels report to their maker, names of models and nodes among it, unless this is set before they load.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_LAZY_IMPORTS = {
    "DOConv1d": "nn.layers",
    "DOConv2d": "nn.layers",
    "DOConv3d": "nn.layers",
    "kernel_macs": "nn.composition",
    "feature_macs": "nn.composition",
    "cached": "nn.cached",
    "param_groups": "nn.optimizers",
    "check_optimizer": "nn.optimizers",
    "lever": "nn.lever",
    "ToDOConvPass": "rewrite.passes",
    "FoldPass": "rewrite.passes",
    "plan": "rewrite.plan",
    "to_doconv": "rewrite.convert",
    "fold": "rewrite.fold",
    "save": "artifacts.checkpoints.checkpoint",
    "load": "artifacts.checkpoints.checkpoint",
    "export_onnx": "artifacts.export.exporter",
    "count_macs": "check.macs.files",
    "prove": "workflows.prove",
    "verify": "workflows.verify",
    "rehearse": "workflows.rehearsal.rehearse",
    "DoconvError": "errors",
    "UsageError": "errors",
    "__version__": "versions",
}

__all__ = [*_LAZY_IMPORTS]

if TYPE_CHECKING:
    from doconv_convert.artifacts.checkpoints.checkpoint import load as load
    from doconv_convert.artifacts.checkpoints.checkpoint import save as save
    from doconv_convert.artifacts.export.exporter import export_onnx as export_onnx
    from doconv_convert.check.macs.files import count_macs as count_macs
    from doconv_convert.errors import DoconvError as DoconvError
    from doconv_convert.errors import UsageError as UsageError
    from doconv_convert.nn.cached import cached as cached
    from doconv_convert.nn.composition import feature_macs as feature_macs
    from doconv_convert.nn.composition import kernel_macs as kernel_macs
    from doconv_convert.nn.layers import DOConv1d as DOConv1d
    from doconv_convert.nn.layers import DOConv2d as DOConv2d
    from doconv_convert.nn.layers import DOConv3d as DOConv3d
    from doconv_convert.nn.lever import lever as lever
    from doconv_convert.nn.optimizers import check_optimizer as check_optimizer
    from doconv_convert.nn.optimizers import param_groups as param_groups
    from doconv_convert.rewrite.convert import to_doconv as to_doconv
    from doconv_convert.rewrite.fold import fold as fold
    from doconv_convert.rewrite.passes import FoldPass as FoldPass
    from doconv_convert.rewrite.passes import ToDOConvPass as ToDOConvPass
    from doconv_convert.rewrite.plan import plan as plan
    from doconv_convert.versions import __version__ as __version__
    from doconv_convert.workflows.prove import prove as prove
    from doconv_convert.workflows.rehearsal.rehearse import rehearse as rehearse
    from doconv_convert.workflows.verify import verify as verify


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'doconv_convert' has no attribute '{name}'")
    return getattr(importlib.import_module(f"doconv_convert.{_LAZY_IMPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
