"""Which parameters a forward writes: seen in a graph, or while it runs (and undone, where it is only looked at)."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from doconv_convert.rewrite.fx_graph import parameter_read

_OPERATORS = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow),
    *(operator.setitem, setattr),
)
_SPECIAL_METHODS = frozenset(f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "imod", "ipow"))
_NO_VALUES = frozenset(("requires_grad_", "detach_", "share_memory_"))
# What gives another name to the same memory.
_VIEWS = frozenset(
    (
        *("view", "reshape", "flatten", "squeeze", "unsqueeze", "t", "transpose", "permute", "detach", "narrow"),
        *("select", "expand", "view_as", "unbind", "chunk", "split", "diagonal", "contiguous", "cpu", "to", "float"),
        *("data", "T"),
    )
)


class Writes(TorchFunctionMode):
    """Notes every parameter and buffer of `model` that is written inside (`written`, by id) and gives it back its
    values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        held = (*model.parameters(), *model.buffers())  # a trace counts the batches of norms that it enters
        self._tensors = {_memory(t): t for t in held if not t.is_meta and _memory(t)}
        self._saved: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def written(self) -> set[int]:
        return set(self._saved)

    def note(self, func: Any, args: Any, kwargs: Any) -> None:
        """To be called before `func` is."""
        target = kwargs.get("out")
        if target is None and args and _writes(func):
            target = args[0]
        for tensor in target if isinstance(target, (list, tuple)) else (target,):
            parameter = self._tensors.get(_memory(tensor)) if isinstance(tensor, Tensor) else None
            if parameter is not None and id(parameter) not in self._saved:
                values = parameter.data
                self._saved[id(parameter)] = parameter, values, values.clone()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.note(func, args, kwargs)
        return func(*args, **kwargs)

    def undo(self) -> None:
        for parameter, values, before in self._saved.values():
            parameter.data = values
            values.copy_(before)


def graph_writes(gm: fx.GraphModule) -> list[nn.Parameter]:
    """The parameters that a graph writes in place, also through views and `.data`."""
    found = []
    for node in gm.graph.nodes:
        parameter = _written_by(gm, node)
        if parameter is not None:
            found.append(parameter)
    return found


def is_view_of_parameter(node: fx.Node) -> bool:
    """Whether a node is a Parameter's read, or a view of one, before there is a GraphModule to look it up in."""
    return _viewed(node).op == "get_attr"


def _written_by(gm: fx.GraphModule, node: fx.Node) -> nn.Parameter | None:
    if node.op == "call_method":
        name = str(node.target)
        writes = name.endswith("_") and not name.endswith("__") and name not in _NO_VALUES
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        writes = node.target in _OPERATORS or (name.endswith("_") and not name.endswith("__"))
    else:
        return None
    target = node.kwargs.get("out") or (node.args[0] if writes and node.args else None)
    return parameter_read(gm, _viewed(target)) if isinstance(target, fx.Node) else None


def _viewed(node: fx.Node) -> fx.Node:
    """The node whose memory a view is, through in-place operations, which return their first argument."""
    while node.args and isinstance(node.args[0], fx.Node):
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        is_attribute = node.target is getattr and node.args[1] in _VIEWS
        same = name in _VIEWS or node.target in (operator.getitem, *_OPERATORS) or name.endswith("_") or is_attribute
        if node.op not in ("call_method", "call_function") or not same:
            break
        node = node.args[0]
    return node


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__set__":
        return bool(func == Tensor.data.__set__)  # type: ignore[attr-defined]
    in_place = name.endswith("_") and not name.endswith("__")
    return name in _SPECIAL_METHODS or (in_place and name not in _NO_VALUES)


def _memory(tensor: Tensor) -> int:
    """Where its storage lies; 0 where it has none to speak of."""
    try:
        return tensor.untyped_storage().data_ptr() if torch._C._has_storage(tensor) else 0
    except (RuntimeError, ValueError):  # fake, sparse, or not initialized
        return 0
