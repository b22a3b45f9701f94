"""Finding every convolution of a model: a walk over its modules, its traces, and one real forward."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from doconv_convert.nn.layers import DOCONV_CLASSES
from doconv_convert.nn.overlay import is_over_parameterized, stored_kernels
from doconv_convert.rewrite.fx_graph import (
    ancestors,
    functional_calls,
    kernel_origin,
    kernel_parameter,
    parameter_read,
    spatial_sources,
)
from doconv_convert.rewrite.observe import Forward, Watched, watch_forward
from doconv_convert.rewrite.sites import Action, Owner, Reason, Site
from doconv_convert.rewrite.tracing import WRITTEN, Region, find_regions, trace
from doconv_convert.rewrite.writes import graph_writes

logger = logging.getLogger(__name__)

_PLAIN = tuple(DOCONV_CLASSES)
_QUANTIZED = ("torch.ao.nn.", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat")


@dataclass
class Discovery:
    """What was found in a model.

    `not_looked_into` names the modules whose own forward could neither be traced nor was run: a functional
    convolution in there would go unseen. `forward` is what the example inputs' run did,
    empty without them.
    """

    model: nn.Module
    sites: list[Site]
    regions: list[Region]
    not_looked_into: list[str]
    forward: Forward


class _Sites:
    """Sites by the identity of their Parameter, or by name and reason where there is none."""

    def __init__(self, model: nn.Module) -> None:
        self.order = {path: index for index, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
        self.owners: dict[int, list[Owner]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append(Owner(path, module, name))
        self.by_key: dict[Any, Site] = {}

    def of_parameter(self, parameter: nn.Parameter) -> Site:
        key = id(parameter)
        if key not in self.by_key:
            self.by_key[key] = Site(self.owners[key], parameter)
            if parameter.is_complex():
                self.by_key[key].keep(Reason.COMPLEX)
        return self.by_key[key]

    def without_parameter(self, owner: Owner, reason: Reason) -> Site:
        site = self.by_key.setdefault((owner.name, reason), Site([owner], None))
        site.keep(reason)
        return site

    def keep_written(self, parameters: set[int]) -> None:
        """Over-parameterized, these would start anew at every forward."""
        for key in parameters & self.by_key.keys():
            if self.by_key[key].action is not Action.ALREADY:
                self.by_key[key].keep(Reason.WRITTEN)

    def in_order(self) -> list[Site]:
        return sorted(self.by_key.values(), key=lambda site: self.order.get(site.owners[0].path, len(self.order)))


def discover(model: nn.Module, example_inputs: Any = None) -> Discovery:
    """Every convolution of `model`, undecided; the model is left as it was.

    With example inputs one forward in eval mode adds calls, output sizes and MACs, and finds functional
    convolutions in forwards that cannot be traced.
    """
    sites = _Sites(model)
    # Transposed layers last: one that shares the kernel of an ordinary convolution is no site of its own.
    for path, module in sorted(model.named_modules(), key=lambda item: isinstance(item[1], _ConvTransposeNd)):
        _classify_module(sites, path, module)
    regions = find_regions(model)
    for region in regions.traced:
        for graph in region.graphs:
            _read_graph(sites, model, region, graph)
    unseen, forward = regions.untraced, Forward()
    if example_inputs is not None:
        forward = watch_forward(model, example_inputs)
        paths = {id(module): path for path, module in model.named_modules()}
        _read_forward(sites, forward, paths)
        unseen = [path for path in unseen if model.get_submodule(path) not in forward.entered]
    return Discovery(model, sites.in_order(), regions.traced, unseen, forward)


def _classify_module(sites: _Sites, path: str, module: nn.Module) -> None:
    if is_over_parameterized(module):
        _already(sites, path, module)
    elif _is_quantized(module):
        sites.without_parameter(Owner(path, module, "weight"), Reason.QUANTIZED)
    elif isinstance(module, _ConvNd):
        weight = module._parameters.get("weight")
        if isinstance(weight, UninitializedParameter) or isinstance(module, LazyModuleMixin):
            sites.without_parameter(Owner(path, module, "weight"), Reason.LAZY)
        elif weight is None:
            sites.without_parameter(Owner(path, module, "weight"), Reason.PARAMETRIZED)
        elif isinstance(module, _ConvTransposeNd):
            if id(weight) not in sites.by_key:
                sites.without_parameter(Owner(path, module, "weight"), Reason.TRANSPOSED)
        else:
            reason, groups = kernel_role(module)
            site = sites.of_parameter(weight)
            if reason is None:
                site.groups.add(groups)
            else:
                site.keep(reason)


def _is_quantized(module: nn.Module) -> bool:
    """Quantized or in quantization-aware training; a fused float block is a Sequential of ordinary layers."""
    cls = type(module)
    ours = cls.__module__.startswith(_QUANTIZED) and "Conv" in cls.__name__
    return ours and (isinstance(module, _ConvNd) or not isinstance(module, nn.Sequential))


def _already(sites: _Sites, path: str, module: nn.Module) -> None:
    names = {kernel.name: kernel for kernel in stored_kernels(module)}
    if not names:  # a 1x1 layer without D
        site = sites.of_parameter(module._parameters["weight"])  # type: ignore[arg-type]
        site.groups.add(int(module.groups))  # type: ignore[arg-type]
        site.action = Action.ALREADY
    for name, kernel in names.items():
        site = sites.of_parameter(module._parameters[name])  # type: ignore[arg-type]
        d = module._parameters[kernel.d_name]
        site.groups.add(kernel.groups)
        site.action, site.d_mul = Action.ALREADY, None if d is None else d.shape[2]


def kernel_role(conv: nn.Module) -> tuple[Reason | None, int]:
    """Whether a Conv layer of any class convolves with its own `weight`, or with a kernel that it computes from that
    (None), and with how many groups.

    A class that keeps torch's forward does. Any other is traced alone; where fx cannot follow, it is run
    once on a small input and watched.
    """
    cls: Any = type(conv)
    groups = int(conv.groups)  # type: ignore[arg-type]
    plain: Any = next(base for base in _PLAIN if isinstance(conv, base))
    if (cls.forward, cls._conv_forward) == (
        plain.forward,
        plain._conv_forward,
    ) and "forward" not in conv.__dict__:
        return None, groups
    graph, training = (trace(conv, training=mode) for mode in (False, True))
    if any(id(conv._parameters["weight"]) in written_in(gm) for gm in (graph, training) if gm is not None):
        return Reason.WRITTEN, groups
    calls = list(functional_calls(graph.graph)) if graph is not None else []
    if graph is None or not calls:
        return _probe(conv, groups)
    reasons = [_kernel_reason(graph, conv, call.kernel) for call in calls]
    return next((reason for reason in reasons if reason is not None), None), calls[0].groups or groups


def _kernel_reason(graph: fx.GraphModule, conv: nn.Module, kernel: fx.Node) -> Reason | None:
    """None where the kernel is the layer's `weight`, or computed from it and no other kernel."""
    weight, origin = conv._parameters["weight"], kernel_origin(graph, kernel)
    if origin is Reason.COMPUTED:
        reads = [parameter_read(graph, node) for node in ancestors(kernel)]
        alone = all(source is weight for source in spatial_sources(graph, kernel))
        return None if alone and any(read is weight for read in reads) else Reason.COMPUTED
    if isinstance(origin, Reason):
        return origin
    return None if origin is weight else Reason.COMPUTED


