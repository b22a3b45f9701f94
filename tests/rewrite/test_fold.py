"""The fold's own checks: a wrong kernel is caught, a damaged one refused, and nothing changes then."""

import copy
from typing import Any

import pytest
import torch
from support import build_model, difference, randomize, run, signature, varied_images
from torch import Tensor, nn

from doconv_convert import DoconvError, fold, to_doconv
from doconv_convert.errors import CheckFailedError
from doconv_convert.nn import composition
from doconv_convert.nn.composition import row_pieces
from doconv_convert.nn.layers import fold_kernel
from doconv_convert.rewrite import fold_kernels
from doconv_convert.rewrite.fold_kernels import FOLD_TOLERANCE, composition_error, folded_rows, layer_factors
from doconv_convert.workflows.rehearsal.randomize import composing_in_float64

# Over the sample models with random factors: the largest seen was 1.2e-15.
SEEN = 5e-15


def trained(name: str = "grouped", d_mul: str = "K+3") -> nn.Module:
    return randomize(to_doconv(build_model(name), d_mul=d_mul), seed=0)


def swapped(weight: Tensor, d: Tensor, extra: Tensor | None, groups: int) -> Tensor:
    """The fold with two rows of D exchanged."""
    d = d.clone()
    d[0, [0, 1]] = d[0, [1, 0]]
    return fold_kernel(weight, d, extra, groups)


def transposed(weight: Tensor, d: Tensor, extra: Tensor | None, groups: int) -> Tensor:
    d = d.clone()
    d[..., : d.shape[1]] = d[..., : d.shape[1]].mT.clone()
    return fold_kernel(weight, d, extra, groups)


def without_extra(weight: Tensor, d: Tensor, extra: Tensor | None, groups: int) -> Tensor:
    return fold_kernel(weight, d[..., : d.shape[1]], None, groups)


def other_pairing(weight: Tensor, d: Tensor, extra: Tensor | None, groups: int) -> Tensor:
    """Rows of D go with other input channels."""
    return fold_kernel(weight, d.roll(1, 0), extra, groups)


def in_single_precision(weight: Tensor, d: Tensor, extra: Tensor | None, groups: int) -> Tensor:
    return fold_kernel(weight, d, extra, groups).float().double()


def unfolded(weight: Tensor, d: Tensor, extra: Tensor | None, groups: int) -> Tensor:
    return weight.detach().double()


@pytest.mark.parametrize("piece", [composition.PIECE, 100], ids=["whole", "pieces"])
@pytest.mark.parametrize("wrong", [swapped, transposed, without_extra, other_pairing, in_single_precision, unfolded])
def test_a_wrong_fold_is_caught(wrong: Any, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "PIECE", piece)
    model = trained()
    every = layer_factors(model)
    assert len(every) > 5
    for factors in every:
        assert composition_error(factors, fold_kernel(factors.weight, factors.d, factors.extra, factors.groups)) < SEEN
        assert composition_error(factors, wrong(factors.weight, factors.d, factors.extra, factors.groups)) > 1e-9
    before, expected = copy.deepcopy(model.state_dict()), signature(model)
    monkeypatch.setattr(fold_kernels, "fold_kernel", wrong)
    with pytest.raises(DoconvError, match=r"'stem': kernel and feature composition differ by .*; nothing was folded"):
        fold(model, inplace=True)
    assert signature(model) == expected
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_the_last_piece_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composition, "PIECE", 100)
    (factors,) = layer_factors(randomize(to_doconv(nn.Sequential(nn.Conv2d(8, 8, 3))), seed=0))
    pieces = list(row_pieces(factors.weight.shape, 1))
    assert len(pieces) > 4
    calls: list[int] = []

    def wrong_at_last(weight: Tensor, d: Tensor, extra: Tensor | None, groups: int) -> Tensor:
        calls.append(1)
        return (swapped if len(calls) == len(pieces) else fold_kernel)(weight, d, extra, groups)

    monkeypatch.setattr(fold_kernels, "fold_kernel", wrong_at_last)
    given = folded_rows(factors)
    for _ in pieces[:-1]:
        next(given)
    with pytest.raises(CheckFailedError, match="'0': kernel and feature composition differ"):
        next(given)


def test_the_fold_computes_the_bits_of_a_composition_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces and whole: what `rehearse` relies on."""
    for piece in (100, composition.PIECE):
        monkeypatch.setattr(composition, "PIECE", piece)
        model = trained()
        with torch.no_grad(), composing_in_float64(model):
            expected = {one.name: model.get_submodule(one.name).effective_kernel() for one in layer_factors(model)}
        folded = fold(model)
        assert all(torch.equal(folded.get_submodule(name).weight, kernel) for name, kernel in expected.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("factor", ["weight", "D", "weight_extra"])
def test_a_damaged_kernel_is_refused_by_name(factor: str, value: float) -> None:
    model: Any = trained()
    with torch.no_grad():
        getattr(model.dilated, factor).view(-1)[0] = value
    expected = signature(model)
    with pytest.raises(DoconvError, match=r"'dilated': the folded kernel has \d+ of \d+ values that are NaN or infin"):
        fold(model, inplace=True)
    assert signature(model) == expected
    with pytest.raises(DoconvError, match="'dilated'"):
        fold(model)


def test_a_kernel_that_no_output_reaches_is_checked_too() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model: Any = randomize(to_doconv(Unused()), seed=0)
    with torch.no_grad():
        model.unused.D[0, 0, 0] = float("nan")
    with pytest.raises(DoconvError, match="'unused'"):
        fold(model)


def test_the_kernel_is_cast_once() -> None:
    model = trained().bfloat16()
    every = layer_factors(copy.deepcopy(model).double())
    exact = {one.name: torch.cat([kernel for _, kernel in folded_rows(one)]) for one in every}
    folded = fold(model)
    for name, kernel in exact.items():
        assert torch.equal(folded.get_submodule(name).weight, kernel.bfloat16()), name


def test_the_fold_of_a_zero_d_is_the_weight() -> None:
    original = build_model("tied")
    folded = fold(to_doconv(original, d_mul="2K"))
    state = folded.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in original.state_dict().items())


def test_a_zero_kernel_folds() -> None:
    model = trained("residual")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not any(p.any() for p in fold(model).parameters())
    assert FOLD_TOLERANCE == 1e-12


def test_the_folded_model_trains_on() -> None:
    model, x = trained(), varied_images(2, 3, 32, 32)
    moved = run(model, x)
    folded = fold(model).train()
    assert difference(run(folded.eval(), x), moved) < 1e-5
    folded(x).square().mean().backward()
    assert all(p.grad is not None for p in folded.parameters())
