"""`to_doconv`: the conversion of any nn.Module, in the user's own module tree."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from doconv_convert.errors import DoconvError
from doconv_convert.rewrite.discover import Discovery, discover
from doconv_convert.rewrite.install import install, refuse_name_clashes
from doconv_convert.rewrite.options import Options
from doconv_convert.rewrite.passes import ToDOConvPass
from doconv_convert.rewrite.sites import Action, decide


def to_doconv(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    d_mul: int | str = "K",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    pointwise: bool = False,
    max_d_params: int = 16_000_000,
    seed: int = 0,
    composition: str = "kernel",
    inplace: bool = False,
) -> nn.Module:
    """Over-parameterize every eligible convolution of `model` (arXiv 2006.12030). What it computes stays the
    same, bit for bit; its class, names, hooks, dtypes and devices too.

    Convert before building the optimizer, and before DDP, FSDP or torch.compile.

    Args:
        model: any nn.Module, traceable by torch.fx or not.
        example_inputs: a tuple of positional inputs, a dict of keyword inputs, or one tensor. Needed only to find
            functional convolutions in forwards that torch.fx cannot trace.
        d_mul: D_mul >= K: a number, "K", "2K" or "K+3".
        include, exclude: globs on the sites' names; exclude wins.
        pointwise: give 1x1 kernels a D too.
        max_d_params: a site whose D would hold more numbers is kept as it is.
        seed: draws weight_extra (D_mul > K); the global random state is not touched.
        composition: how convolution layers train: "kernel" (D and W are multiplied, then one convolution), "feature",
            or "auto", which is faster where wide layers give few outputs (`DOConv2d.takes_features`) and, in
            training, equal to rounding only.
        inplace: convert `model` itself instead of a copy.

    Returns:
        The converted model, of the user's class. An already converted model comes back unchanged.

    Raises:
        UsageError: a glob that matches nothing, or D_mul below some kernel's K.
        DoconvError: nothing to convert, or a model that is wrapped or compiled already.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> image = torch.randn(1, 3, 8, 8)
    >>> training = to_doconv(net)
    >>> type(training[0]).__name__, torch.equal(training(image), net(image))
    ('DOConv2d', True)
    """
    options = Options(d_mul, include, exclude, pointwise, max_d_params, seed, composition)
    if not inplace:
        return convert_copy(model, example_inputs, options)
    refuse_wrapped(model)
    return _convert(model, example_inputs, options)


def convert_copy(model: nn.Module, example_inputs: Any, options: Options) -> nn.Module:
    """As `to_doconv`, with what the user chose in one value: a converted copy of `model`."""
    refuse_wrapped(model)
    return _convert(copy_model(model), example_inputs, options)


def _convert(model: nn.Module, example_inputs: Any, options: Options) -> nn.Module:
    discovery = discover(model, example_inputs)
    decide(discovery.sites, options)
    require_sites(discovery)
    convert(discovery, options)
    return model


def convert(discovery: Discovery, options: Options) -> None:
    """Carry out a decided plan: the pass on every region's graphs, then the owners that no graph shows."""
    planned = [site for site in discovery.sites if site.action is Action.CONVERT]
    for site in planned:
        refuse_name_clashes(site)
    rewrite = ToDOConvPass(
        options.d_mul,
        options.include,
        options.exclude,
        pointwise=options.pointwise,
        max_d_params=options.max_d_params,
        seed=options.seed,
        composition=options.composition,
        sites=planned,
    )
    for region in discovery.regions:
        for graph in region.graphs:
            rewrite(graph)
    missed = [f"'{site.name}'" for site in planned if site.seen_in_graph and not site.rewritten]
    if missed:
        raise DoconvError(f"the pass left {', '.join(missed)} as they were; the model is partly converted.")
    for site in planned:
        install(site, options)


