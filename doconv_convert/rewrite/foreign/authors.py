"""The layer of the authors' own PyTorch file, which other people's checkpoints were trained with, and its fold.

    k[o, j, p] = sum_s (D + I)[c, p, s] * W[o, j, s],    c = (o mod g) * (C_in / g) + j

The paper, and this package, pair output o with the rows of its own group, o // (C_out / g). That is the same
where g = 1 or C_out = g; elsewhere a checkpoint is read by the formula that it was trained with. `I` is the
stored identity, never a fresh one: at D_mul = 2K theirs is [I | I].

In a model the layer is a parametrization of the model's own kernel. The model keeps its classes, so stride, padding
and everything else are its own; reading the kernel composes it from the tensors as they were stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from doconv_convert.errors import CheckFailedError, DoconvError
from doconv_convert.rewrite.fold_kernels import FOLD_TOLERANCE, probe_scale, relative_distance
from doconv_convert.rewrite.sites import Owner


def authors_kernel(w: Tensor, d: Tensor, identity: Tensor) -> Tensor:
    """The composed kernel, (C_out, C_in/g, K), in the tensors' dtype.

    `w` is W (C_out, C_in/g, D_mul); `d` and `identity` are (C_in, K, D_mul).
    """
    # Row-major, (C_out, C_in/g) and (C_out/g, C_in) are one order: output o's slots are then the rows of o mod g.
    slots = w.reshape(-1, d.shape[0], w.shape[2])
    composed = torch.bmm(d + identity, slots.permute(1, 2, 0))
    return composed.permute(2, 0, 1).reshape(*w.shape[:2], d.shape[1])


def authors_features(x: Tensor, w: Tensor, d: Tensor, identity: Tensor) -> Tensor:
    """What `authors_kernel` gives on one window, by features and by group: (B, C_in/g, K) -> (B, C_out).

    First every slot's D_mul features, then W on them; output o takes the rows of group o mod g by slicing.
    """
    per_group, groups = w.shape[1], d.shape[0] // w.shape[1]
    result = x.new_empty(x.shape[0], w.shape[0])
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        features = torch.einsum("bjp,jps->bjs", x, (d + identity)[rows])
        result[:, group::groups] = features.flatten(1) @ w[group::groups].flatten(1).T
    return result


def pairing_is_ours(out_channels: int, groups: int) -> bool:
    """Whether the authors' rows of D are the paper's."""
    return groups == 1 or out_channels == groups


class AuthorsKernel(nn.Module):
    """A parametrization (`torch.nn.utils.parametrize`) from W to the kernel, with D, the identity and, in one
    variant of the layer, a factor `mul` (1,). Without D it only reshapes W and multiplies."""

    def __init__(
        self, d: Tensor | None, identity: Tensor | None, mul: Tensor | None, size: Sequence[int], order: Sequence[str]
    ) -> None:
        """`size` is the kernel's own; `order` are the owner's parameters in the order to restore."""
        super().__init__()
        self.size, self.order = tuple(size), tuple(order)
        self.D = None if d is None else nn.Parameter(d)
        self.register_buffer("identity", identity)
        self.mul = None if mul is None else nn.Parameter(mul)
        self.identity: Tensor | None

    def forward(self, w: Tensor) -> Tensor:
        kernel = w if self.D is None or self.identity is None else authors_kernel(w, self.D, self.identity)
        kernel = kernel.reshape(*w.shape[:2], *self.size)
        return kernel if self.mul is None else kernel * self.mul


class Scaled(nn.Module):
    """A parametrization that multiplies by `mul` (1,): the bias of that variant."""

    def __init__(self, mul: Tensor) -> None:
        super().__init__()
        self.mul = nn.Parameter(mul)

    def forward(self, value: Tensor) -> Tensor:
        return value * self.mul


class AuthorsSite(Owner):
    """One kernel that is composed by the authors' formula."""

    @property
    def factors(self) -> tuple[Tensor, AuthorsKernel]:
        """W and what composes it."""
        parametrization: Any = self.module.parametrizations[self.kernel]  # type: ignore[index]
        return parametrization.original, parametrization[0]


def authors_sites(model: nn.Module) -> Iterator[AuthorsSite]:
    """Every kernel of `model` that `install_authors` put in."""
    for path, module in model.named_modules():
        for name, parametrization in getattr(module, "parametrizations", {}).items():
            if isinstance(parametrization[0], AuthorsKernel):
                yield AuthorsSite(path, module, name)


