"""Putting D into the modules that own a kernel, and taking it out again."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from doconv_convert.errors import DoconvError
from doconv_convert.nn.factors import StoredKernel, new_factors
from doconv_convert.nn.layers import DOCONV_CLASSES
from doconv_convert.nn.overlay import is_overlaid, overlay, remove_overlay, stored_kernels
from doconv_convert.rewrite.discover import is_plain
from doconv_convert.rewrite.options import Options
from doconv_convert.rewrite.sites import Site

_PLAIN_OF: dict[type[nn.Module], type[nn.Module]] = {layer: plain for plain, layer in DOCONV_CLASSES.items()}


def is_graph_storage(module: nn.Module) -> bool:
    """A GraphModule, or the bare containers fx makes for what a graph reads: their nodes do the composing."""
    return isinstance(module, fx.GraphModule) or type(module) is nn.Module


def refuse_name_clashes(site: Site) -> None:
    """Raises DoconvError where an owner already has attributes under the names D would need."""
    for owner in site.owners:
        kernel = StoredKernel(owner.kernel, site.group_count)
        names = [kernel.d_name, kernel.extra_name, kernel.slots_name]
        taken = [name for name in names if site.d_mul is not None and hasattr(owner.module, name)]
        if taken:
            raise DoconvError(
                f"'{owner.name}': {type(owner.module).__name__} already has an attribute '{taken[0]}', the name D is "
                f"stored under; rename it or leave the layer out with exclude=['{owner.name}']."
            )


def factors(site: Site, options: Options) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The site's D and weight_extra, made at the first call."""
    if site.factors is None:
        if site.parameter is None or site.d_mul is None:
            raise RuntimeError(f"'{site.name}' was not planned to have a D.")
        site.factors = new_factors(site.parameter, site.group_count, site.d_mul, options.seed, site.name)
    return site.factors


def register_factors(module: nn.Module, kernel: StoredKernel, d: nn.Parameter, extra: nn.Parameter | None) -> None:
    module.register_parameter(kernel.d_name, d)
    if extra is not None:
        module.register_parameter(kernel.extra_name, extra)


def install(site: Site, options: Options) -> bool:
    """Make every owner of the site's kernel over-parameterized, in place; whether any was not so already."""
    changed = False
    for owner in site.owners:
        module, kernel = owner.module, StoredKernel(owner.kernel, site.group_count)
        if type(module) in _PLAIN_OF or kernel in stored_kernels(module):
            continue
        if is_plain(module):
            layer: Any = module
            layer.__class__ = DOCONV_CLASSES[type(module)]
            layer.composition = options.composition
            d, extra = factors(site, options) if site.d_mul is not None else (None, None)
            layer.register_parameter("D", d)
            layer.register_parameter("weight_extra", extra)
            changed = True
        elif site.d_mul is not None and not (is_graph_storage(module) and kernel.d_name in module._parameters):
            register_factors(module, kernel, *factors(site, options))
            if not is_graph_storage(module):
                overlay(module, [kernel])
            changed = True
    return changed


def is_over_parameterized(module: nn.Module) -> bool:
    return type(module) in _PLAIN_OF or is_overlaid(module)


def restore(module: nn.Module) -> None:
    """Give an over-parameterized module its own class back and drop its D; the kernels are the caller's."""
    for kernel in stored_kernels(module):
        for name in (kernel.d_name, kernel.extra_name):
            module._parameters.pop(name, None)
    if is_overlaid(module):
        remove_overlay(module)
    elif type(module) in _PLAIN_OF:
        for name in ("D", "weight_extra"):
            module._parameters.pop(name, None)
        del module.composition
        module.__class__ = _PLAIN_OF[type(module)]
