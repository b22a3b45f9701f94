"""Every weight of a float32 fold is the float32 number nearest to the exact product of D^ and W."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support import randomize, varied_images
from torch import nn

from doconv_convert import fold, to_doconv
from doconv_convert.check.torch_runs.same_function import run_in_float64
from doconv_convert.errors import CheckFailedError
from doconv_convert.nn.layers import fold_kernel
from doconv_convert.rewrite import fold_kernels
from doconv_convert.rewrite.fold import fold_in_place
from doconv_convert.rewrite.rounding import correctly_rounded
from doconv_convert.workflows.fold_result import fold_status

GENERATOR = np.random.default_rng(0)


def nearest(value: Fraction) -> np.float32:
    """By comparing all candidates in exact arithmetic, ties to even."""
    guess = np.float32(float(value))
    candidates = [np.nextafter(guess, np.float32(way)) for way in (-np.inf, guess, np.inf)]
    return min(candidates, key=lambda one: (abs(Fraction(float(one)) - value), int(one.view(np.int32)) & 1))


def exactly(w: Any, d: Any, extra: Any, groups: int) -> Any:
    outputs, per_group = w.shape[:2]
    slots = w.reshape(outputs, per_group, -1)
    full = slots if extra is None else np.concatenate([slots, extra], axis=2)
    kernel = np.empty_like(slots)
    for o, j, p in np.ndindex(*slots.shape):
        row = d[o // (outputs // groups) * per_group + j, p]
        terms = (Fraction(float(a)) * Fraction(float(b)) for a, b in zip(row, full[o, j], strict=True))
        kernel[o, j, p] = nearest(Fraction(float(slots[o, j, p])) + sum(terms))
    return kernel.reshape(w.shape)


def drawn(*shape: int) -> Any:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def as_drawn(w: Any, d: Any) -> tuple[Any, Any]:
    return w, d


def with_ties(w: Any, d: Any) -> tuple[Any, Any]:
    """Few bits, so that many sums lie exactly in the middle of two float32 numbers."""
    steps = GENERATOR.integers(-3, 4, w.shape).astype(np.float32)
    return np.round(w * 4) / 4 + np.float32(2**-23) * steps, np.round(d * 2) / 2


def tiny(w: Any, d: Any) -> tuple[Any, Any]:
    return w * np.float32(1e-39), d


def cancelling(w: Any, d: Any) -> tuple[Any, Any]:
    """D^ = D + I is zero, but for one row that is nearly so."""
    d = np.zeros_like(d)
    d[:, :, : d.shape[1]] = -np.eye(d.shape[1])
    d[0] += np.float32(1e-20)
    return w, d


def of_all_sizes(w: Any, d: Any) -> tuple[Any, Any]:
    return (w * 10.0 ** GENERATOR.integers(-44, 8, w.shape)).astype(np.float32), d


@pytest.mark.parametrize("values", [as_drawn, with_ties, tiny, cancelling, of_all_sizes])
@pytest.mark.parametrize(
    ("outputs", "inputs", "groups", "size", "more"),
    [(4, 3, 1, (3, 3), 0), (4, 4, 2, (3, 2), 3), (6, 3, 3, (2, 2), 1), (5, 2, 1, (4,), 0)],
)
def test_each_entry_is_the_nearest_number(
    values: Any, outputs: int, inputs: int, groups: int, size: tuple[int, ...], more: int
) -> None:
    positions = int(np.prod(size))
    w, d = values(drawn(outputs, inputs // groups, *size), drawn(inputs, positions, positions + more))
    extra = drawn(outputs, inputs // groups, more) if more else None
    got = correctly_rounded(w, d, extra, groups)
    assert got.dtype == np.float32
    assert got.any()
    assert np.array_equal(got, exactly(w, d, extra, groups))


def rounded_twice() -> nn.Module:
    """k = 1 + 2^-24 + 2^-60, which float64 rounds to the middle of 1 and 1 + 2^-23, and float32 then to 1."""
    net = to_doconv(nn.Sequential(nn.Conv2d(1, 1, (1, 3), bias=False)))
    with torch.no_grad():
        net[0].weight_first_slots.copy_(torch.tensor([1.0, 2.0**-20, 2.0**-30]).reshape(1, 1, 1, 3))
        net[0].D[0, 0, 1:] = torch.tensor([2.0**-4, 2.0**-30])
    return net


def test_what_was_rounded_twice_is_corrected_and_counted() -> None:
    net = rounded_twice()
    (factors,) = fold_kernels.layer_factors(net)
    cast = fold_kernel(factors.weight, factors.d, factors.extra, 1).float()
    assert cast[0, 0, 0, 0] == 1.0
    _, report = run_in_float64(net, fold(net), (torch.ones(1, 1, 1, 3),))
    assert report.findings == ()  # the correction is no fault
    folded = fold_in_place(net)
    assert folded.model[0].weight[0, 0, 0, 0] == 1 + 2.0**-23
    assert folded.rounding["0"] == fold_kernels.Rounding(weights=3, corrected=1)
    assert "each of 3 weights" in fold_status([], folded).detail


def test_a_weight_moved_by_one_ulp_is_caught() -> None:
    torch.manual_seed(0)
    net = randomize(
        to_doconv(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))), seed=0
    ).eval()
    images, folded = (varied_images(2, 3, 8, 8),), fold(net)
    assert run_in_float64(net, folded, images)[1].findings == ()
    for layer in (0, 2):
        weight = folded[layer].weight.data.view(-1)
        for index in (0, weight.numel() // 2, int(weight.abs().argmin())):
            kept = weight[index].clone()
            weight[index] = torch.nextafter(kept, torch.tensor(torch.inf))
            (finding,) = run_in_float64(net, folded, images)[1].findings
            assert f"'{layer}.weight'" in finding
            weight[index] = kept


def test_a_composition_off_by_more_than_its_errors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = randomize(to_doconv(nn.Sequential(nn.Conv2d(3, 8, 3))), seed=0)

    def off(weight: Any, d: Any, extra: Any, groups: int) -> Any:
        kernel = fold_kernel(weight, d, extra, groups)
        kernel.view(-1)[5] *= 1 + 2.0**-21
        return kernel

    monkeypatch.setattr(fold_kernels, "fold_kernel", off)
    monkeypatch.setattr(fold_kernels, "FOLD_TOLERANCE", 1e-6)  # so that the features do not see it
    before = net[0].weight_first_slots.clone()
    with pytest.raises(
        CheckFailedError, match="'0': 1 values of the folded kernel are not the float32 numbers nearest"
    ):
        fold(net, inplace=True)
    assert torch.equal(net[0].weight_first_slots, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_keep_the_tolerance(dtype: torch.dtype) -> None:
    net = randomize(to_doconv(nn.Sequential(nn.Conv2d(3, 8, 3))), seed=0).to(dtype)
    folded = fold_in_place(net)
    assert folded.rounding["0"].corrected is None
    assert "error-free" not in fold_status([], folded).detail
