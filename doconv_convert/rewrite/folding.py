"""The fold of our own layers: compose in float64, check by the other composition, cast once, assign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from doconv_convert.errors import CheckFailedError, DoconvError
from doconv_convert.nn.composition import full_d, full_w
from doconv_convert.nn.layers import fold_kernel
from doconv_convert.nn.overlay import read_factors, stored_kernels
from doconv_convert.rewrite.install import is_over_parameterized, restore
from doconv_convert.rewrite.sites import site_name

# Two float64 sums of at most a few ten thousand terms; the largest seen over torchvision is 4e-15.
FOLD_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Factors:
    """One kernel's W (`weight` and `extra`) and D, with the site's name for messages."""

    name: str
    weight: Tensor
    d: Tensor
    extra: Tensor | None
    groups: int


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


def folded_kernel(factors: Factors) -> Tensor:
    """The kernel in float64 on the CPU, required finite and checked by feature composition.

    Raises DoconvError naming the site and what was found.
    """
    name = factors.name or "the convolution"
    if factors.weight.is_meta:
        raise DoconvError(f"'{name}': its tensors are on the meta device and hold no values; load a state dict first.")
    kernel = fold_kernel(factors.weight, factors.d, factors.extra, factors.groups)
    error = composition_error(factors, kernel)
    if not error <= FOLD_TOLERANCE:
        _require_finite(name, kernel)
        raise CheckFailedError(
            f"'{name}': kernel and feature composition differ by {error:.1e} of the output's scale in float64, "
            f"expected at most {FOLD_TOLERANCE:.0e}; nothing was folded. Please report this layer's shapes."
        )
    return kernel


def _require_finite(name: str, kernel: Tensor) -> None:
    finite = torch.isfinite(kernel)
    if not finite.all():
        count = int((~finite).sum())
        raise DoconvError(
            f"'{name}': the folded kernel has {count} of {kernel.numel()} values that are NaN or infinite, expected "
            "none; the weights were damaged in training or in the file: go back to an earlier checkpoint."
        )


def composition_error(factors: Factors, kernel: Tensor) -> float:
    """|x k - feature composition of x| / |x k| in float64, on a random x that just fills the kernel: every entry of
    kernel, W and D takes part. NaN where one of them is not finite."""
    weight, d = (t.detach().to("cpu", torch.float64) for t in (factors.weight, factors.d))
    extra = None if factors.extra is None else factors.extra.detach().to("cpu", torch.float64)
    slots, d_hat = full_w(weight, extra), full_d(d)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(d.shape[0], 2, d.shape[1], generator=generator, dtype=torch.float64)

    def compare(x: Tensor) -> float:
        direct = _at_one_position(x, kernel.flatten(2), factors.groups)
        return relative_distance(_at_one_position(torch.bmm(x, d_hat), slots, factors.groups), direct)

    error = compare(x)
    return error if math.isfinite(error) else compare(x * probe_scale(kernel, weight, d))


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


def assign_folded(every: Sequence[Factors]) -> None:
    """Write each folded kernel into its W, cast once; no W may occur twice (`unique`)."""
    for factors in every:
        kernel = folded_kernel(factors)
        with torch.no_grad():
            factors.weight.copy_(kernel)


def restore_layers(model: nn.Module) -> bool:
    """Give every over-parameterized module its own class back; whether there was any."""
    modules = [module for module in model.modules() if is_over_parameterized(module)]
    for module in modules:
        restore(module)
    return bool(modules)
