"""The fold of our own layers: compose in float64, check by the other composition, round correctly, assign."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from doconv_convert.errors import CheckFailedError, DoconvError
from doconv_convert.nn.composition import full_d, full_w, row_pieces
from doconv_convert.nn.factors import read_factors
from doconv_convert.nn.layers import fold_kernel, to_float64_cpu
from doconv_convert.nn.overlay import is_over_parameterized, stored_kernels
from doconv_convert.rewrite.install import restore
from doconv_convert.rewrite.rounding import correctly_rounded
from doconv_convert.rewrite.sites import site_name

# Two float64 sums of at most a few ten thousand terms; the largest seen over torchvision is 4e-15.
FOLD_TOLERANCE = 1e-12


# What a float64 sum of so many terms is off by at most, relative to the largest of them.
NEAR = 1e-12
# An input and its features.
Probe = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Factors:
    """One kernel's W (`weight` and `extra`) and D, with the site's name for messages."""

    name: str
    weight: Tensor
    d: Tensor
    extra: Tensor | None
    groups: int


@dataclass(frozen=True)
class Rounding:
    """How a folded kernel was rounded: its number of weights, and `corrected`, those among them that the float64
    composition's cast had rounded twice. `corrected` is None where error-free sums could not tell (`rounded_rows`)."""

    weights: int
    corrected: int | None


def layer_factors(model: nn.Module) -> list[Factors]:
    """The factors of every over-parameterized module; a Parameter that several share comes once."""
    return unique(
        [
            Factors(site_name(path, kernel.name), *read_factors(module, kernel), kernel.groups)
            for path, module in model.named_modules()
            for kernel in stored_kernels(module)
        ]
    )


def unique(every: Sequence[Factors]) -> list[Factors]:
    """Without those whose W came before: one Parameter is folded once."""
    first: dict[int, Factors] = {}
    for factors in every:
        first.setdefault(id(factors.weight), factors)
    return list(first.values())


def folded_rows(factors: Factors) -> Iterator[tuple[slice, Tensor]]:
    """The kernel's rows (output channels) in float64 on the CPU, piece by piece, each required finite and checked by
    feature composition. A piece's W may be overwritten as soon as it was given.

    Raises DoconvError naming the site and what was found.
    """
    name = factors.name or "the convolution"
    if factors.weight.is_meta:
        raise DoconvError(f"'{name}': its tensors are on the meta device and hold no values; load a state dict first.")
    d = to_float64_cpu(factors.d)
    x, features = draw_probe(d)
    for rows, channels, groups in row_pieces(factors.weight.shape, factors.groups):
        extra = None if factors.extra is None else to_float64_cpu(factors.extra[rows])
        piece = Factors(name, to_float64_cpu(factors.weight[rows]), d[channels], extra, groups)
        kernel = fold_kernel(piece.weight, piece.d, piece.extra, groups)
        error = composition_error(piece, kernel, (x[channels], features[channels]))
        if not error <= FOLD_TOLERANCE and not error <= FOLD_TOLERANCE * _cancellation(piece, kernel):
            _require_finite(name, factors)
            raise CheckFailedError(
                f"'{name}': kernel and feature composition differ by {error:.1e} of the output's scale in float64, "
                f"expected at most {FOLD_TOLERANCE:.0e}; nothing was folded. Please report this layer's shapes."
            )
        _require_range(name, kernel, factors.weight.dtype)
        yield rows, kernel


def _require_range(name: str, kernel: Tensor, dtype: torch.dtype) -> None:
    largest, limit = float(kernel.abs().max()) if kernel.numel() else 0.0, torch.finfo(dtype).max
    if largest > limit:
        raise DoconvError(
            f"'{name}': the folded kernel has values up to {largest:.1e}, beyond the largest finite number of "
            f"{str(dtype).removeprefix('torch.')}, {limit:.1e}; the weights were damaged in training or in the file."
        )


def _cancellation(factors: Factors, kernel: Tensor) -> float:
    """By how much the terms of the composition exceed their sum: so much of the sum's rounding is theirs. NaN or
    infinite where a value is."""
    extra = None if factors.extra is None else factors.extra.abs()
    terms = fold_kernel(factors.weight.abs(), factors.d.abs(), extra, factors.groups)
    return float(terms.norm() / kernel.norm())


def _require_finite(name: str, factors: Factors) -> None:
    kernel = fold_kernel(factors.weight, factors.d, factors.extra, factors.groups)
    finite = torch.isfinite(kernel)
    if not finite.all():
        count = int((~finite).sum())
        raise DoconvError(
            f"'{name}': the folded kernel has {count} of {kernel.numel()} values that are NaN or infinite, expected "
            "none; the weights were damaged in training or in the file: go back to an earlier checkpoint."
        )


