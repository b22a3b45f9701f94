"""Torch's part of the proof: the float64 truth, plain fp32 outputs, and every kernel's sensitivity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from doconv_convert.artifacts.recipe import recipe_sites
from doconv_convert.check.coverage import perturbation, sensitivity
from doconv_convert.check.exact import output_tensors, run_float64, run_inputs
from doconv_convert.check.outputs import bound_for, relative_error
from doconv_convert.check.proof import TorchSide
from doconv_convert.rewrite.discover import discover
from doconv_convert.rewrite.measure import run_model
from doconv_convert.rewrite.sites import site_name


def torch_side(trained: nn.Module, folded: nn.Module, inputs: Any, samples: int) -> TorchSide:
    """Run both models on the same inputs (a tuple of positional arguments), in eval mode on the CPU.

    `trained` is the unfolded model, `folded` the plain one. A half-precision model is judged in float32
    arithmetic on its own rounded weights, as it is exported; its truth takes the kernels as the fold rounded
    them, which the per-site check ties to the model's own.
    """
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in trained.parameters())
    narrow = tree_map(_to_float32, inputs)
    kernels = _float32_kernels(folded.eval(), trained)
    plain = output_tensors(run_inputs(folded, narrow))
    truth = run_float64(folded if half else trained, inputs)
    bounds = {
        index: bound_for(relative_error(p.detach().numpy(), t.numpy())) * float(t.norm())
        for index, (p, t) in enumerate(zip(plain, truth, strict=True))
        if p.is_floating_point() and p.shape == t.shape
    }

    def compared() -> list[Tensor]:
        outputs = output_tensors(run_model(folded, narrow))
        return [outputs[index] for index in bounds]

    reach = dict(sensitivity([plain[index] for index in bounds], list(bounds.values()), kernels).reach)
    for name, kernel in kernels.items():
        if not reach[name]:  # a gradient that is cut shows nothing about the kernel
            reach[name] = perturbation(compared, [plain[index] for index in bounds], list(bounds.values()), kernel)
    arrays = [leaf.numpy() for leaf in tree_leaves(narrow) if isinstance(leaf, Tensor)]
    return TorchSide(arrays, [t.numpy() for t in truth], [p.detach().numpy() for p in plain], samples, reach)


def _float32_kernels(folded: nn.Module, trained: nn.Module) -> Mapping[str, Tensor]:
    """The folded kernels, as leaves that take gradients; the folded model becomes float32 in place."""
    folded.float().requires_grad_(False)
    kernels: dict[str, Tensor] = {}
    sites = [(site.owner, site.kernel) for site in recipe_sites(trained)]
    if not sites:  # a plain model: all of its convolutions
        plain = [site for site in discover(folded).sites if site.parameter is not None]
        sites = [(site.owners[0].path, site.owners[0].kernel) for site in plain]
    for owner, name in sites:
        kernel = folded.get_submodule(owner)._parameters[name]
        if kernel is not None and not any(kernel is known for known in kernels.values()):
            kernels[site_name(owner, name)] = kernel.requires_grad_(True)
    return kernels


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
