"""Tracing without leaving marks: each maximal traceable region of a model as a GraphModule."""

from __future__ import annotations

import copy
import logging
import operator
import random
from collections import OrderedDict
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from doconv_convert.rewrite.fx_graph import has_unknown_groups
from doconv_convert.rewrite.writes import Writes, is_view_of_parameter

# In a traced graph's `meta`: the ids of parameters that were written for good while it was traced.
WRITTEN = "doconv_convert.written"

logger = logging.getLogger(__name__)


class SiteTracer(fx.Tracer):
    """Stops at convolution layers of any class, at GraphModules, which are regions of their own, and, where only some
    modules are to be `entered` (by their ids), at all others."""

    def __init__(self, entered: Set[int] | None = None) -> None:
        super().__init__()
        self.entered = entered

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.entered is not None and id(m) not in self.entered:
            return True
        return isinstance(m, (_ConvNd, fx.GraphModule)) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


class _Proxy(fx.Proxy):
    """Records writes into parameters that torch.fx loses (`weight.data = x`) or refuses (`weight[0] = x`)."""

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Set by fx itself while the proxy is made: `node`, `tracer`, ...
        if name == "data" and is_view_of_parameter(self.node):
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})
        else:
            object.__setattr__(self, name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        if not is_view_of_parameter(self.node):
            raise TypeError("'Proxy' object does not support item assignment")
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _Attribute(_Proxy, fx.proxy.Attribute):
    """What a proxy gives for an attribute: `weight.data`."""


@dataclass
class Region:
    """A module that could be traced, with one graph a mode (training, eval); or a GraphModule of the user's
    own (`is_own`), which is its own graph."""

    path: str
    graphs: list[fx.GraphModule]
    is_own: bool = False


@dataclass
class Regions:
    traced: list[Region] = field(default_factory=list)
    untraced: list[str] = field(default_factory=list)


def find_regions(model: nn.Module) -> Regions:
    """Trace `model` in training and in eval mode; enter child by child what cannot be traced in both.

    The model is left exactly as it was: what a forward writes on its modules while it is traced is undone.
    """
    regions = Regions()
    _enter(model, "", regions, visited=set())
    return regions


def _enter(module: nn.Module, path: str, regions: Regions, visited: set[int]) -> None:
    if id(module) in visited:
        return
    visited.add(id(module))
    if isinstance(module, fx.GraphModule):
        regions.traced.append(Region(path, [module], is_own=True))  # its children may be opaque modules: entered below
        if has_unknown_groups(module):
            regions.untraced.append(path)
    elif not _has_own_forward(module):
        pass
    else:
        graphs = [graph for training in (True, False) if (graph := trace(module, training)) is not None]
        if graphs:
            regions.traced.append(Region(path, graphs))
        if len(graphs) == 2:
            for name, child in module.named_modules():
                if isinstance(child, fx.GraphModule):
                    _enter(child, f"{path}.{name}".lstrip("."), regions, visited)
            return
        logger.info("'%s' cannot be traced whole: its children are traced one by one", path or type(module).__name__)
        regions.untraced.append(path)
    for name, child in module.named_children():
        _enter(child, f"{path}.{name}".lstrip("."), regions, visited)


def _has_own_forward(module: nn.Module) -> bool:
    """False for containers (a ModuleList) and for torch's own leaves: they call no functional convolution."""
    forward = getattr(type(module), "forward", None)
    if forward is None or forward is getattr(nn.Module, "forward", None) or isinstance(module, _ConvNd):
        return False
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.nn.")


def trace(module: nn.Module, training: bool, entered: Set[int] | None = None) -> fx.GraphModule | None:
    """One symbolic trace of `module` in the given mode (`entered` as `SiteTracer` has it), or None where fx cannot
    follow it."""
    if "forward" in module.__dict__:
        return None  # fx would follow the forward of the class instead
    tracer, writes = SiteTracer(entered), Writes(module)
    with undisturbed(module):
        for child in module.modules():
            child.training = training
        try:
            with writes:
                graph = tracer.trace(module)
            graph.lint()
            traced = fx.GraphModule(tracer.root, graph)
            traced.meta[WRITTEN] = writes.written
            return None if has_unknown_groups(traced) else traced
        except Exception as error:  # a user's forward may raise anything on a proxy; the caller enters the children
            mode = "training" if training else "eval"
            logger.debug("symbolic trace of %s in %s mode failed: %r", type(module).__name__, mode, error)
            return None
        finally:
            writes.undo()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Whatever a forward does to attributes, registered tensors, `training` flags, and random states
    is undone; what it writes into a buffer in place is not."""
    saved = [(module.__dict__, _copy_containers(module.__dict__)) for module in model.modules()]
    python_state, rng_state = random.getstate(), torch.random.get_rng_state()
    try:
        yield
    finally:
        for attributes, before in saved:
            for value, content in before.values():
                if content is not None:
                    # The same container object, since others may hold it.
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)
            attributes.clear()
            attributes.update({name: value for name, (value, _) in before.items()})
        random.setstate(python_state)
        torch.random.set_rng_state(rng_state)


def _copy_containers(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (value, copy.copy(value) if type(value) in (dict, list, set, OrderedDict) else None)
        for name, value in attributes.items()
    }


M = TypeVar("M", bound=nn.Module)


def set_eval_mode(model: M) -> M:
    """`model` itself with every module in eval mode."""
    for module in model.modules():
        module.training = False
    return model


@contextmanager
def float64_by_default() -> Iterator[None]:
    """What the user's forward makes without a dtype is float64 inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
