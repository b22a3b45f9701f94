"""The start check: a converted model computes what the original does, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doconv_convert.check.device import full_precision, to_device
from doconv_convert.check.exact import output_tensors, run_inputs
from doconv_convert.errors import DoconvError
from doconv_convert.rewrite.convert import same_outputs
from doconv_convert.rewrite.tracing import undisturbed


def run_in_eval(model: nn.Module, inputs: Any) -> Any:
    """The output in eval mode, without gradients; the model stays as it was. Raises UsageError for wrong inputs."""
    with undisturbed(model), torch.no_grad():
        for module in model.modules():
            module.training = False
        return run_inputs(model, inputs)


def require_same_start(
    original: nn.Module, converted: nn.Module, inputs: Any, device: torch.device | None = None
) -> None:
    """Run both in eval mode, on the CPU or moved to `device`. Raises DoconvError where any output differs
    (`torch.equal`)."""
    name = type(original).__name__
    if device is not None and device.type != "cpu":
        original, converted, inputs = original.to(device), converted.to(device), to_device(inputs, device)
    with full_precision():
        _compare(name, original, converted, inputs)


def _compare(name: str, original: nn.Module, converted: nn.Module, inputs: Any) -> None:
    expected = run_in_eval(original, inputs)
    tensors = output_tensors(expected)
    if not tensors:
        raise DoconvError(f"{name} has no tensor outputs, so its start cannot be compared.")
    if any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors):
        raise DoconvError(
            f"{name}: its own outputs are NaN or infinite, expected finite ones; nothing was written. Give weights or "
            "an input (--input) for which the model works."
        )
    if not same_outputs(expected, run_in_eval(converted, inputs)):
        raise DoconvError(
            f"{name}: the converted model's outputs differ from the original's, expected the same bits; nothing was "
            "written. If the model is random in eval mode, that is why; else please report it."
        )
