"""Merging the linear regions of a model: each becomes one convolution, in the smallest module that encloses it.

That module becomes a GraphModule for inference; every other keeps its class. A model that cannot be traced whole is
entered child by child.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from doconv_convert.errors import DoconvError
from doconv_convert.rewrite.fx_graph import reads_metadata
from doconv_convert.rewrite.linear.evaluate import fits_torch, shown_macs
from doconv_convert.rewrite.linear.fx_steps import FxSteps
from doconv_convert.rewrite.linear.reasons import Reason
from doconv_convert.rewrite.linear.region_check import REGION_TOLERANCE, layer_of, region_error
from doconv_convert.rewrite.linear.regions import find_regions
from doconv_convert.rewrite.linear.steps import DeclinedRegion, LinearRegion, Merge
from doconv_convert.rewrite.tracing import WRITTEN, trace

_COMPARISONS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.getitem)


class InferenceModule(fx.GraphModule):
    """What became of a module whose linear regions were merged: its graph in eval mode."""

    def train(self, mode: bool = True) -> InferenceModule:
        """Raises DoconvError for training mode, which the graph does not have."""
        if mode:
            raise DoconvError(
                f"{type(self).__name__}: linear regions of this module were merged for inference; train the model "
                "from before `fold` with `merge`."
            )
        return super().train(mode)


@dataclass(frozen=True)
class MergedRegion:
    """One region that became the convolution `name`: what it was and what it is.

    MACs are those of one sample of 64 positions an axis at the region's input. `error` is the largest relative
    difference between the region's own forward and the convolution, both in float64, over inputs of the spatial
    `sizes`.
    """

    name: str
    nodes: tuple[str, ...]
    convolutions: int
    batch_norms: int
    kernel: tuple[int, ...]
    groups: int
    macs_before: int
    macs: int
    parameters_before: int
    parameters: int
    error: float
    sizes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class LeftRegion:
    """What looks like a region of `module` and was left, with the reason."""

    module: str
    nodes: tuple[str, ...]
    reason: str


@dataclass
class MergeReport:
    """The model (another one where its root became a GraphModule), and every region of it."""

    model: nn.Module
    merged: list[MergedRegion] = field(default_factory=list)
    declined: list[LeftRegion] = field(default_factory=list)


@dataclass(frozen=True)
class _Site:
    """A region or what looks like one, the module that encloses it, and those to enter on the way to its nodes."""

    path: str
    entered: frozenset[str]
    region: LinearRegion | DeclinedRegion


def merge_in_place(model: nn.Module, merge: Merge) -> MergeReport:
    """Merge the linear regions of `model` itself, which is in eval mode and has no DO-Conv layers left. The new
    convolutions have the dtype of the model's first floating-point parameter."""
    report = MergeReport(model)
    if merge == "none":
        return report
    sites = list(_sites(model, "", merge, set()))
    report.declined = [_left(site.path, site.region) for site in sites if isinstance(site.region, DeclinedRegion)]
    found = [site for site in sites if isinstance(site.region, LinearRegion)]
    built: dict[int, nn.Module] = {}
    gone: set[int] = set()
    paths = dict.fromkeys(site.path for site in found)
    for path in sorted(paths, key=lambda path: path.count(".") + bool(path)):  # the outermost first
        module = model.get_submodule(path)
        if id(module) in built or id(module) in gone:
            continue
        entered = _entered(model, path, found)
        merged = _merge_module(module, path, entered, merge, report)
        if merged is not None:
            built[id(module)] = merged
            gone |= entered
    report.model = built.get(id(model), model)
    for parent in [one for module in (report.model, *built.values()) for one in module.modules()]:
        for name, child in parent._modules.items():
            if id(child) in built:
                parent._modules[name] = built[id(child)]
    return report


def find_in_model(model: nn.Module, merge: Merge = "branches") -> list[LinearRegion]:
    """The linear regions that `merge_in_place` would merge, but for their own check; the model is not changed."""
    return [site.region for site in _sites(model, "", merge, set()) if isinstance(site.region, LinearRegion)]


def _sites(module: nn.Module, path: str, merge: Merge, visited: set[int]) -> Iterator[_Site]:
    if id(module) in visited:
        return
    visited.add(id(module))
    gm = _traced(module)
    if gm is not None:
        found = find_regions(FxSteps(gm).steps, merge, fits_torch)
        # the nodes of a graph of the user's own tell of another model's modules
        scopes = {node.name: () if isinstance(module, fx.GraphModule) else _scopes(node) for node in gm.graph.nodes}
        every: list[LinearRegion | DeclinedRegion] = [*found.regions, *found.declined]
        for region in every:
            yield _site(path, [scopes[step.name] for step in region.steps], region)
        opaque = [str(n.target) for n in gm.graph.nodes if n.op == "call_module" and _is_opaque(gm, n)]
        for name in dict.fromkeys(opaque):
            yield from _sites(gm.get_submodule(name), f"{path}.{name}".lstrip("."), merge, visited)
        return
    for name, child in module.named_children():
        yield from _sites(child, f"{path}.{name}".lstrip("."), merge, visited)


def _traced(module: nn.Module, entered: set[int] | None = None) -> fx.GraphModule | None:
    """The module's graph in eval mode, of a GraphModule a copy of its own, without assertions; None where there is
    none, or where it writes parameters."""
    if isinstance(module, fx.GraphModule):
        gm: fx.GraphModule | None = fx.GraphModule(module, copy.deepcopy(module.graph))
    else:
        gm = trace(module, training=False, entered=entered)
    if gm is None or gm.meta.get(WRITTEN):
        return None
    for node in reversed(gm.graph.nodes):
        if node.target is torch._assert or (not node.users and _only_describes(node)):
            gm.graph.erase_node(node)
    return gm


