"""Randomizing and calibrating a network, so that its outputs depend on the image and on every kernel.

A fresh network hides faults: its batch-norm statistics are not those of its activations, layer scales and
residual branches start near zero, heads at zero. Independently drawn statistics are worse: they make the
output constant. So D and everything degenerate is drawn at random and the statistics are then *calibrated* by
one forward of a varied batch. For rehearsals and tests only: a user's weights are never changed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from doconv_convert.artifacts.checkpoints.recipe import recipe_sites
from doconv_convert.artifacts.sources.inputs import Inputs
from doconv_convert.check.torch_runs.exact_start import run_in_eval
from doconv_convert.errors import DoconvError
from doconv_convert.nn.factors import StoredKernel
from doconv_convert.rewrite.observe import run_model
from doconv_convert.rewrite.tracing import set_eval_mode
from doconv_convert.workflows.rehearsal.rescale import Rescale, rescaling, to_deviation

JITTER = 0.05
# The standard deviations that layers' outputs are given. POOLED: of pooled features, so that gates open and close and
# heads do not drown in their biases. SPREAD: of others, since transformers are drawn so that a block adds next to
# nothing to its input, and networks without norms explode. REPEATED: the least of layers called again and again (RAFT's
# update), where more would amplify rounding from call to call.
POOLED, SPREAD, REPEATED = 2.0, 1.0, 0.2
# The mean of batch norms' biases. At 0 each following ReLU halves the signal and leaves a mean that the next norm takes
# out: rounding then grows by a fifth a layer (Inception v4: fp32 off by 2e-4 of the output's scale).
SHIFT = 0.5
# Of the mean over a norm's channels.
LEAST_VARIANCE = 0.05
# Samples of one batch must differ by more than this part of the output's scale.
LEAST_SPREAD = 1e-2
# What is given a standard deviation.
_LAYERS = (_ConvNd, nn.Linear)
# A parameter tensor that is constant and below this is a switched-off scale (layer scale, zero-init residual).
_OFF = 1e-3


class UninformativeWeightsError(DoconvError):
    """Random weights that show too little, where others may show more; `seen` are the kernels that do show."""

    def __init__(self, message: str, seen: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.seen = frozenset(seen)


def randomize_and_calibrate(
    model: nn.Module, inputs: Any, seed: int = 0, calls: Mapping[nn.Module, int] | None = None, *, draw: int = 0
) -> None:
    """Randomize a converted `model` in place, calibrated on `inputs` (a varied batch of 3 or more). `calls` says how
    often a forward calls each module; where it is not known, one is run. Each `draw` has other numbers, and odd ones
    have SHIFT in the convolutions' biases: for norms that follow activations (ConvMixer) or are summed (RepVGG).

    D ~ N(0, 1/K) and weight_extra are drawn anew, batch norms get affine parameters and calibrated statistics
    jittered by 5 %, zero or switched-off parameters get values. The global random state is not touched.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003 * draw)
    with torch.no_grad():
        randomize_factors(model, generator)
        _switch_on(model, generator)
        for layer in [m for m in model.modules() if isinstance(m, _ConvNd)] if draw % 2 else _batch_norms(model):
            if layer.bias is not None:
                layer.bias.add_(SHIFT)
        _calibrate(model, inputs, _calls(model, inputs) if calls is None else calls)
        for norm in _batch_norms(model):
            _jitter(norm, generator)


def use_every_parameter(model: nn.Module, inputs: Inputs) -> None:
    """Values as after a training: of fresh ones the exporter drops zero biases and merges equal weights."""
    arguments = inputs.arguments(inputs.proof_batch, like=model)
    run_in_eval(model, arguments)  # wrong inputs are refused here, in words
    randomize_and_calibrate(model, arguments)


def randomize_factors(model: nn.Module, generator: torch.Generator) -> None:
    """D ~ N(0, 1/K); weight_extra ~ N(0, 1/fan_in)."""
    with torch.no_grad():
        for d, extra in trained_factors(model):
            _draw(d, 1 / math.sqrt(d.shape[1]), generator)
            if extra is not None:
                _draw(extra, 1 / math.sqrt(extra.shape[1] * d.shape[1]), generator)


