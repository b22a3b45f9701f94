"""How an over-parameterized kernel is stored in a module, and how it loads from a state dict.

A kernel named `weight` has the parameters `weight`, `D`, `weight_extra`; one named `p` has `p`, `p_D`,
`p_extra`. Everything here works on the module's own `_parameters`, so state dicts, optimizers and strict
loads need no hooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.nn.composition import draw_weight_extra

SLOTS_SUFFIX = "_first_slots"


@dataclass(frozen=True)
class StoredKernel:
    """One over-parameterized kernel of a module: its parameter's name and its group count."""

    name: str
    groups: int

    @property
    def slots_name(self) -> str:
        """Under which W's first K slots can be read where the attribute `name` is the composed kernel."""
        return self.name + SLOTS_SUFFIX

    @property
    def d_name(self) -> str:
        return "D" if self.name == "weight" else f"{self.name}_D"

    @property
    def extra_name(self) -> str:
        return "weight_extra" if self.name == "weight" else f"{self.name}_extra"


class CachedKernel:
    """A kernel composed once for a `cached` scope. It notes whether a checkpointed forward read it, and whether
    a backward has reached it since."""

    def __init__(self, kernel: Tensor) -> None:
        self.kernel = kernel
        self.checkpointed = self.has_gradient = False
        if kernel.requires_grad:
            kernel.register_hook(self._note_gradient)  # type: ignore[no-untyped-call]

    def read(self) -> Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not self.checkpointed:
            # torch's only mark of a non-reentrant checkpointed region is the hooks it puts on saved tensors.
            hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
            self.checkpointed = hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"
        return self.kernel

    def _note_gradient(self, gradient: Tensor) -> None:
        self.has_gradient = True


def read_factors(module: nn.Module, kernel: StoredKernel) -> tuple[Tensor, Tensor, Tensor | None]:
    """W's first slots, D and weight_extra of one kernel."""
    parameters = module._parameters
    # A DataParallel replica has D and weight_extra as plain attributes.
    d, extra = (parameters.get(name, module.__dict__.get(name)) for name in (kernel.d_name, kernel.extra_name))
    weight = parameters.get(kernel.name)
    if weight is None or d is None:
        raise RuntimeError(f"'{kernel.name}' of {type(module).__name__} has lost its tensors.")
    return weight, d, extra


def set_kernel(module: nn.Module, kernel: StoredKernel, value: Tensor) -> None:
    """W := value, D := 0, in place; weight_extra stays. Then k = W + D [W | weight_extra] is `value` exactly.

    Raises UsageError where its shape is not the kernel's.
    """
    weight, d, _ = read_factors(module, kernel)
    if value.shape != weight.shape:
        raise UsageError(
            f"'{kernel.name}' of {type(module).__name__}: expected the shape {tuple(weight.shape)}, got "
            f"{tuple(value.shape)}; call fold(model) before changing shapes."
        )
    with torch.no_grad():
        weight.copy_(value)
        d.zero_()


def renew_d(module: nn.Module, kernel: StoredKernel, weight: nn.Parameter) -> None:
    """A new D, zero, for a W that was put in the old one's place; weight_extra follows its dtype and device.

    D is replaced, not zeroed in place: layers that were tied to this one keep theirs, and an engine that swaps
    parameters in and out assigns W and then its own D, and must find that untouched.
    """
    for name in (kernel.d_name, kernel.extra_name):
        factor = module._parameters.get(name)
        if factor is None or (name == kernel.extra_name and (factor.is_meta or weight.is_meta)):
            continue
        values = torch.zeros_like(factor, device=weight.device, dtype=weight.dtype)
        if name == kernel.extra_name:
            if (factor.dtype, factor.device) == (weight.dtype, weight.device):
                continue
            values.copy_(factor.detach())
        module._parameters[name] = nn.Parameter(values, requires_grad=weight.requires_grad)


def refuse_shards(model: nn.Module, instead: str) -> None:
    """Raises DoconvError for a model that FSDP2 shards: no process has its parameters whole."""
    for path, module in model.named_modules():
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            name = path or type(module).__name__
            raise DoconvError(f"'{name}' is wrapped by fully_shard: its parameters are shards; {instead}.")


def new_factors(
    weight: Tensor, groups: int, d_mul: int, seed: int, name: str
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Fresh D (zero) and weight_extra (random; None at D_mul = K) for `weight`, with its dtype, device and
    `requires_grad`. D is (C_in, K, D_mul), weight_extra (C_out, C_in/g, D_mul - K)."""
    positions = weight.shape[2:].numel()
    d = torch.zeros(weight.shape[1] * groups, positions, d_mul, dtype=weight.dtype, device=weight.device)
    extra = None
    if d_mul > positions:
        shape = (*weight.shape[:2], d_mul - positions)
        drawn = draw_weight_extra(shape, positions, seed, name).to(weight.device, weight.dtype)
        extra = nn.Parameter(drawn, requires_grad=weight.requires_grad)
    return nn.Parameter(d, requires_grad=weight.requires_grad), extra


def load_factors(
    module: nn.Module,
    kernels: Sequence[StoredKernel],
    state_dict: Mapping[str, Tensor],
    prefix: str,
    local_metadata: Mapping[str, Any],
    missing_keys: list[str],
) -> None:
    """After torch's own loading: a kernel that came without D and weight_extra is an ordinary one, so D
    becomes 0, weight_extra stays, and neither counts as missing. One without the other stays missing."""
    for kernel in kernels:
        d, extra = module._parameters[kernel.d_name], module._parameters.get(kernel.extra_name)
        d_key, extra_key = prefix + kernel.d_name, prefix + kernel.extra_name
        if d is None or prefix + kernel.name not in state_dict or d_key in state_dict or extra_key in state_dict:
            continue
        if d.is_meta and local_metadata.get("assign_to_params_buffers"):
            source = state_dict[prefix + kernel.name]
            zero = torch.zeros(d.shape, dtype=source.dtype, device=source.device)
            module._parameters[kernel.d_name] = nn.Parameter(zero, requires_grad=d.requires_grad)
        else:
            with torch.no_grad():
                d.zero_()
        forgiven = {d_key} if extra is not None and extra.is_meta else {d_key, extra_key}
        missing_keys[:] = [key for key in missing_keys if key not in forgiven]
