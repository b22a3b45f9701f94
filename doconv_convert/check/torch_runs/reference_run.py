"""Torch's part of the proof: the float64 truth, plain fp32 outputs, and every kernel's sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from doconv_convert.artifacts.sources.inputs import Inputs, InputSpec, forward_names
from doconv_convert.check.outputs.compare import COVERED_ABOVE, TWIN_BOUND, bound_for, relative_error
from doconv_convert.check.outputs.detections import detection_groups, in_order_of
from doconv_convert.check.outputs.expected import FoldRun, ReferenceRun
from doconv_convert.check.torch_runs.coverage import (
    kernels_read,
    least_perturbation,
    measure_sensitivity,
    perturbation,
    why_uncovered,
)
from doconv_convert.check.torch_runs.device import full_precision, to_device
from doconv_convert.check.torch_runs.float64 import (
    float64_runs,
    output_tensors,
    run_float64,
    run_inputs,
    widened,
)
from doconv_convert.check.torch_runs.kernels import float32_kernels, kernel_paths
from doconv_convert.check.torch_runs.memory import has_twin, release_weights, return_freed
from doconv_convert.check.torch_runs.same_function import run_in_float64
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.rewrite.linear.steps import Merge
from doconv_convert.rewrite.observe import run_model
from doconv_convert.rewrite.tracing import set_eval_mode

_CPU = torch.device("cpu")
# Sizes that the proof tries in a dynamic dimension's place, the second where the model does not run at the first:
# most networks take any multiple of 32. Each further dimension grows by more, so that none stands for another.
_GROWTH: tuple[Callable[[int, int], int], ...] = (
    lambda size, index: size + 32 * (index + 1),
    lambda size, index: size * (index + 2),
)


def reference_run(
    trained: nn.Module,
    folded: nn.Module,
    inputs: Any,
    samples: int,
    device: torch.device = _CPU,
    *,
    constant_kernels: bool = False,
    merge: Merge = "none",
    spend: bool = False,
) -> ReferenceRun:
    """Run both models on the same inputs (a tuple of positional arguments), in eval mode on the device.

    `trained` is the unfolded model, `folded` the plain one that `fold` made of it, with `constant_kernels` or without,
    and `merge`. A half-precision model is judged in float32 arithmetic on its own rounded weights, as it is exported;
    its truth takes the kernels as the fold rounded them. With `spend` the trained model gives its values up as soon as
    its outputs are known.
    """
    models = trained.to(device), set_eval_mode(folded).to(device)
    runs = _run_both(*models, to_device(inputs, device), samples, constant_kernels, merge, spend)
    if runs.random:
        return runs.reference()
    with full_precision():
        return _with_coverage(models[1], runs)


def further_runs(
    folded: nn.Module, chunks: Iterable[tuple[Any, int]], device: torch.device = _CPU
) -> list[ReferenceRun]:
    """Outputs alone, of more samples than fit one batch: (positional arguments, their batch). `folded` is as
    `reference_run` left it, where it was found to compute what the trained model does."""
    runs = []
    for arguments, samples in chunks:
        inputs = tree_map(_to_float32, to_device(arguments, device))
        truth = run_float64(folded, inputs)
        with full_precision(), torch.no_grad():
            output = run_inputs(folded, inputs)
        groups = detection_groups(output)
        one = _Runs(folded, inputs, output_tensors(output), truth, {}, groups, samples, FoldRun())
        runs.append(replace(one.reference(), alone=None))
    return runs


def resized_reference_run(
    trained: nn.Module,
    folded: nn.Module,
    inputs: Inputs,
    samples: int,
    dynamic: Mapping[str, Mapping[int, str]],
    names: Sequence[str] | None,
    device: torch.device = _CPU,
    *,
    constant_kernels: bool = False,
    merge: Merge = "none",
) -> ReferenceRun | None:
    """As `reference_run`, without the kernels' sensitivity, at another size of every dimension in `dynamic` (the ONNX
    inputs are called `names`); None where only the batch is dynamic. Raises UsageError where the model does not run.
    """
    names = names or forward_names(folded, len(inputs.specs))
    refused = None
    for grow in _GROWTH:
        sizes = _other_sizes(inputs, dict(zip(names, inputs.specs, strict=False)), dynamic, grow)
        if not any(sizes):
            return None
        try:
            with torch.no_grad():
                arguments = to_device(inputs.resized(sizes).arguments(samples), device)
                models = trained.to(device), set_eval_mode(folded).to(device)
                return _run_both(*models, arguments, samples, constant_kernels, merge, exact=False).reference()
        except DoconvError as error:
            refused = error
    asked = ", ".join(sorted({dimension for axes in dynamic.values() for dimension in axes.values()}))
    raise UsageError(
        f"`dynamic`: {asked} cannot be proven to be dynamic, the model itself does not run at other sizes: {refused} "
        "Leave it out of `dynamic`, or give another size with `input_shapes`."
    ) from refused


def _other_sizes(
    inputs: Inputs,
    specs: Mapping[str, InputSpec],
    dynamic: Mapping[str, Mapping[int, str]],
    grow: Callable[[int, int], int],
) -> list[dict[int, int]]:
    """Per input {axis: size}; a dimension has one size wherever its name stands. The batch has its own way."""
    order: dict[str, int] = {}
    return [
        {
            axis: grow(spec.shape[axis], order.setdefault(dimension, len(order)))
            for axis, dimension in dynamic.get(name, {}).items()
            if axis < len(spec.shape) and (axis > 0 or not spec.batched)
        }
        for name, spec in specs.items()
    ] or [{} for _ in inputs.specs]


@dataclass(frozen=True)
class _Runs:
    """The inputs in float32, the plain model's outputs on them in the order of the float64 truth, that, and the leaf
    kernels that the outputs' gradients lead to."""

    folded: nn.Module
    inputs: Any
    plain: list[Tensor]
    truth: list[Tensor]
    kernels: Mapping[str, Tensor]
    detections: list[dict[str, int]]
    samples: int
    fold: FoldRun
    shipped: Sequence[Tensor] = ()

    @property
    def random(self) -> bool:
        return self.fold.random is not None

    def reference(self) -> ReferenceRun:
        inputs = [_array(leaf) for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor)]
        truth = [_array(t) for t in self.truth]
        plain = in_order_of(truth, [_array(p) for p in self.plain], self.detections)
        alone = partial(_alone, self.folded, self.inputs, self.samples)
        shipped = [_array(t) for t in self.shipped]
        return ReferenceRun(
            inputs, truth, plain, self.samples, {}, self.detections, alone, fold=self.fold, shipped=shipped
        )