def require_sites(discovery: Discovery) -> None:
    """Raises DoconvError where there is no DO-Conv site and none to make, with the reasons; also where only 1x1 layers
    would change and a part of the model was not looked into, which may have all the others."""
    sites = discovery.sites
    if any(site.action is Action.ALREADY or site.d_mul is not None for site in sites):
        return
    if any(site.action is Action.CONVERT for site in sites) and not discovery.not_looked_into:
        return
    reasons = Counter("1x1 (no D)" if site.reason is None else site.reason.value for site in sites)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "it has no convolution"
    unseen = ", ".join(f"'{path or 'the model itself'}'" for path in discovery.not_looked_into)
    hint = f" Not looked into: {unseen}; pass example_inputs." if unseen else ""
    raise DoconvError(f"{type(discovery.model).__name__}: nothing to convert ({told}).{hint}")


def refuse_wrapped(model: nn.Module) -> None:
    """Raises DoconvError for DDP, FSDP, compiled and scripted models: their engines hold the old parameters."""
    wrappers = {
        "DistributedDataParallel": "wrap the converted model instead: DDP(to_doconv(model))",
        "DataParallel": "wrap the converted model instead",
        "FullyShardedDataParallel": "wrap the converted model instead",
        "FSDPModule": "call fully_shard on the converted model instead",
        "OptimizedModule": "compile the converted model instead: torch.compile(to_doconv(model))",
    }
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise DoconvError(
                f"'{path or type(model).__name__}' is a TorchScript module already; convert the Python model, and "
                "script the folded one: torch.jit.script(fold(model))."
            )
        for base in type(module).__mro__:
            if base.__name__ in wrappers and base.__module__.startswith("torch."):
                raise DoconvError(
                    f"'{path or type(model).__name__}' is a {base.__name__} already; {wrappers[base.__name__]}."
                )
        if module._compiled_call_impl is not None:
            raise DoconvError(
                f"'{path or type(model).__name__}' is compiled in place already; call .compile() on the converted "
                "model instead."
            )


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, also of models whose modules hold non-leaf tensors (old-style weight norm, pruning).

    Raises DoconvError where the model cannot be copied at all.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # a user's module may refuse in any way
        raise DoconvError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); pass inplace=True."
        ) from error
    _restore_modes(model, copied)
    _refuse_closures(model, copied)
    return copied


def _refuse_closures(model: nn.Module, copied: nn.Module) -> None:
    """Raises DoconvError where a function set on a module (its forward, a hook) holds a part of the model: `deepcopy`
    hands functions on as they are, and the copy would go on running the original's layers."""
    parts = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for path, module in copied.named_modules():
        for name, value in vars(module).items():
            for function in value.values() if isinstance(value, dict) else (value,):
                if isinstance(function, FunctionType) and any(id(held) in parts for held in _held_by(function)):
                    raise DoconvError(
                        f"'{path or type(model).__name__}': {name.strip('_')} is a closure that holds layers of the "
                        "model itself; a copy would go on running the original's. Pass inplace=True, or make it a "
                        "method of the class."
                    )


def _held_by(function: FunctionType) -> list[Any]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell.cell_contents is not None]
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _restore_modes(model: nn.Module, copied: nn.Module) -> None:
    """Give a copy the `training` flags of its model: the copies of GraphModules come back in training mode."""
    flags = [module.training for module in model.modules()]
    modules = list(copied.modules())
    for module, training in zip(modules, flags, strict=True):
        if module.training != training:
            module.train(training)  # torchvision's feature extractors change graphs here
    for module, training in zip(modules, flags, strict=True):
        module.training = training


def same_outputs(a: Any, b: Any) -> bool:
    """Whether two models' outputs (tensors in any nesting) have the same structure and bits (`torch.equal`)."""
    (leaves_a, tree_a), (leaves_b, tree_b) = (torch.utils._pytree.tree_flatten(x) for x in (a, b))
    return tree_a == tree_b and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(leaves_a, leaves_b, strict=True)
    )