def draw_probe(d: Tensor) -> Probe:
    """A random input that just fills the kernel, (C_in, 2, K), and its features by D^, (C_in, 2, D_mul), in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(d.shape[0], 2, d.shape[1], generator=generator, dtype=torch.float64)
    return x, torch.bmm(x, full_d(to_float64_cpu(d)))


def composition_error(factors: Factors, kernel: Tensor, probe: Probe | None = None) -> float:
    """|x k - feature composition of x| / |x k| in float64, on a random x that just fills the kernel: every entry of
    kernel, W and D takes part. NaN where one of them is not finite. `probe` is D's own, where it is at hand."""
    weight, d = to_float64_cpu(factors.weight), to_float64_cpu(factors.d)
    slots = full_w(weight, None if factors.extra is None else to_float64_cpu(factors.extra))

    def compare(x: Tensor, features: Tensor) -> float:
        direct = _at_one_position(x, kernel.flatten(2), factors.groups)
        return relative_distance(_at_one_position(features, slots, factors.groups), direct)

    x, features = draw_probe(d) if probe is None else probe
    error = compare(x, features)
    if math.isfinite(error):
        return error
    x = x * probe_scale(kernel, weight, d)
    return compare(x, torch.bmm(x, full_d(d)))


def _at_one_position(x: Tensor, w: Tensor, groups: int) -> Tensor:
    """What a convolution gives where its kernel w, (C_out, C_in/g, S), covers x, (C_in, N, S): (g, N, C_out/g)."""
    channels, samples, slots = x.shape
    x = x.reshape(groups, channels // groups, samples, slots).transpose(1, 2).reshape(groups, samples, -1)
    return torch.bmm(x, w.reshape(groups, w.shape[0] // groups, -1).transpose(1, 2))


def probe_scale(*tensors: Tensor) -> float:
    """By how much to scale an input so that no product with huge, finite values overflows."""
    largest = max(float(tensor.detach().abs().max()) if tensor.numel() else 0.0 for tensor in tensors)
    return 2.0**-64 if largest > 2.0**500 else 1.0


def relative_distance(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, also where the squares of the values would overflow; of zero, ||got||."""
    unit = float(expected.abs().max()) if expected.numel() else 0.0
    got, expected = (got / unit, expected / unit) if unit else (got, expected)
    scale = float(expected.norm())
    return float((got - expected).norm()) / scale if scale else float(got.norm())


def rounded_rows(factors: Factors) -> Iterator[tuple[slice, Tensor, int | None]]:
    """`folded_rows` in the kernel's own dtype, and how many entries the float64 composition's cast had rounded twice.

    Where W and D are float32, each entry is the float32 number nearest to the exact product: error-free sums say which
    that is. None instead of the count where the product is not exact in float64: the kernel is cast once.
    """
    given = [tensor for tensor in (factors.weight, factors.d, factors.extra) if tensor is not None]
    exact = all(tensor.dtype == torch.float32 for tensor in given)
    pieces = row_pieces(factors.weight.shape, factors.groups)
    for (rows, kernel), (_, channels, groups) in zip(folded_rows(factors), pieces, strict=True):
        cast = kernel.to(factors.weight.dtype)
        if not exact:
            yield rows, cast, None
            continue
        w, d = (part.detach().cpu().numpy() for part in (factors.weight[rows], factors.d[channels]))
        extra = None if factors.extra is None else factors.extra[rows].detach().cpu().numpy()
        nearest = torch.from_numpy(correctly_rounded(w, d, extra, groups))
        differs = cast != nearest
        count = int(differs.sum())
        if count:
            _require_near(factors, cast[differs], nearest[differs])
            cast = torch.where(differs, nearest, cast)
        yield rows, cast, count


def _require_near(factors: Factors, cast: Tensor, nearest: Tensor) -> None:
    """A composition in float64 may round a sum near the middle of two float32 numbers to the wrong one; where its terms
    cancel, to one that is as far away as its own errors are."""
    slots = [tensor for tensor in (factors.weight, factors.extra) if tensor is not None]
    largest, d = max(float(slot.detach().abs().max()) for slot in slots), float(factors.d.detach().abs().max())
    terms = largest * (1 + factors.d.shape[2] * d)
    far = (torch.nextafter(cast, nearest) != nearest) & ((cast - nearest).abs() > NEAR * terms)
    if far.any():
        raise CheckFailedError(
            f"'{factors.name or 'the convolution'}': {int(far.sum())} values of the folded kernel are not the float32 "
            "numbers nearest to the exact product of D and W; nothing was folded. Please report this layer's shapes."
        )


def assign_folded(every: Sequence[Factors]) -> dict[str, Rounding]:
    """Write each folded kernel into its W; no W may occur twice (`unique`). How each was rounded, by name."""
    rounding = {}
    for factors in every:
        counts = []
        for rows, kernel, count in rounded_rows(factors):
            counts.append(count)
            with torch.no_grad():
                factors.weight[rows].copy_(kernel)
        known = [count for count in counts if count is not None]
        rounding[factors.name] = Rounding(factors.weight.numel(), sum(known) if len(known) == len(counts) else None)
    return rounding


def restore_layers(model: nn.Module) -> bool:
    """Give every over-parameterized module its own class back; whether there was any."""
    modules = [module for module in model.modules() if is_over_parameterized(module)]
    for module in modules:
        restore(module)
    return bool(modules)
