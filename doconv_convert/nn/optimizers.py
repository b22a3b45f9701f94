"""Optimizers of converted models: D in a group of its own, and a check that none of it was left out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx import GraphModule

from doconv_convert.errors import CheckFailedError, UsageError
from doconv_convert.nn.composition import compose_kernel
from doconv_convert.nn.overlay import stored_kernels
from doconv_convert.words import counted

_SHOWN = 8


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    d_weight_decay: float | None = None,
    lr: float | None = None,
    d_lr: float | str | None = None,
) -> list[dict[str, Any]]:
    """Two groups for any torch optimizer: all other parameters first, then every D.

    Call it on the converted model: an optimizer built before the conversion does not know D.

    Args:
        model: the converted model.
        weight_decay: of the first group, and of D unless `d_weight_decay` says otherwise. On D it pulls
            D^ = [I | 0] + D toward the identity, as in the paper.
        d_weight_decay: of D.
        lr: the learning rate of the first group, and of D unless `d_lr` says otherwise. Without it the groups carry
            none, and the optimizer's own holds.
        d_lr: the learning rate of D: a number, or a multiple of `lr` such as "10x".

    Raises:
        UsageError: a learning rate or a weight decay that is negative or not finite, a text that is no multiple, or a
            multiple without `lr`.

    >>> import torch
    >>> from doconv_convert import to_doconv
    >>> model = to_doconv(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)))
    >>> groups = param_groups(model, weight_decay=1e-4, d_weight_decay=0.0, lr=0.1, d_lr="10x")
    >>> [(len(group["params"]), group["weight_decay"], group["lr"]) for group in groups]
    [(2, 0.0001, 0.1), (1, 0.0, 1.0)]
    """
    rest = _settings("weight_decay", weight_decay, "lr", lr)
    own_decay = weight_decay if d_weight_decay is None else d_weight_decay
    own = _settings("d_weight_decay", own_decay, "d_lr", _d_lr(lr, d_lr))
    depthwise = {id(model_d) for model_d in _every_d(model)}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in depthwise], **rest},
        {"params": [p for p in parameters if id(p) in depthwise], **own},
    ]


def check_optimizer(model: nn.Module, optimizer: Any, *others: Any) -> None:
    """Check, before the long run, that every parameter of `model`'s converted layers is trained: W, D, weight_extra
    and bias, as far as they require gradients.

    Args:
        model: the converted model, as it is trained (DDP, FSDP2 and torch.compile around it are fine).
        optimizer: what steps: a torch optimizer or any wrapper that has its `param_groups`.
        others: further optimizers, where several share the model (Muon beside AdamW).

    Raises:
        UsageError: `model` has no converted layer, or an optimizer has no `param_groups`.
        DoconvError: parameters, by name, that no optimizer holds, be it that it was built before the conversion (it
            then holds the plain model's), or from some attributes of the layers only.

    >>> import torch
    >>> from doconv_convert import to_doconv
    >>> plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
    >>> early = torch.optim.SGD(plain.parameters(), lr=0.1)
    >>> model = to_doconv(plain, inplace=True)
    >>> check_optimizer(model, early)
    Traceback (most recent call last):
    ...
    doconv_convert.errors.CheckFailedError: The optimizer does not hold 1 of 3 trainable parameters of the converted \
layers: '0.D'. Build it after the conversion, from model.parameters() or param_groups(model).
    >>> check_optimizer(model, torch.optim.SGD(param_groups(model), lr=0.1))
    """
    converted = {id(p) for p in _converted_parameters(model)}
    if not converted:
        raise UsageError(
            f"check_optimizer: '{type(model).__name__}' has no DO-Conv layer; pass the model that to_doconv returned."
        )
    held = {id(p) for one in (optimizer, *others) for p in _held(one)}
    trainable = [(name, p) for name, p in model.named_parameters() if id(p) in converted and p.requires_grad]
    missing = [name for name, p in trainable if id(p) not in held]
    if not missing:
        return
    names = ", ".join(f"'{name}'" for name in missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    strangers = len(held - {id(p) for p in model.parameters()})
    before = (
        f" It holds {counted(strangers, 'other parameter')} that the model does not have, as an optimizer "
        "does that was built before the conversion."
    )
    raise CheckFailedError(
        f"The optimizer does not hold {len(missing)} of {len(trainable)} trainable parameters of the converted layers: "
        f"{names}{more}.{before if strangers else ''} Build it after the conversion, from model.parameters() or "
        "param_groups(model)."
    )


def _settings(decay_name: str, decay: float, lr_name: str, lr: float | None) -> dict[str, float]:
    settings = {"weight_decay": _checked(decay_name, decay)}
    return settings if lr is None else {**settings, "lr": _checked(lr_name, lr)}


def _d_lr(lr: float | None, d_lr: float | str | None) -> float | None:
    if d_lr is None:
        return lr
    if not isinstance(d_lr, str):
        return d_lr
    try:
        factor = float(d_lr.removesuffix("x")) if d_lr.endswith("x") else math.nan
    except ValueError:
        factor = math.nan
    if not 0 <= factor < math.inf:
        raise UsageError(f"d_lr: got '{d_lr}', expected a number, or a multiple of lr such as '10x'.")
    if lr is None:
        raise UsageError(f"d_lr: '{d_lr}' is a multiple of lr, and lr was not given; pass lr= to param_groups too.")
    return factor * lr


def _checked(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise UsageError(f"{name}: got {value}, expected a finite number that is not negative.")
    return value


def _held(optimizer: Any) -> Iterator[Any]:
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        raise UsageError(
            f"check_optimizer: got {type(optimizer).__name__}, expected an optimizer, or a wrapper with `param_groups`."
        )
    for group in groups:
        yield from group["params"]


def _every_d(model: nn.Module) -> Iterator[nn.Parameter | None]:
    for module in model.modules():
        for kernel in stored_kernels(module):
            yield module._parameters[kernel.d_name]
        for factors in _composed_in(module):
            yield from factors[1:2]


def _converted_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        # A 1x1 kernel has no D and no stored kernel; its layer is a converted one all the same.
        if hasattr(type(module), "stored_kernels") and not isinstance(module, GraphModule):
            yield from (p for p in module._parameters.values() if p is not None)
        for factors in _composed_in(module):
            yield from factors


def _composed_in(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """W, D and weight_extra of every functional kernel that a graph composes (`ToDOConvPass`)."""
    if not isinstance(module, GraphModule):
        return
    for node in module.graph.find_nodes(op="call_function", target=compose_kernel):
        reads = [read for read in node.all_input_nodes if read.op == "get_attr"]
        yield [module.get_parameter(str(read.target)) for read in reads]