def written_in(gm: fx.GraphModule) -> set[int]:
    """The ids of the parameters that a traced forward writes."""
    lasting: set[int] = gm.meta.get(WRITTEN, set())
    return lasting | {id(parameter) for parameter in graph_writes(gm)}


def _probe(conv: Any, groups: int) -> tuple[Reason | None, int]:
    weight = conv._parameters["weight"]
    size = [2 * (k - 1) * d + 4 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    sample = torch.zeros(2, conv.in_channels, *size, dtype=weight.dtype, device=weight.device)
    try:
        forward = watch_forward(conv, sample)
    except Exception as error:  # a class that will not take an image: what it does with its kernel stays its own affair
        logger.info("%s does not run on an image of zeros (%s): its kernel is kept", type(conv).__name__, error)
        return Reason.COMPUTED, groups
    if id(weight) in forward.written:
        return Reason.WRITTEN, groups
    watched = forward.by_parameter.get(id(weight))
    odd = [kernel.reason for kernel in forward.odd_kernels if kernel.parameter != id(weight)]
    if watched is not None and not odd:
        return None, min(watched.groups)
    return (odd[0] if odd else Reason.COMPUTED), groups


def is_plain(module: nn.Module) -> bool:
    """Exactly one of torch's own classes, with no forward of the instance's own."""
    return type(module) in DOCONV_CLASSES and "forward" not in module.__dict__


def _read_graph(sites: _Sites, model: nn.Module, region: Region, gm: fx.GraphModule) -> None:
    for call in sorted(functional_calls(gm.graph), key=lambda call: call.transposed):
        origin = Reason.TRANSPOSED if call.transposed else kernel_origin(gm, call.kernel)
        if isinstance(origin, Reason):
            known = [kernel_parameter(gm, call.kernel), *spatial_sources(gm, call.kernel)]
            if origin is not Reason.INPUT_DEPENDENT and any(id(parameter) in sites.by_key for parameter in known):
                continue  # a transposed call with a convolution's kernel, or one computed from it: that one's site
            sites.without_parameter(_caller(model, region, call.node, call.kernel), origin)
        elif origin is None:
            _already_composed(sites, gm, call.kernel)
        elif call.groups is not None:
            site = sites.of_parameter(origin)
            site.groups.add(call.groups)
            site.seen_in_graph = True
    for node in gm.graph.nodes:
        if node.op == "call_module":
            weight = gm.get_submodule(str(node.target))._parameters.get("weight")
            if weight is not None and id(weight) in sites.by_key:
                sites.by_key[id(weight)].seen_in_graph = True
    sites.keep_written(written_in(gm))


def _already_composed(sites: _Sites, gm: fx.GraphModule, composition: fx.Node) -> None:
    _, d, _, groups = composition.args
    parameter = kernel_parameter(gm, composition)
    residual = parameter_read(gm, d) if isinstance(d, fx.Node) else None
    if parameter is not None and residual is not None and isinstance(groups, int):
        site = sites.of_parameter(parameter)
        site.groups.add(groups)
        site.action, site.d_mul = Action.ALREADY, residual.shape[2]


def _caller(model: nn.Module, region: Region, node: fx.Node, kernel: fx.Node) -> Owner:
    """Whom to name for a kernel that is no Parameter: the attribute read, else the module that makes the call."""
    if kernel.op == "get_attr":
        path, _, name = str(kernel.target).rpartition(".")
        full = f"{region.path}.{path}".strip(".")
        return Owner(full, model.get_submodule(full), name)
    stack = list(node.meta.get("nn_module_stack", {}))
    inner = f"{region.path}.{stack[-1] if stack else ''}".strip(".")
    return Owner(inner, model, "weight" if inner else node.name)


def _read_forward(sites: _Sites, forward: Forward, paths: dict[int, str]) -> None:
    for site in sites.by_key.values():
        site.calls = 0 if site.parameter is not None else site.calls
    known = [(sites.by_key[key], watched) for key, watched in forward.by_parameter.items() if key in sites.by_key]
    for key, watched in forward.by_parameter.items():
        if key not in sites.by_key and watched.direct:
            parameter = sites.owners[key][0].module._parameters[sites.owners[key][0].kernel]
            if parameter is not None:
                known.append((sites.of_parameter(parameter), watched))
    for site, watched in known:
        _record(site, watched)
    sites.keep_written(forward.written)
    for module, reason, source in forward.odd_kernels:
        path = paths.get(id(module), "")
        listed = any(owner.path == path for site in sites.by_key.values() for owner in site.owners)
        if not listed and source not in sites.by_key:
            sites.without_parameter(Owner(path, module, "weight"), reason)


def _record(site: Site, watched: Watched) -> None:
    site.groups |= watched.groups
    site.calls, site.macs = watched.calls, watched.macs
    site.batch, site.output_size = watched.batch, watched.output_size
