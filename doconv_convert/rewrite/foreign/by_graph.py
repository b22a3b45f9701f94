"""Folding other people's layers, by graph: a layer whose kernel is a pure function of its own parameters.

The layer is traced alone: by symbols, else by torch.export with free sizes. If it does nothing to its input but
(at most) pad it by constant amounts and convolve it, and neither kernel nor bias depends on the input or on
chance, both are evaluated in float64, the layer's own forward is held against the convolution to 1e-12, and it
takes its place. No key names are guessed.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from doconv_convert.nn.layers import DOCONV_CLASSES
from doconv_convert.nn.overlay import is_over_parameterized
from doconv_convert.rewrite.convert import copy_model
from doconv_convert.rewrite.fold_kernels import FOLD_TOLERANCE
from doconv_convert.rewrite.foreign.torch_export import NotExported, exported, sample_input
from doconv_convert.rewrite.fx_graph import ancestors, attribute, functional_calls, kernel_origin
from doconv_convert.rewrite.sites import Reason
from doconv_convert.rewrite.tracing import trace, undisturbed

logger = logging.getLogger(__name__)

_PLAIN = {plain.__name__[-2]: plain for plain in DOCONV_CLASSES}
_PAD_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
_PAD_CALLS = (F.pad, torch.ops.aten.pad.default)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_GENERAL_CALLS = (torch.convolution, torch.ops.aten.convolution.default)
_GENERAL_ARGUMENTS = (*_ARGUMENTS[:-1], "transposed", "output_padding", "groups")


@dataclass(frozen=True)
class Foreign:
    """One foreign layer: either the plain convolution it amounts to, or why it was left."""

    name: str
    cls: str
    conv: nn.Module | None
    declined: str | None


def find_foreign(model: nn.Module, constant_kernels: bool) -> list[Foreign]:
    """Every layer whose convolution kernel its own class computes, folded or declined with the reason.

    Conv subclasses and parametrized kernels (weight norm, weight standardization) only with `constant_kernels`.
    """
    found = []
    for path, module in model.named_modules():
        if _is_candidate(module, constant_kernels):
            foreign = _inspect(path, module)
            if foreign is not None:
                outcome = "folded by its graph" if foreign.declined is None else f"not folded: {foreign.declined}"
                logger.info("'%s' (%s) computes its kernel; it is %s", foreign.name, foreign.cls, outcome)
                found.append(foreign)
    return found


def replace_foreign(model: nn.Module, foreign: list[Foreign]) -> None:
    """Put each plain convolution where its foreign layer stands, under every name it has."""
    by_identity = {id(model.get_submodule(one.name)): one.conv for one in foreign if one.conv is not None}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in by_identity:
                parent._modules[name] = by_identity[id(child)]


def _is_candidate(module: nn.Module, constant_kernels: bool) -> bool:
    if is_over_parameterized(module) or isinstance(module, fx.GraphModule) or type(module) in DOCONV_CLASSES:
        return False
    if isinstance(module, _ConvNd) or parametrize.is_parametrized(module):
        return constant_kernels and not getattr(module, "transposed", False)
    if type(module).__module__.startswith("torch."):
        return False
    # One number a channel, in a module of modules, is a scale, as ConvNeXt's blocks have one; alone, it may be the
    # kernel of a depthwise 1x1 layer.
    alone = not any(module.children())
    return any(p is not None and p.dim() >= 2 and (alone or p.numel() > len(p)) for p in module._parameters.values())


def _inspect(path: str, module: nn.Module) -> Foreign | None:
    """None where the layer has no computed kernel at all."""
    cls = type(module).__name__
    gm = trace(module, training=False)
    if gm is None and not path and any(module.children()):
        return None
    try:
        if gm is None:
            raise _Declined("its forward cannot be traced", by_shape=True)
        conv = _read(gm, module)
    except _Declined as reason:
        if not reason.by_shape:
            return Foreign(path, cls, None, str(reason))
        try:
            conv = _second_try(module, reason)
        except _Declined as again:
            return Foreign(path, cls, None, str(again))
    return None if conv is None else Foreign(path, cls, conv, None)


class _Declined(Exception):
    """Why a traced layer is not a plain convolution; `by_shape` where knowing the input's shape may help."""

    def __init__(self, reason: str, *, by_shape: bool = False) -> None:
        super().__init__(reason)
        self.by_shape = by_shape


