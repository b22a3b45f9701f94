"""The kernels of a folded model that coverage asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from doconv_convert.artifacts.checkpoints.recipe import recipe_sites
from doconv_convert.rewrite.discover import discover
from doconv_convert.rewrite.foreign.authors import authors_sites
from doconv_convert.rewrite.linear.merge import InferenceModule
from doconv_convert.rewrite.sites import site_name


def kernel_paths(folded: nn.Module, trained: nn.Module) -> list[tuple[str, str]]:
    """(module, parameter) of every folded kernel; of a plain model or a merged one, of all its convolutions'."""
    merged = any(isinstance(module, InferenceModule) for module in folded.modules())
    sites = [] if merged else [(site.owner, site.kernel) for site in recipe_sites(trained)]
    sites += [] if merged else [(site.path, site.kernel) for site in authors_sites(trained)]
    if not sites:
        plain = [site for site in discover(folded).sites if site.parameter is not None]
        sites = [(site.owners[0].path, site.owners[0].kernel) for site in plain]
    return sites


def float32_kernels(folded: nn.Module, paths: Sequence[tuple[str, str]]) -> Mapping[str, Tensor]:
    """The folded kernels, as leaves that take gradients; the folded model becomes float32 in place."""
    folded.float().requires_grad_(False)
    kernels: dict[str, Tensor] = {}
    for owner, name in paths:
        kernel = folded.get_submodule(owner)._parameters[name]
        if kernel is not None and not any(kernel is known for known in kernels.values()):
            kernels[site_name(owner, name)] = kernel.requires_grad_(True)
    return kernels