def _alone(folded: nn.Module, inputs: Any, samples: int, count: int) -> list[Any]:
    """The float64 outputs of the first `count` samples by themselves."""
    first = tree_map(lambda leaf: _leading(leaf, count, samples), inputs)
    return [_array(t) for t in run_float64(folded, first)]


def _run_both(
    trained: nn.Module,
    folded: nn.Module,
    inputs: Any,
    samples: int,
    constant_kernels: bool,
    merge: Merge,
    spend: bool = False,
    *,
    exact: bool = True,
) -> _Runs:
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in trained.parameters())
    narrow = tree_map(_to_float32, inputs)
    paths = kernel_paths(folded, trained)
    try:
        truth, fold = run_in_float64(
            trained, folded, inputs, constant_kernels=constant_kernels, merge=merge, spend=spend
        )
    except DoconvError:
        with full_precision(), torch.no_grad():
            run_inputs(folded.float(), narrow)  # inputs that the model does not run on at all are the better reason
        raise
    if spend:
        release_weights(trained)
    return_freed()
    kernels = float32_kernels(folded, paths)
    shipped: Sequence[Tensor] = run_float64(folded, narrow) if exact and has_twin(folded) else ()
    if half:
        truth = list(shipped) or run_float64(folded, narrow)
    with full_precision():
        output = run_inputs(folded, narrow)  # after it: what this keeps for the gradients is large
    groups = detection_groups(output)
    return _Runs(folded, narrow, output_tensors(output), truth, kernels, groups, samples, fold, shipped)


def _leading(leaf: Any, count: int, samples: int) -> Any:
    batched = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == samples
    return leaf[:count] if batched else leaf


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


def _with_coverage(folded: nn.Module, runs: _Runs) -> ReferenceRun:
    reference, kernels = runs.reference(), runs.kernels
    bounds = {
        index: bound_for(relative_error(plain, truth)) * float(np.linalg.norm(truth.ravel()))
        for index, (plain, truth) in enumerate(zip(reference.plain, reference.truth, strict=True))
        if np.issubdtype(plain.dtype, np.floating) and plain.shape == truth.shape
    }

    def run() -> list[Tensor]:
        return output_tensors(run_model(folded, runs.inputs))

    def compared() -> list[Tensor]:
        outputs = in_order_of(reference.plain, [_array(t) for t in run()], reference.detections)
        return [torch.from_numpy(outputs[index]) for index in bounds]

    sensitivity = dict(measure_sensitivity([runs.plain[index] for index in bounds], list(bounds.values()), kernels))
    # a gradient that is cut or zero shows nothing
    without_gradient = [name for name in kernels if not sensitivity[name]]
    before = [torch.from_numpy(reference.plain[index]) for index in bounds]
    moved_by = partial(perturbation, compared, before, list(bounds.values()))
    sensitivity |= {name: least_perturbation(partial(moved_by, kernels[name])) for name in without_gradient}
    unmoved = {name: kernel for name, kernel in kernels.items() if sensitivity[name] is None}
    if unmoved:
        sensitivity |= dict.fromkeys(kernels_read(run, unmoved), 0.0)
    hidden = [
        name for name in without_gradient if (value := sensitivity[name]) is not None and not value > COVERED_ABOVE
    ]
    reasons = {name: why_uncovered(partial(moved_by, kernels[name], change=1.0)) for name in hidden}
    unseen = {name for name, value in sensitivity.items() if value is not None and not value > COVERED_ABOVE}
    return replace(
        reference,
        sensitivity=sensitivity,
        sharp=_in_float64(folded, runs, {name: kernels[name] for name in unseen}) if runs.shipped else {},
        uncovered_reason={name: reason for name, reason in reasons.items() if reason is not None},
    )


def _in_float64(folded: nn.Module, runs: _Runs, kernels: Mapping[str, Tensor]) -> dict[str, float]:
    """The sensitivity of the float64 outputs by `kernels`, in units of TWIN_BOUND: float32's own rounding, which hides
    small movements, is none there."""
    if not kernels:
        return {}
    with widened(folded), suppress(DoconvError):  # float32's answer stands where float64 has none
        outputs = output_tensors(float64_runs(folded, runs.inputs, gradients=True).outputs[0])
        outputs = [output for output in outputs if output.is_floating_point()]
        scales = [TWIN_BOUND * float(output.detach().norm()) for output in outputs]
        found = measure_sensitivity(outputs, scales, kernels)
        return {name: value or 0.0 for name, value in found.items()}
    return {}


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
