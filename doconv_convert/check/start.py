"""The start check: a converted model computes what the original does, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from doconv_convert.check.exact import output_tensors
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.rewrite.convert import same_outputs
from doconv_convert.rewrite.measure import run_model
from doconv_convert.rewrite.tracing import undisturbed


def require_same_start(original: nn.Module, converted: nn.Module, inputs: Any) -> None:
    """Run both in eval mode on the CPU. Raises DoconvError where any output differs (`torch.equal`)."""
    results = []
    for model in (original, converted):
        with undisturbed(model), torch.no_grad():
            for module in model.modules():
                module.training = False
            try:
                results.append(run_model(model, inputs))
            except Exception as error:  # the user's forward
                shapes = ", ".join(str(tuple(t.shape)) for t in output_tensors(inputs))
                raise UsageError(
                    f"{type(original).__name__} does not run on inputs of shape {shapes} ({type(error).__name__}: "
                    f"{error}); give the right ones with --input-shape."
                ) from error
    if not output_tensors(results[0]):
        raise DoconvError(f"{type(original).__name__} has no tensor outputs, so its start cannot be compared.")
    if not same_outputs(*results):
        raise DoconvError(
            f"{type(original).__name__}: the converted model's outputs differ from the original's, expected the same "
            "bits; nothing was written. If the model is random in eval mode, that is why; else please report it."
        )
