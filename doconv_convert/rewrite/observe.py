"""One real forward, watched: which convolutions ran, how often, on what sizes, with which kernels.

A torch function mode sees every call of a convolution function, whatever module or control flow it stands
in, so this one way serves every model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from doconv_convert.nn.factors import read_factors
from doconv_convert.nn.overlay import stored_kernels
from doconv_convert.rewrite.fx_graph import composition_nodes, convolution_call, has_positions, parameter_read
from doconv_convert.rewrite.sites import Reason
from doconv_convert.rewrite.tracing import set_eval_mode, undisturbed
from doconv_convert.rewrite.writes import Writes


@dataclass
class Watched:
    """The calls of one kernel in one forward; `direct` are those with the Parameter itself and not with a kernel that
    is computed from it. `macs` counts multiply-accumulates over all calls."""

    groups: set[int] = field(default_factory=set)
    calls: int = 0
    direct: int = 0
    macs: int = 0
    batch: int | None = None
    output_size: tuple[int, ...] | None = None


class OddKernel(NamedTuple):
    """A call whose kernel is no Parameter; `parameter` is the id of the one kernel that it is computed from."""

    module: nn.Module
    reason: Reason
    parameter: int | None


@dataclass
class Forward:
    """What a forward did: per Parameter id (W's where the kernel is composed) and kernels of no Parameter; the ids of
    written Parameters; how often each module was entered, and the output."""

    by_parameter: dict[int, Watched] = field(default_factory=dict)
    odd_kernels: list[OddKernel] = field(default_factory=list)
    written: set[int] = field(default_factory=set)
    entered: Counter[nn.Module] = field(default_factory=Counter)
    output: Any = None


def run_model(model: nn.Module, example_inputs: Any) -> Any:
    """Call `model` on copies of its example inputs, which a forward may change in place: a tuple or list of positional
    arguments, a dict of keyword arguments, or one tensor."""
    inputs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example_inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def watch_forward(model: nn.Module, example_inputs: Any) -> Forward:
    """Run `model` once in eval mode without gradients and report its convolutions; nothing stays changed.

    A forward that runs, but not while it is watched (torch.cond compiles its branches, and no mode may stand by), gives
    an output and nothing else.
    """
    try:
        return _watched_forward(model, example_inputs)
    except Exception as error:
        if not type(error).__module__.startswith("torch._dynamo"):
            raise
        forward = Forward()
        with undisturbed(model), torch.no_grad():
            forward.output = run_model(set_eval_mode(model), example_inputs)  # the user's own error, where it has one
        return forward


def _watched_forward(model: nn.Module, example_inputs: Any) -> Forward:
    forward = Forward()
    stack: list[nn.Module] = []
    watcher = _Watcher(model, stack, forward, example_inputs)
    with undisturbed(model), torch.no_grad():
        try:
            with _module_stack(model, stack, forward), watcher:
                for module in model.modules():
                    module.training = False
                forward.output = run_model(model, example_inputs)
        finally:
            watcher.undo()
    forward.written = watcher.written
    return forward


def _factors(model: nn.Module) -> Iterator[tuple[Tensor | None, ...]]:
    """W's first slots, D and weight_extra of every over-parameterized kernel, in layers and in graphs."""
    for module in model.modules():
        for kernel in stored_kernels(module):
            yield read_factors(module, kernel)
        if isinstance(module, fx.GraphModule):
            for node in composition_nodes(module):
                yield tuple(parameter_read(module, read) for read in node.all_input_nodes)


@contextmanager
def _module_stack(model: nn.Module, stack: list[nn.Module], forward: Forward) -> Iterator[None]:
    def enter(module: nn.Module, args: Any) -> None:
        stack.append(module)
        forward.entered[module] += 1

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    handles = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watcher(Writes):
    def __init__(self, model: nn.Module, stack: list[nn.Module], forward: Forward, example_inputs: Any) -> None:
        super().__init__(model)
        self.stack, self.forward = stack, forward
        self.parameters = {id(p) for p in model.parameters()}
        self.buffers = {id(b) for b in model.buffers()}
        # Tensors whose values come from the inputs: what tells an input-dependent kernel from a computed one.
        self.from_input: Any = WeakIdKeyDictionary()
        # Every other tensor that is computed from parameters, with the ids of those that have kernel positions; D and
        # weight_extra count as the W that they compose a kernel with.
        self.sources: Any = WeakIdKeyDictionary()
        for leaf in tree_leaves(example_inputs):
            self._mark(self.from_input, leaf, True)
        for parameter in model.parameters():
            self._mark(self.sources, parameter, frozenset([id(parameter)] if has_positions(parameter) else []))
        for weight, *others in _factors(model):
            for factor in (weight, *others):
                self._mark(self.sources, factor, frozenset([id(weight)]))

    @staticmethod
    def _mark(marks: Any, value: Any, mark: Any) -> None:
        if isinstance(value, Tensor):
            marks[value] = mark

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.note(func, args, kwargs)
        result = func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sources = [self.sources[leaf] for leaf in leaves if leaf in self.sources]
        if any(leaf in self.from_input for leaf in leaves):
            for leaf in tree_leaves(result):
                self._mark(self.from_input, leaf, True)
        elif sources:
            for leaf in tree_leaves(result):
                self._mark(self.sources, leaf, frozenset().union(*sources))
        call = convolution_call(func, args, kwargs)
        kernel = call[0] if call is not None and not call[2] else None
        if call is not None and kernel is not None and isinstance(result, Tensor):
            self._record(kernel, call[1] or 1, result)
        return result

    def _record(self, kernel: Tensor, groups: int, output: Tensor) -> None:
        direct = id(kernel) in self.parameters
        source = id(kernel) if direct else self._source(kernel)
        if not direct:
            current = self.stack[-1]
            self.forward.odd_kernels.append(OddKernel(current, self._reason(kernel), source))
        if source is None:
            return
        watched = self.forward.by_parameter.setdefault(source, Watched())
        batched = output.dim() == kernel.dim()
        watched.direct += direct
        watched.groups.add(groups)
        watched.calls += 1
        watched.macs += output.numel() * kernel[0].numel()
        watched.batch = output.shape[0] if batched else 1
        watched.output_size = tuple(output.shape[2 if batched else 1 :])

    def _source(self, kernel: Tensor) -> int | None:
        """The one Parameter with kernel positions that a kernel is computed from."""
        sources = self.sources.get(kernel, ())
        return next(iter(sources)) if len(sources) == 1 and kernel not in self.from_input else None

    def _reason(self, kernel: Tensor) -> Reason:
        if kernel in self.from_input:
            return Reason.INPUT_DEPENDENT
        return Reason.BLUR_FILTER if id(kernel) in self.buffers else Reason.COMPUTED
