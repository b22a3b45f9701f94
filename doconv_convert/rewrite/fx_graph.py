"""Reading an fx graph: its convolution calls, and where each call's kernel comes from."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from doconv_convert.nn.composition import compose_kernel
from doconv_convert.nn.kernel_view import KernelView, source_parameter
from doconv_convert.rewrite.sites import Reason

_aten = torch.ops.aten
_TRANSPOSED_CALLS = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
# call -> position of its `groups` argument
_GROUPS_POSITION: dict[Any, int] = {
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), 6),
    **dict.fromkeys(
        [getattr(getattr(_aten, f"conv{n}d"), overload) for n in (1, 2, 3) for overload in ("default", "padding")],
        6,
    ),
    torch.convolution: 8,
    _aten.convolution.default: 8,
}
_METADATA_METHODS = (
    "size",
    "dim",
    "numel",
    "ndimension",
    "stride",
    "is_floating_point",
    "is_complex",
    "element_size",
)
_METADATA_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout")


@dataclass(frozen=True)
class Call:
    """One functional convolution in a graph or in a forward: its kernel's source and group count."""

    node: fx.Node
    kernel: Any
    groups: int | None
    transposed: bool


def convolution_call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int | None, bool] | None:
    """(kernel, groups, transposed) of a call of any of torch's convolution functions, else None. `groups` is None
    where a graph computes it."""
    if target in _TRANSPOSED_CALLS:
        position, transposed = 6, True
    elif target in _GROUPS_POSITION:
        position = _GROUPS_POSITION[target]
        transposed = position == 8 and bool(args[6] if len(args) > 6 else kwargs.get("transposed", False))
    else:
        return None
    kernel = args[1] if len(args) > 1 else kwargs.get("weight")
    groups = args[position] if len(args) > position else kwargs.get("groups", 1)
    return kernel, groups if isinstance(groups, int) else None, transposed


def functional_calls(graph: fx.Graph) -> Iterator[Call]:
    """Every convolution that is called as a function."""
    for node in graph.nodes:
        if node.op == "call_function":
            found = convolution_call(node.target, node.args, node.kwargs)
            if found is not None and isinstance(found[0], fx.Node):
                yield Call(node, *found)


def has_unknown_groups(gm: fx.GraphModule) -> bool:
    """Whether some Parameter is convolved with a group count that only a real forward tells."""
    return any(
        call.groups is None and isinstance(kernel_origin(gm, call.kernel), nn.Parameter)
        for call in functional_calls(gm.graph)
    )


def composition_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Every `compose_kernel` call: its input nodes are W's first slots, D and, where there is one, weight_extra."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target is compose_kernel]


def attribute(module: nn.Module, target: str) -> Any:
    """What a `get_attr` node reads."""
    return operator.attrgetter(target)(module)


def parameter_read(gm: fx.GraphModule, node: fx.Node) -> nn.Parameter | None:
    """The Parameter that a `get_attr` node reads, or None. Of an over-parameterized layer's kernel it is W."""
    value = attribute(gm, str(node.target)) if node.op == "get_attr" else None
    if isinstance(value, KernelView):
        return source_parameter(value)
    return value if isinstance(value, nn.Parameter) else None


def kernel_origin(gm: fx.GraphModule, kernel: fx.Node) -> nn.Parameter | Reason | None:
    """The Parameter that is the kernel, or why there is none; None where it is an over-parameterized one."""
    if kernel.op == "call_function" and kernel.target is compose_kernel:
        return None
    if kernel.op == "get_attr":
        parameter = parameter_read(gm, kernel)
        return Reason.BLUR_FILTER if parameter is None else parameter
    sources = ancestors(kernel)
    if any(node.op == "placeholder" for node in sources):
        return Reason.INPUT_DEPENDENT
    learned = any(node.op == "call_module" or parameter_read(gm, node) is not None for node in sources)
    return Reason.COMPUTED if learned else Reason.BLUR_FILTER


def kernel_parameter(gm: fx.GraphModule, kernel: fx.Node) -> nn.Parameter | None:
    """The Parameter that is the kernel, or W's first slots where the kernel is composed."""
    if kernel.op == "call_function" and kernel.target is compose_kernel and isinstance(kernel.args[0], fx.Node):
        return parameter_read(gm, kernel.args[0])
    return parameter_read(gm, kernel)


def spatial_sources(gm: fx.GraphModule, kernel: fx.Node) -> list[nn.Parameter]:
    """The Parameters a computed kernel is made of that have kernel positions themselves: not gains, not biases."""
    reads = (parameter_read(gm, node) for node in ancestors(kernel))
    return list({id(p): p for p in reads if p is not None and has_positions(p)}.values())


def has_positions(parameter: nn.Parameter) -> bool:
    return parameter.dim() > 2 and parameter.shape[2:].numel() > 1


def ancestors(node: fx.Node, *, metadata: bool = False) -> set[fx.Node]:
    """The nodes whose *values* reach `node` (itself too); reading a shape or a dtype carries no values, and counts
    with `metadata` only."""
    found: set[fx.Node] = set()
    open_nodes = [node]
    while open_nodes:
        current = open_nodes.pop()
        if current not in found and (metadata or not reads_metadata(current)):
            found.add(current)
            open_nodes.extend(current.all_input_nodes)
    return found


def reads_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _METADATA_ATTRIBUTES
    return node.op == "call_function" and str(node.target).startswith("aten.sym_size")
