"""Parameter groups for the optimizer: D apart from everything else."""

from __future__ import annotations

from typing import Any

from torch import nn

from doconv_convert.nn.overlay import stored_kernels


def param_groups(
    model: nn.Module, *, weight_decay: float = 0.0, d_weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Two groups for any torch optimizer: all other parameters with `weight_decay`, every D with `d_weight_decay`
    (default: the same). Weight decay pulls D^ = [I | 0] + D towards the identity, as in the paper.

    Call it on the converted model: an optimizer built before the conversion does not know D.

    >>> import torch
    >>> from doconv_convert import to_doconv
    >>> model = to_doconv(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)))
    >>> groups = param_groups(model, weight_decay=1e-4, d_weight_decay=0.0)
    >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
    [(2, 0.0001), (1, 0.0)]
    """
    depthwise = {
        id(module._parameters[kernel.d_name]) for module in model.modules() for kernel in stored_kernels(module)
    }
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in depthwise], "weight_decay": weight_decay},
        {
            "params": [p for p in parameters if id(p) in depthwise],
            "weight_decay": weight_decay if d_weight_decay is None else d_weight_decay,
        },
    ]