def _second_try(module: nn.Module, first: _Declined) -> nn.Module | None:
    """By torch.export, for which the number of channels is a constant, and height and width are not."""
    logger.debug("%s: %s; torch.export is tried", type(module).__name__, first)
    exact = copy_model(module).to("cpu", torch.float64).eval()
    sample = sample_input(exact)
    if sample is None:
        raise first
    if not sample.computes_kernel:
        return None
    try:
        gm = exported(exact, sample)
    except NotExported as reason:
        raise _Declined(str(reason)) from reason
    return _read(gm, module)


def _read(gm: fx.GraphModule, module: nn.Module) -> nn.Module | None:
    """The plain convolution that a layer's graph amounts to; None where it computes no kernel. Raises _Declined."""
    calls = list(functional_calls(gm.graph))
    computed = [c for c in calls if kernel_origin(gm, c.kernel) in (Reason.COMPUTED, Reason.INPUT_DEPENDENT)]
    if not computed:
        return None
    _require_one_call(gm, [c.node for c in calls])
    return _as_convolution(gm, computed[0].node, module)


def _require_one_call(gm: fx.GraphModule, calls: list[fx.Node]) -> None:
    if len(calls) != 1:
        raise _Declined(f"it makes {len(calls)} convolution calls, expected 1")
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        raise _Declined(f"it reads {len(inputs)} inputs, expected 1")
    output = next(node for node in gm.graph.nodes if node.op == "output")
    if output.args[0] not in (calls[0], (calls[0],)):
        raise _Declined("it does more than convolve: its output is not the convolution's")


def _as_convolution(gm: fx.GraphModule, call: fx.Node, module: nn.Module) -> nn.Module:
    names = _GENERAL_ARGUMENTS if call.target in _GENERAL_CALLS else _ARGUMENTS
    arguments: dict[str, Any] = dict(zip(names, call.args, strict=False)) | call.kwargs
    source, weight, bias = arguments["input"], arguments["weight"], arguments.get("bias")
    for value, what in ((weight, "kernel"), (bias, "bias")):
        if isinstance(value, fx.Node) and any(n.op == "placeholder" for n in ancestors(value)):
            raise _Declined(f"its {what} depends on the input")
    constants = {k: v for k, v in arguments.items() if k not in ("input", "weight", "bias")}
    if any(isinstance(value, fx.Node) for value in torch.utils._pytree.tree_leaves(constants)):
        raise _Declined("its stride, padding, dilation or groups are computed", by_shape=True)
    if constants.get("transposed"):
        raise _Declined("it is a transposed convolution")
    pad, mode, source = _leading_pad(source)
    if not (isinstance(source, fx.Node) and source.op == "placeholder"):
        raise _Declined(
            "it does more than pad its input before the convolution",
            by_shape=isinstance(source, fx.Node) and source.op == "call_module",
        )
    kernel, offset = _evaluate(gm, weight), None if bias is None else _evaluate(gm, bias)
    if not torch.isfinite(kernel).all():
        raise _Declined("its kernel is not finite")
    spatial = kernel.dim() - 2
    padding = _merge_padding(constants.get("padding", 0), pad, mode, spatial)
    groups = int(constants.get("groups", 1))
    reference = next(p for p in module.parameters())
    plain: Any = _PLAIN[str(spatial)]
    conv = plain(
        kernel.shape[1] * groups,
        kernel.shape[0],
        tuple(kernel.shape[2:]),
        constants.get("stride", 1),
        padding,
        constants.get("dilation", 1),
        groups,
        offset is not None,
        _PAD_MODES[mode] if pad else "zeros",
        device="meta",
    )
    conv.weight, conv.bias = nn.Parameter(kernel), None if offset is None else nn.Parameter(offset)
    _require_same_function(module, conv)
    conv.weight = _parameter(kernel, reference)
    if offset is not None:
        conv.bias = _parameter(offset, reference)
    return conv.train(module.training)  # type: ignore[no-any-return]