def _only_describes(node: fx.Node) -> bool:
    """Whether a node reads no values: shapes, dtypes and what is compared of them for an assertion."""
    if node.op == "call_function" and node.target in _COMPARISONS:
        return all(_only_describes(one) for one in node.all_input_nodes)
    return reads_metadata(node)


def _entered(model: nn.Module, path: str, found: Sequence[_Site]) -> set[int]:
    """The modules to enter from the one at `path`: on the way to its regions' nodes, and to those of regions that lie
    in a module entered already."""
    entered = {id(model.get_submodule(name)) for site in found if site.path == path for name in site.entered}
    while True:
        inside = [site for site in found if id(model.get_submodule(site.path)) in entered]
        more = {id(model.get_submodule(name)) for site in inside for name in site.entered}
        if more <= entered:
            return entered
        entered |= more


def _is_opaque(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a graph calls a module with an inside of its own."""
    return any(True for _ in gm.get_submodule(str(node.target)).children())


def _scopes(node: fx.Node) -> tuple[str, ...]:
    """The paths of the called modules that a node lies in, the outermost first; the root is not among them."""
    stack = node.meta.get("nn_module_stack", {})
    paths = tuple(str(path) for path, _ in stack.values())
    return paths[:-1] if node.op == "call_module" else paths


def _site(path: str, scopes: Sequence[tuple[str, ...]], region: LinearRegion | DeclinedRegion) -> _Site:
    depth = 0
    while all(len(scope) > depth and scope[depth] == scopes[0][depth] for scope in scopes):
        depth += 1
    enclosing = scopes[0][depth - 1] if depth else ""
    entered = {name for scope in scopes for name in scope[depth:]}
    join = f"{path}.".lstrip(".")
    return _Site(f"{join}{enclosing}".rstrip("."), frozenset(f"{join}{name}" for name in entered), region)


def _merge_module(
    module: nn.Module, path: str, entered: set[int], merge: Merge, report: MergeReport
) -> nn.Module | None:
    """The module as a GraphModule whose regions are merged; None where there is none in the end."""
    gm = _traced(module, entered)
    hooked = [one for one in module.modules() if id(one) in entered or one is module]
    reason = Reason.UNTRACEABLE if gm is None else None
    if any(one._forward_hooks or one._forward_pre_hooks for one in hooked):
        reason = Reason.HOOK
    if gm is None or reason is not None:
        report.declined.append(LeftRegion(path, (), (reason or Reason.UNTRACEABLE).value))
        return None
    reading = FxSteps(gm)
    nodes = {node.name: node for node in gm.graph.nodes}
    exact = []
    for region in find_regions(reading.steps, merge, fits_torch).regions:
        error, sizes = region_error(reading, [nodes[step.name] for step in region.steps], nodes[region.entry], region)
        if error <= REGION_TOLERANCE:
            exact.append((region, error, sizes))
        else:
            report.declined.append(_left(path, DeclinedRegion(region.steps, region.entry, Reason.NOT_EQUAL)))
    for region, error, sizes in exact:
        name = _free_name(gm)
        gm.add_module(name, layer_of(region.conv))
        inside, entry = [nodes[step.name] for step in region.steps], nodes[region.entry]
        nodes[region.output] = _replace(gm, inside, entry, name)  # the next region may begin there
        report.merged.append(_described(f"{path}.{name}".lstrip("."), region, error, sizes))
    if not exact:
        return None
    gm.graph.lint()
    result = InferenceModule(gm, gm.graph, type(module).__name__)
    for one in result.modules():
        one.training = False
    return result


def _replace(gm: fx.GraphModule, nodes: Sequence[fx.Node], entry: fx.Node, name: str) -> fx.Node:
    with gm.graph.inserting_after(nodes[-1]):
        merged = gm.graph.call_module(name, (entry,))
    nodes[-1].replace_all_uses_with(merged)
    constants = [one for node in nodes for one in node.all_input_nodes]
    for node in reversed(nodes):
        gm.graph.erase_node(node)
    for node in reversed(list(gm.graph.nodes)):
        if node in constants and not node.users and node is not entry:
            constants += node.all_input_nodes
            gm.graph.erase_node(node)
    return merged


def _free_name(module: nn.Module) -> str:
    names, number = ("merged", *(f"merged_{index}" for index in range(1, 10_000))), 0
    while hasattr(module, names[number]):
        number += 1
    return names[number]


def _described(name: str, region: LinearRegion, error: float, sizes: tuple[tuple[int, ...], ...]) -> MergedRegion:
    conv = region.conv
    return MergedRegion(
        name=name,
        nodes=tuple(step.name for step in region.steps),
        convolutions=region.count("convolution"),
        batch_norms=region.count("batch norm"),
        kernel=conv.kernel.shape,
        groups=conv.groups,
        macs_before=region.macs,
        macs=shown_macs(conv),
        parameters_before=region.parameters,
        parameters=conv.parameters,
        error=error,
        sizes=sizes,
    )


def _left(path: str, region: DeclinedRegion | LinearRegion) -> LeftRegion:
    reason = region.reason if isinstance(region, DeclinedRegion) else Reason.NOT_EQUAL
    return LeftRegion(path, tuple(step.name for step in region.steps), reason.value)
