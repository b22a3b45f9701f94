"""An fx graph in eval mode, read as steps: what each node does to its input, as far as it is affine."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from doconv_convert.rewrite.fx_graph import attribute
from doconv_convert.rewrite.linear.operations import Combination, by_constant
from doconv_convert.rewrite.linear.reasons import Declined, Reason
from doconv_convert.rewrite.linear.steps import PASSES_ON, Kind, Operation, Step
from doconv_convert.rewrite.linear.torch_operations import (
    array,
    convolution,
    module_operation,
    norm,
    pool,
    zero_pad,
)

_CONV_CALLS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_CALLS: dict[Any, int] = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
_TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_POOL_CALLS: dict[Any, int] = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
_POOL_ARGUMENTS = (
    "input",
    "kernel_size",
    "stride",
    "padding",
    "ceil_mode",
    "count_include_pad",
    "divisor_override",
)
_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_DROPOUT_CALLS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_SAME = (torch.clone, torch.Tensor.contiguous)
_SUMS: dict[Any, float] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), 1.0),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), -1.0),
}
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)
# What may stand between a Parameter and its use: layouts and arithmetic, which draw nothing.
_CONSTANT_METHODS = ("view", "reshape", "unsqueeze", "squeeze", "expand", "flatten", "contiguous", "detach", "permute")
_CONSTANT_CALLS = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.getitem, operator.pow),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.reshape, torch.unsqueeze, torch.exp, torch.sqrt, torch.rsqrt),
)


_Read = tuple[Operation, Kind, Sequence[Any], tuple[tuple[str, int], ...]] | None


def run_node(gm: fx.GraphModule, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What a call node computes of the values of its inputs."""
    args: Any = fx.map_arg(node.args, values.__getitem__)
    kwargs: Any = fx.map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_module":
        return copy.deepcopy(gm.get_submodule(str(node.target))).to("cpu", torch.float64).eval()(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    call: Any = node.target
    return call(*args, **kwargs)


class FxSteps:
    """`steps`, every node of the graph under its name, in order, and the values of those that are `constants`: of
    parameters, buffers and what the graph makes of them alone, in float64 on the CPU."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.constants: dict[fx.Node, Any] = {}
        self.steps: list[Step] = []
        for node in gm.graph.nodes:
            self._read_constant(node)
            self.steps.append(self._step(node))

    def _step(self, node: fx.Node) -> Step:
        inputs = tuple(one.name for one in node.all_input_nodes if one not in self.constants)
        if node in self.constants:
            return Step(node.name, ())
        writes = _written(self.gm, node)
        try:
            read = self._read(node)
        except Declined as declined:
            # the first is the data; the rest, a kernel made of it, leads elsewhere
            return Step(node.name, inputs[:1], refused=declined.reason, writes=writes)
        if read is None:
            return Step(node.name, inputs, writes=writes)
        operation, kind, data, parameters = read
        return Step(node.name, tuple(one.name for one in data), operation, kind, parameters, writes=writes)

    def _read_constant(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            value = attribute(self.gm, str(node.target))
            if isinstance(value, Tensor) and not value.is_meta and not value.is_complex():
                value = value.detach().cpu()
                self.constants[node] = value.double() if value.is_floating_point() else value
            return
        is_method = node.op == "call_method" and node.target in _CONSTANT_METHODS
        if not is_method and not (node.op == "call_function" and node.target in _CONSTANT_CALLS):
            return
        if not node.all_input_nodes or not all(one in self.constants for one in node.all_input_nodes):
            return
        with torch.no_grad():
            try:
                self.constants[node] = run_node(self.gm, node, self.constants)
            except (TypeError, ValueError, RuntimeError, IndexError):  # what the forward itself would raise, too
                return

    def _read(self, node: fx.Node) -> _Read:
        """The operation, what it is, the values it reads and its parameters. Raises Declined."""
        if node.op == "call_module":
            return self._read_module(node)
        if node.op not in ("call_function", "call_method"):
            return None
        target = node.target
        if target in _CONV_CALLS or target in _TRANSPOSED_CALLS:
            return self._read_conv_call(node)
        if target is F.batch_norm:
            return self._read_norm_call(node)
        if target in _SUMS or target in _PRODUCTS or target in _QUOTIENTS or target in (operator.neg, torch.neg):
            return self._read_arithmetic(node)
        data = node.args[:1]
        if not (data and isinstance(data[0], fx.Node)):
            return None
        value: list[fx.Node] = [data[0]]
        if target in (*_SAME, "clone", "contiguous") or (target in _DROPOUT_CALLS and not _training(node)):
            return PASSES_ON, "other", value, ()
        if target in _POOL_CALLS:
            mean = pool(_named(node, _POOL_ARGUMENTS), _POOL_CALLS[target])
            return None if mean is None else (mean, "other", value, ())
        if target is F.pad:
            given = _named(node, ("input", "pad", "mode", "value"))
            pads = zero_pad(given["pad"], given.get("mode", "constant"), given.get("value"))
            return None if pads is None else (pads, "other", value, ())
        return None

    def _read_module(self, node: fx.Node) -> _Read:
        module = self.gm.get_submodule(str(node.target))
        data = node.args[:1]
        if len(node.args) + len(node.kwargs) != 1 or not data or not isinstance(data[0], fx.Node):
            return None
        operation, kind = module_operation(module)
        if operation is None:
            return None
        if _has_hooks(module):
            raise Declined(Reason.HOOK)
        return operation, kind, [data[0]], tuple((str(id(p)), p.numel()) for p in module.parameters())

    def _read_conv_call(self, node: fx.Node) -> _Read:
        transposed = node.target in _TRANSPOSED_CALLS
        given = _named(node, _TRANSPOSED_ARGUMENTS if transposed else _CONV_ARGUMENTS)
        kernel, bias = given.get("weight"), given.get("bias")
        if not isinstance(given.get("input"), fx.Node):
            return None
        values = [None if one is None else self.constants.get(one) for one in (kernel, bias)]
        if values[0] is None or (bias is not None and values[1] is None):
            raise Declined(Reason.INPUT_DEPENDENT)
        if any(isinstance(one, fx.Node) for name, one in given.items() if name not in ("input", "weight", "bias")):
            raise Declined(Reason.INPUT_DEPENDENT)  # a stride or groups that the forward computes
        rank = (_TRANSPOSED_CALLS if transposed else _CONV_CALLS)[node.target]
        operation = convolution(values[0], values[1], given, rank, transposed)
        return operation, "convolution", [given["input"]], _sizes((kernel, bias), values)

    def _read_norm_call(self, node: fx.Node) -> _Read:
        given = _named(node, _NORM_ARGUMENTS)
        if given.get("training", False):
            raise Declined(Reason.BATCH_STATISTICS)
        tensors = [given.get(name) for name in _NORM_ARGUMENTS[1:5]]
        values = [None if one is None else self.constants.get(one) for one in tensors]
        if any(one is not None and value is None for one, value in zip(tensors, values, strict=True)):
            return None
        if values[0] is None or values[1] is None:
            raise Declined(Reason.BATCH_STATISTICS)
        scale = norm(values[0], values[1], values[2], values[3], epsilon=given.get("eps", 1e-5))
        return scale, "batch norm", [given["input"]], _sizes(tensors[2:], values[2:])

    def _read_arithmetic(self, node: fx.Node) -> _Read:
        target, kwargs = node.target, dict(node.kwargs)
        operands: list[Any] = [*node.args, *(kwargs.pop(name) for name in ("input", "other") if name in kwargs)]
        if len(operands) == 1 and not kwargs:
            return Combination((-1.0,)), "other", [operands[0]], ()
        alpha = kwargs.pop("alpha", 1)
        if len(operands) != 2 or kwargs or not isinstance(alpha, int | float):
            return None
        data = [one for one in operands if isinstance(one, fx.Node) and one not in self.constants]
        constants = [self.constants.get(one, one) for one in operands if one not in data]
        if target in _SUMS:
            factors = (1.0, _SUMS[target] * alpha)
            if len(data) == 2:
                return Combination(factors), "other", data, ()
            first = operands[0] is data[0]
            own, other = factors if first else factors[::-1]
            return self._with_constant(data[0], constants[0], lambda c: (own, other * c))
        if len(data) != 1:
            return None
        if target in _PRODUCTS:
            return self._with_constant(data[0], constants[0], lambda c: (c, 0.0))
        if operands[0] is data[0]:
            return self._with_constant(data[0], constants[0], lambda c: (1.0 / c, 0.0))
        return None

    def _with_constant(self, data: fx.Node, constant: Any, factors: Callable[[Any], tuple[Any, Any]]) -> _Read:
        if isinstance(constant, bool) or not isinstance(constant, int | float | Tensor):
            return None
        if isinstance(constant, Tensor) and not constant.is_floating_point():
            return None
        values = array(constant) if isinstance(constant, Tensor) else float(constant)
        operation = by_constant(values, factors)
        return None if operation is None else (operation, "other", [data], ())


def _sizes(nodes: Sequence[Any], values: Sequence[Any]) -> tuple[tuple[str, int], ...]:
    known = [(node, value) for node, value in zip(nodes, values, strict=True) if value is not None]
    return tuple((str(node.target if node.op == "get_attr" else node), value.numel()) for node, value in known)


def _written(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """The value that a node overwrites."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(first, fx.Node):
        return None
    if node.op == "call_module":
        writes = bool(getattr(gm.get_submodule(str(node.target)), "inplace", False))
    elif node.op == "call_method":
        writes = str(node.target).endswith("_")
    else:
        asked = node.kwargs.get("inplace", False) or any(one is True for one in node.args[1:])  # F.relu(x, True)
        writes = node.target in _IN_PLACE or bool(asked) or getattr(node.target, "__name__", "").endswith("_")
    return first.name if writes else None


def _training(node: fx.Node) -> bool:
    return bool(_named(node, ("input", "p", "training", "inplace")).get("training", True))


def _named(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