def install_authors(
    module: nn.Module,
    kernel: str,
    w: Tensor,
    d: Tensor | None,
    identity: Tensor | None,
    bias: Tensor | None,
    mul: Tensor | None,
) -> None:
    """Compose `module`'s parameter `kernel` from foreign tensors, as stored; its bias too where there is a `mul`."""
    plain = module._parameters.get(kernel)
    if plain is None or parametrize.is_parametrized(module):
        raise DoconvError(
            f"a {type(module).__name__} of the model is parametrized already, so a foreign '{kernel}' has no place in "
            "it; take that off first."
        )
    order, size, wanted = list(module._parameters), plain.shape[2:], plain.requires_grad
    module._parameters[kernel] = nn.Parameter(w.detach().clone(), requires_grad=wanted)
    d, identity, factor = (None if one is None else one.detach().clone() for one in (d, identity, mul))
    parametrize.register_parametrization(module, kernel, AuthorsKernel(d, identity, factor, size, order), unsafe=True)
    if bias is not None and mul is not None:
        module._parameters["bias"] = nn.Parameter(bias.detach().clone(), requires_grad=wanted)
        parametrize.register_parametrization(module, "bias", Scaled(mul.detach().clone()))
    for parameter in module.parametrizations.parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(wanted)


def folded_authors_kernel(
    name: str, w: Tensor, d: Tensor | None, identity: Tensor | None, mul: Tensor | None
) -> Tensor:
    """The kernel (C_out, C_in/g, K) in float64 on the CPU, required finite and checked by features.

    Raises DoconvError naming the layer, CheckFailedError where the two compositions disagree.
    """
    w, d, identity, mul = (None if t is None else t.detach().to("cpu", torch.float64) for t in (w, d, identity, mul))  # type: ignore[assignment]
    kernel = w.flatten(2) if d is None or identity is None else authors_kernel(w, d, identity)
    if d is not None and identity is not None and torch.isfinite(kernel).all():
        x = torch.randn(2, *kernel.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x *= probe_scale(kernel, w, d)
        error = relative_distance(authors_features(x, w, d, identity), x.flatten(1) @ kernel.flatten(1).T)
        if not error <= FOLD_TOLERANCE:
            raise CheckFailedError(
                f"'{name}': kernel and feature composition differ by {error:.1e} of the output's scale in float64, "
                f"expected at most {FOLD_TOLERANCE:.0e}; nothing was folded. Please report its shapes."
            )
    kernel = kernel if mul is None else kernel * mul
    if not torch.isfinite(kernel).all():
        raise DoconvError(
            f"'{name}': the folded kernel has values that are NaN or infinite, expected none; the weights were damaged "
            "in training or in the file: go back to an earlier checkpoint."
        )
    return kernel


def fold_authors(model: nn.Module) -> list[str]:
    """Make every foreign unit of `model` an ordinary kernel, in place, cast once; their names.

    Every kernel is composed before the first change. Raises as `folded_authors_kernel`.
    """
    sites = list(authors_sites(model))
    kernels = [folded_site(site) for site in sites]
    for site, kernel in zip(sites, kernels, strict=True):
        _restore(site, kernel)
    return [site.name for site in sites]


def folded_site(site: AuthorsSite) -> Tensor:
    """The site's kernel in its own shape, float64 on the CPU."""
    w, composed = site.factors
    kernel = folded_authors_kernel(site.name, w, composed.D, composed.identity, composed.mul)
    return kernel.reshape(*kernel.shape[:2], *composed.size)


def _restore(site: AuthorsSite, kernel: Tensor) -> None:
    module, (w, composed) = site.module, site.factors
    values = {site.kernel: kernel.to(w.device, w.dtype)}
    scaled = getattr(module.parametrizations, "bias", None)
    if scaled is not None and isinstance(scaled[0], Scaled):
        exact = scaled.original.detach().double() * scaled[0].mul.detach().double()
        values["bias"] = exact.to(w.dtype)
    order, wanted = composed.order, w.requires_grad
    # Not remove_parametrizations: it takes the property off the class, which copies of the module share.
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    for name, value in values.items():
        module._parameters[name] = nn.Parameter(value.contiguous(), requires_grad=wanted)
    restored = {name: module._parameters[name] for name in order}
    module._parameters.clear()
    module._parameters.update(restored)
