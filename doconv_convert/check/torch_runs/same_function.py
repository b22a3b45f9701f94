"""The fold itself: the trained network against its fold, both in float64, before anything is rounded or exported.

A fold replaces kernels, one layer at a time. A network may do more with a kernel than convolve with it in one layer:
write it, read it elsewhere, share it. Then every layer folds right, and the network computes something else. No error
made later may hide that, so it is looked for where nothing is rounded but the last bits of float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from doconv_convert.check.outputs.compare import Array, relative_error
from doconv_convert.check.outputs.detections import detection_groups, in_order_of
from doconv_convert.check.outputs.expected import FoldRun
from doconv_convert.check.torch_runs.coverage import ReadsOf
from doconv_convert.check.torch_runs.device import full_precision
from doconv_convert.check.torch_runs.float64 import Runs, float64_runs, output_tensors, widened
from doconv_convert.nn.cached import precomposed
from doconv_convert.rewrite.convert import copy_model
from doconv_convert.rewrite.fold import fold_in_place
from doconv_convert.rewrite.linear.steps import Merge
from doconv_convert.rewrite.observe import run_model
from doconv_convert.rewrite.tracing import set_eval_mode, undisturbed
from doconv_convert.words import listed

# The two differ by the order of sums in their kernels' compositions alone.
FUNCTION_TOLERANCE = 1e-10
# A composition in float64 is off by 2^-53 times the number of its terms. Where it lies that close to the middle of two
# float32 numbers, its cast may be the wrong one: within so much of their distance, or of the kernel's largest value.
BETWEEN, SUMMED = 1e-4, 2.0**-46
_SHOWN = 5


def run_in_float64(
    trained: nn.Module,
    folded: nn.Module,
    inputs: Any,
    *,
    constant_kernels: bool = False,
    merge: Merge = "none",
    spend: bool = False,
) -> tuple[list[Tensor], FoldRun]:
    """Run `trained` and its fold, both in float64 and in eval mode, on the same inputs: the trained network's outputs,
    and what was seen of the fold.

    The fold is made again, from the widened model and without a cast; `folded`, which is shipped, has to hold its
    tensors, each cast once. `spend` folds `trained` itself, whose values the caller needs no more.
    Raises DoconvError where the model does not run in float64.
    """
    dtypes = {name: tensor.dtype for name, tensor in _tensors(trained)}
    with widened(trained):
        wide = trained if spend else copy_model(trained)
        first, reads = _watched_run(trained, inputs)
        truth, groups = output_tensors(first.outputs[0]), detection_groups(first.outputs[0])
        wide = fold_in_place(wide, constant_kernels=constant_kernels, check_first=False, merge=merge).model
        findings = reads + _cast_findings(dict(_tensors(wide)), dict(_tensors(folded)), dtypes)
        # twice, without a reset between: a network may count its calls, or hold a generator of its own
        two = float64_runs(wide, inputs, runs=2)
        again, once_more = map(output_tensors, two.outputs)
    error, differences = _compare(truth, again, groups)
    random = f"it draws from {' and '.join(first.drawn)}'s random generator" if first.drawn else None
    if random is None and two.counting:
        random = f"its forward counts in '{two.counting[0]}', and no checkpoint holds how far training came"
    if random is None and (own := _compare(again, once_more, groups)[1]):
        random = f"of two runs in a row, {own[0]}"
    # of a model that is half precision in part, the inputs at hand are not its own
    narrow = not spend and {dtype for dtype in dtypes.values() if dtype.is_floating_point} == {torch.float32}
    float32_error = _float32_error(trained, inputs, truth, groups) if narrow and random is None else None
    return truth, FoldRun(error, random, (*findings, *differences), float32_error)


def _float32_error(
    trained: nn.Module, inputs: Any, truth: Sequence[Tensor], groups: Sequence[Mapping[str, int]]
) -> float | None:
    """The largest relative error of the trained network as it is, composing its kernels in its own dtype."""
    with full_precision(), torch.no_grad(), undisturbed(trained):
        outputs = output_tensors(run_model(set_eval_mode(trained), inputs))
    pairs = list(zip(*_in_order(truth, outputs, groups), strict=False))
    errors = [
        relative_error(got, exact) for exact, got in pairs if exact.dtype.kind == "f" and exact.shape == got.shape
    ]
    return max(errors, default=None)


def _watched_run(trained: nn.Module, inputs: Any) -> tuple[Runs, tuple[str, ...]]:
    """One run, and which W or D it read outside of its layer: there the fold puts the kernel in W's place, which these
    inputs need not show. Kernels are composed up front, so a layer's own forward reads neither."""
    by_features = {id(m._parameters["weight"]) for m in trained.modules() if getattr(m, "composition", "") == "feature"}
    with torch.no_grad(), precomposed(trained) as kernels:
        factors = {
            f"{kernel.name} ({part})": tensor
            for weight, kernel in kernels.items()
            for part, tensor in zip(("W", "D", "weight_extra"), kernel.factors, strict=False)
            if isinstance(tensor, Tensor) and weight not in by_features
        }
        with ReadsOf(factors) as reads:
            run = float64_runs(trained, inputs)
    return run, tuple(f"the network reads '{name}' outside of its layer's convolution" for name in sorted(reads.names))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _cast_findings(
    wide: Mapping[str, Tensor], folded: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> tuple[str, ...]:
    """Tensors of `folded` that are not the float64 fold's, cast once to the trained model's dtype."""
    if wide.keys() != folded.keys():
        odd = [f"'{name}'" for name in sorted(wide.keys() ^ folded.keys())]
        return (f"the folded network has other tensors than the trained one's fold: {listed(odd)}",)
    usual = next((dtype for dtype in dtypes.values() if dtype.is_floating_point), torch.float32)
    wrong = []
    for name, exact in wide.items():
        shipped = folded[name]
        cast = exact
        if exact.is_floating_point():
            cast = exact.to(shipped.device, dtypes.get(name, usual)).to(shipped.dtype)
        if not _same(cast.detach(), shipped.detach(), exact.detach()):
            wrong.append(f"'{name}' of the folded network is not the trained one's, folded in float64 and cast once")
    return (*wrong[:_SHOWN], *([f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []))


def _same(cast: Tensor, shipped: Tensor, exact: Tensor) -> bool:
    """Equal, but for float32 numbers between which `exact` lies in the middle: it has errors of its own, which a
    correctly rounded product does not have."""
    if cast.shape != shipped.shape or torch.equal(cast, shipped):
        return cast.shape == shipped.shape
    if shipped.dtype != torch.float32 or exact.dtype != torch.float64:
        return False
    differs = cast != shipped
    exact, value = exact.to(shipped.device), shipped[differs].double()
    spacing = (torch.nextafter(shipped[differs], cast[differs]).double() - value).abs()
    allowed = (0.5 + BETWEEN) * spacing + SUMMED * float(exact.abs().max())
    return bool(((exact[differs] - value).abs() <= allowed).all())


def _compare(
    truth: Sequence[Tensor], got: Sequence[Tensor], groups: Sequence[Mapping[str, int]]
) -> tuple[float, list[str]]:
    """The largest relative error of an output, and what is beyond FUNCTION_TOLERANCE, in sentences."""
    if len(truth) != len(got):
        return float("inf"), [f"it has {len(got)} outputs, expected {len(truth)}"]
    expected, found = _in_order(truth, got, groups)
    errors = [_error(value, array) for value, array in zip(expected, found, strict=True)]
    told = [
        f"output {index} differs by {error:.1e} of its scale, expected at most {FUNCTION_TOLERANCE:.0e}"
        for index, error in enumerate(errors)
        if not error <= FUNCTION_TOLERANCE
    ]
    return max(errors, default=0.0), told


def _in_order(
    truth: Sequence[Tensor], got: Sequence[Tensor], groups: Sequence[Mapping[str, int]]
) -> tuple[list[Array], list[Array]]:
    """Both as arrays, detections of the second in the order of the first's."""
    expected, found = ([tensor.detach().cpu().numpy() for tensor in tensors] for tensors in (truth, got))
    return expected, in_order_of(expected, found, groups)


def _error(truth: Array, got: Array) -> float:
    if truth.shape != got.shape or truth.dtype != got.dtype:
        return float("inf")
    if not np.issubdtype(truth.dtype, np.inexact):
        return float(np.count_nonzero(truth != got))
    if np.iscomplexobj(truth):
        truth, got = np.stack([truth.real, truth.imag]), np.stack([got.real, got.imag])
    finite = np.isfinite(truth)  # what is not, the comparison with onnxruntime refuses
    if not np.array_equal(truth[~finite], got[~finite], equal_nan=True):
        return float("inf")
    return relative_error(got[finite], truth[finite])
