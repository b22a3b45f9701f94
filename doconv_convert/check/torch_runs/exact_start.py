"""The start check: a converted model computes what the original does, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doconv_convert.check.outputs.compare import bound_for, relative_error
from doconv_convert.check.torch_runs.device import full_precision, to_device
from doconv_convert.check.torch_runs.float64 import output_tensors, run_float64, run_inputs
from doconv_convert.errors import CheckFailedError, DoconvError
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
        require_same_output(name, run_in_eval(original, inputs), converted, inputs)


def require_same_function(trained: nn.Module, plain: nn.Module, converted: nn.Module, inputs: Any) -> str:
    """Run a foreign model (`trained`) in float64, its folded and its converted form as they are, in eval mode on the
    CPU: the converted one may be off by what the proof allows an exported one. Returns what was seen.

    Raises CheckFailedError where an output differs by more.
    """
    name = type(trained).__name__
    truth = run_float64(trained, inputs)
    folded, got = (output_tensors(run_in_eval(model, inputs)) for model in (plain, converted))
    if not truth or not len(truth) == len(folded) == len(got):
        raise DoconvError(f"{name}: its outputs cannot be compared; it has {len(truth)} tensors for outputs.")
    worst = 0.0
    for exact, one, other in zip(truth, folded, got, strict=True):
        if exact.shape != other.shape:
            raise CheckFailedError(f"{name}: the converted model's output has shape {tuple(other.shape)}.")
        expected = exact.numpy()
        error, plain_error = (relative_error(t.double().numpy(), expected) for t in (other, one))
        if not error <= bound_for(plain_error):
            raise CheckFailedError(
                f"{name}: the converted model is off by {error:.1e} of the output's scale, expected at most "
                f"{bound_for(plain_error):.1e}; nothing was written. Please report it."
            )
        worst = max(worst, error)
    return f"off by {worst:.1e} of the output's scale from the foreign model in float64"


def require_same_output(name: str, expected: Any, converted: nn.Module, inputs: Any) -> None:
    """`require_same_start` against the output `expected` of the original, called `name`."""
    tensors = output_tensors(expected)
    if not tensors:
        raise DoconvError(f"{name} has no tensor outputs, so its start cannot be compared.")
    if any(t.is_floating_point() and not torch.isfinite(t).all() for t in tensors):
        raise DoconvError(
            f"{name}: its own outputs are NaN or infinite, expected finite ones; nothing was written. Give weights or "
            "an input (`input_file`) for which the model works."
        )
    if not same_outputs(expected, run_in_eval(converted, inputs)):
        raise DoconvError(
            f"{name}: the converted model's outputs differ from the original's, expected the same bits; nothing was "
            "written. If the model is random in eval mode, that is why; else please report it."
        )