def _require_same_function(module: nn.Module, conv: Any) -> None:
    """Raises _Declined where the layer itself, in float64, is not the convolution with the uncast kernel."""
    exact = copy_model(module).to("cpu", torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    for more in (5, 8):
        covered = [(k - 1) * d for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        size = [extent + more + axis for axis, extent in enumerate(covered)]
        x = torch.randn(2, conv.in_channels, *size, generator=generator, dtype=torch.float64)
        with undisturbed(exact), torch.no_grad():
            try:
                expected, got = exact(x), conv(x)
            except Exception as error:  # the user's forward
                raise _Declined(f"it does not run alone in float64, to be compared ({type(error).__name__})") from error
        if not isinstance(expected, Tensor) or expected.shape != got.shape:
            raise _Declined("its output's shape is not the convolution's")
        if not float((got - expected).norm()) <= FOLD_TOLERANCE * max(float(expected.norm()), float(got.norm())):
            raise _Declined("its output is not the convolution's")


def _parameter(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.to(like.device, like.dtype).contiguous(), requires_grad=like.requires_grad)


def _leading_pad(source: Any) -> tuple[list[int], str, Any]:
    """(pad, mode, what is padded) of an F.pad call, or ([], "constant", source)."""
    if not (isinstance(source, fx.Node) and source.op == "call_function" and source.target in _PAD_CALLS):
        return [], "constant", source
    arguments: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), source.args, strict=False)) | source.kwargs
    pad, mode, value = arguments["pad"], arguments.get("mode", "constant"), arguments.get("value")
    if any(isinstance(amount, fx.Node) for amount in (pad if isinstance(pad, (list, tuple)) else [pad])):
        raise _Declined("its pads are computed from the input's size")
    if value or mode not in _PAD_MODES:
        raise _Declined(f"it pads with {value or mode}")
    return list(pad), mode, arguments["input"]


def _merge_padding(own: Any, pad: list[int], mode: str, spatial: int) -> Any:
    """The one `padding` argument that says the same as F.pad with `pad` followed by the call's own."""
    if not pad:
        return own
    pad = pad + [0] * (2 * spatial - len(pad))
    before, after = pad[::2][::-1], pad[1::2][::-1]
    if before != after:
        raise _Declined(f"its pads differ on the two sides ({pad}), which a plain convolution cannot say")
    inner = [own] * spatial if isinstance(own, int) else list(own)
    if isinstance(own, str) or (mode != "constant" and any(inner)):
        raise _Declined("it pads twice, in two ways")
    return tuple(a + b for a, b in zip(before, inner, strict=True))


def _evaluate(gm: fx.GraphModule, node: Any) -> Tensor:
    """A kernel's or bias's value, computed in float64 on the CPU by running its part of the graph."""
    values: dict[fx.Node, Any] = {}
    needed = ancestors(node, metadata=True)

    def exact(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().to("cpu")
            return value.double() if value.is_floating_point() else value
        return value

    with torch.no_grad(), _NoChance():  # type: ignore[no-untyped-call]
        for step in gm.graph.nodes:
            if step not in needed:
                continue
            args, kwargs = (fx.map_arg(a, lambda n: values[n]) for a in (step.args, step.kwargs))
            if step.op == "get_attr":
                values[step] = exact(attribute(gm, str(step.target)))
            elif step.op == "call_function":
                values[step] = step.target(*args, **kwargs)
            elif step.op == "call_method":
                values[step] = getattr(args[0], str(step.target))(*args[1:], **kwargs)
            elif step.op == "call_module":
                inner = copy.deepcopy(gm.get_submodule(str(step.target)))
                values[step] = inner.to("cpu", torch.float64).eval()(*args, **kwargs)
            else:
                raise _Declined(
                    f"its kernel needs '{step.name}', which is no parameter, buffer or constant", by_shape=True
                )
    result: Tensor = values[node]
    return result.double()


class _NoChance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Declines a kernel as soon as a random operator takes part in it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _Declined("its kernel is drawn at random")
        return func(*args, **(kwargs or {}))