def trained_factors(model: nn.Module) -> list[tuple[Tensor, Tensor | None]]:
    """D and weight_extra of every kernel that has them, in layers and in graphs; shared ones once."""
    found = {}
    for site in recipe_sites(model):
        parameters, kernel = model.get_submodule(site.owner)._parameters, StoredKernel(site.kernel, site.groups)
        d = parameters.get(kernel.d_name)
        if d is not None:
            found[id(d)] = d, parameters.get(kernel.extra_name)
    return list(found.values())


@contextmanager
def composing_in_float64(model: nn.Module) -> Iterator[None]:
    """Kernels composed inside are composed in float64 and cast once, as the fold does: what it leaves computes the same
    bits."""
    narrow = [(d, d.data) for d, _ in trained_factors(model)]
    for d, value in narrow:
        d.data = value.double()
    try:
        yield
    finally:
        for d, value in narrow:
            d.data = value


def sample_spread(outputs: list[Tensor], samples: int) -> float:
    """How much the samples of a batch differ, relative to the scale: the largest over the float outputs."""
    spreads = [0.0]
    for output in outputs:
        if output.is_floating_point() and output.dim() and output.shape[0] == samples > 1:
            exact = output.detach().double()
            scale = float(exact.norm())
            spreads.append(float((exact - exact.mean(0)).norm()) / scale if scale else 0.0)
    return max(spreads)


def require_informative(name: str, outputs: list[Tensor], samples: int) -> float:
    """The spread of a model's outputs over the samples. Raises UninformativeWeightsError where it is not above
    LEAST_SPREAD."""
    spread = sample_spread(outputs, samples)
    if not spread > LEAST_SPREAD:
        raise UninformativeWeightsError(
            f"{name}: outputs differ between samples by {spread:.1e} of their scale, expected more "
            f"than {LEAST_SPREAD:.0e}; a comparison of such outputs shows nothing."
        )
    return spread


def _draw(tensor: Tensor, deviation: float, generator: torch.Generator) -> None:
    tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation)


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


def _switch_on(model: nn.Module, generator: torch.Generator) -> None:
    """Values for what is constant: norms' affine parameters, biases, layer scales and zero weights."""
    factors = {id(factor) for pair in trained_factors(model) for factor in pair}
    for parameter in model.parameters():
        if id(parameter) in factors or not parameter.numel():
            continue
        lowest, highest = float(parameter.min()), float(parameter.max())
        if lowest != highest:
            continue
        if lowest == 1.0:
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        elif parameter.dim() <= 1 and lowest == 0.0:
            _draw(parameter, 0.1, generator)
        elif abs(lowest) < _OFF:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            _draw(parameter, 1 / math.sqrt(max(fan_in, 4)), generator)


def _calibrate(model: nn.Module, inputs: Any, calls: Mapping[nn.Module, int]) -> None:
    """One forward in which the batch norms normalize by, and remember, the batch's own statistics, and every layer
    is scaled by what it gives."""
    norms = _batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    set_eval_mode(model)
    for norm in norms:
        norm.momentum = 1.0
        norm.training = True
    try:
        layers = [module for module in calls if isinstance(module, _LAYERS)]
        with rescaling({layer: Rescale(_once if calls[layer] == 1 else _repeated) for layer in layers}):
            run_model(model, inputs)
    finally:
        set_eval_mode(model)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _calls(model: nn.Module, inputs: Any) -> Counter[nn.Module]:
    """How often each layer is called in a forward."""
    calls: Counter[nn.Module] = Counter()
    layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
    handles = [layer.register_forward_hook(lambda module, *_: calls.update([module])) for layer in layers]
    try:
        run_model(set_eval_mode(model), inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _once(output: Tensor) -> float:
    one_position = output.dim() == 2 or (output.dim() > 2 and output[0, 0].numel() == 1)
    return to_deviation(POOLED if one_position else SPREAD)(output)


def _repeated(output: Tensor) -> float:
    return max(1.0, to_deviation(REPEATED)(output))


def _jitter(norm: _BatchNorm, generator: torch.Generator) -> None:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        return
    noise = torch.randn(2, *mean.shape, generator=generator).to(mean)
    mean.add_(JITTER * variance.sqrt() * noise[0])
    variance.mul_((1 + JITTER * noise[1]).clamp(0.5, 1.5))
    # a channel that hardly varies would be amplified, with its rounding errors
    variance.clamp_(min=max(1e-6, LEAST_VARIANCE * float(variance.mean())))
