"""The lever: how much of a gradient step on the kernel D adds to what W alone would do.

One SGD step with the rate lr for W and m lr for D moves the kernel k = W D^' by

    -lr (dL/dW D^' + m W (dL/dD)') + O(lr^2),   at D = 0:   -lr (G + m W W' G),   G = dL/dk

with W (C_out/g, D_mul), D^ (K, D_mul) and G (C_out/g, K) of one input channel; a prime transposes. The lever is the
size of the second term, at m = 1, relative to the first, in Frobenius norms over the whole kernel.
docs/how_it_works.md derives it.
"""

from __future__ import annotations

from torch import Tensor, nn

from doconv_convert.errors import UsageError
from doconv_convert.nn.composition import compose_kernel
from doconv_convert.nn.factors import read_factors
from doconv_convert.nn.overlay import stored_kernels

Factors = tuple[Tensor, Tensor, Tensor | None]


def kernel_lever(factors: Factors, gradients: Factors, groups: int) -> float:
    """||W (dL/dD)'|| / ||dL/dW D^'|| of one kernel, in float64.

    Args:
        factors: W's first slots (C_out, C_in/g, *kernel_size), D (C_in, K, D_mul), and W's further slots (C_out,
            C_in/g, D_mul - K) or None.
        gradients: the loss's gradients with respect to them, in the same shapes.
        groups: g.

    Returns:
        0 where W gets no gradient.
    """
    w, d, extra = (None if one is None else one.detach().double() for one in factors)
    w_step, d_step, extra_step = (None if one is None else one.detach().double() for one in gradients)
    if w is None or d is None or w_step is None or d_step is None:
        raise ValueError("W and D are not optional.")
    by_w = compose_kernel(w_step, d, extra_step, groups)
    by_d = compose_kernel(w, d_step, extra, groups) - w  # the identity is not in dL/dD
    size = float(by_w.norm())
    return float(by_d.norm()) / size if size else 0.0


def lever(model: nn.Module) -> dict[str, float]:
    """Every layer's lever, after a backward: how much D adds to an SGD step, relative to W's own part.

    Call it between `loss.backward()` and `optimizer.zero_grad()`, to log it. With a learning rate of its own for D, m
    times W's (`param_groups`, `d_lr`), D's part is m times the lever. A value of 0.01 at m = 1 says that DO-Conv
    changes this step by one percent.

    Args:
        model: a converted model whose parameters have gradients.

    Returns:
        {layer: lever}, by the layer's name (of a kernel that is not called `weight`, with its own name behind it).

    Raises:
        UsageError: the model has no converted layer, or none with gradients.

    >>> import torch
    >>> from doconv_convert import to_doconv
    >>> _ = torch.manual_seed(0)
    >>> model = to_doconv(nn.Sequential(nn.Conv2d(3, 8, 3)))
    >>> model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    >>> {name: round(value, 2) for name, value in lever(model).items()}
    {'0': 0.2}
    """
    levers: dict[str, float] = {}
    converted = False
    for path, module in model.named_modules():
        for kernel in stored_kernels(module):
            converted = True
            w, d, extra = read_factors(module, kernel)
            if w.grad is None or d.grad is None:
                continue
            name = path if kernel.name == "weight" else f"{path}.{kernel.name}".lstrip(".")
            gradients = w.grad, d.grad, None if extra is None else extra.grad
            levers[name] = kernel_lever((w, d, extra), gradients, kernel.groups)
    if not levers:
        why = "has no gradients; call it after loss.backward()" if converted else "has no DO-Conv layer with a D"
        raise UsageError(f"lever: '{type(model).__name__}' {why}.")
    return levers
