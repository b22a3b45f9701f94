"""Over-parameterized kernels on any class: a run-time subclass on which reading the kernel composes it.

`torch.nn.utils.parametrize` would rename the keys, change the parameter order and forbid pickling. Here W
and D stay ordinary entries of `_parameters`; only the attribute named like the kernel is a property.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from doconv_convert.nn.composition import compose_kernel
from doconv_convert.nn.stored import StoredKernel, load_factors


def overlay(module: nn.Module, kernels: Sequence[StoredKernel]) -> None:
    """Turn `module`, whose `_parameters` already hold every D, into its own run-time subclass."""
    base = base_class(module)
    module.__class__ = _overlay_class(base, (*stored_kernels(module), *kernels))  # type: ignore[arg-type]


def remove_overlay(module: nn.Module) -> None:
    """Give `module` its own class back; its parameters are the caller's."""
    module.__class__ = base_class(module)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The user's class of a module, whether it is overlaid or not."""
    return cast("type[nn.Module]", getattr(type(module), "_overlay_base", type(module)))


def is_overlaid(module: nn.Module) -> bool:
    return hasattr(type(module), "_overlay_base")


def stored_kernels(module: nn.Module) -> tuple[StoredKernel, ...]:
    """The over-parameterized kernels of a DOConv layer or an overlaid module; () for any other module."""
    # Asked of the class: wrappers (torch.compile, checkpoint_wrapper) pass attributes of what they wrap for their own.
    ours = hasattr(type(module), "stored_kernels") and not isinstance(module, fx.GraphModule)
    return getattr(module, "stored_kernels", ()) if ours else ()


def read_factors(module: nn.Module, kernel: StoredKernel) -> tuple[Tensor, Tensor, Tensor | None]:
    """W's first slots, D and weight_extra of one kernel."""
    parameters = module._parameters
    weight, d = parameters[kernel.name], parameters[kernel.d_name]
    if weight is None or d is None:
        raise RuntimeError(f"'{kernel.name}' of {type(module).__name__} has lost its tensors.")
    return weight, d, parameters.get(kernel.extra_name)


def _read(module: nn.Module, name: str) -> Any:
    """A parameter, or what a tracer hands out for it."""
    # Looked up at each call: torch.fx patches this very method to record reads of parameters.
    return nn.Module.__getattr__(module, name)


def _first_slots(module: nn.Module, kernel: StoredKernel) -> Any:
    """W's first K slots."""
    weight = _read(module, kernel.name)
    if isinstance(weight, fx.Proxy):
        # A GraphModule copies by attribute access what its graph reads: let it find W, not the composed kernel.
        owner, _, attribute = str(weight.node.target).rpartition(".")
        if attribute == kernel.name:  # fx hands out one proxy for every read
            weight.node.target = f"{owner}.{kernel.slots_name}".lstrip(".")
    return weight


def _kernel_property(kernel: StoredKernel) -> property:
    def composed(module: nn.Module) -> Tensor:
        extra = _read(module, kernel.extra_name) if kernel.extra_name in module._parameters else None
        return compose_kernel(_first_slots(module, kernel), _read(module, kernel.d_name), extra, kernel.groups)

    def getter(module: nn.Module) -> Tensor:
        if module._cached_kernels is not None:
            return module._cached_kernels[kernel.name].read()  # type: ignore[index,union-attr,no-any-return]
        weight = module._parameters.get(kernel.name)
        sharded = not torch.compiler.is_compiling() and type(weight).__module__.startswith("torch.distributed")
        if sharded and _called_by_engine():
            return cast("Tensor", weight)
        try:
            return composed(module)
        except AttributeError as error:  # it would make Python fall back to __getattr__: W, uncomposed
            raise RuntimeError(f"'{kernel.name}' could not be composed: {error}") from error

    return property(getter)


def _called_by_engine() -> bool:
    """Whether torch.distributed itself reads or sets the attribute. FSDP2 swaps shards and whole parameters by
    `getattr` and `setattr`, its state dicts look them up: under the kernel's name they mean W."""
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return str(caller).startswith("torch.distributed.")


def _slots_property(kernel: StoredKernel) -> property:
    return property(lambda module: _first_slots(module, kernel))


@functools.cache
def _overlay_class(base: type[nn.Module], kernels: tuple[StoredKernel, ...]) -> type[nn.Module]:
    d_names = {kernel.name: kernel.d_name for kernel in kernels}

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        if name in d_names and _called_by_engine():
            self._parameters[name] = value  # what FSDP2 does itself where a class has no __setattr__
            return
        base.__setattr__(self, name, value)
        # A new kernel is a new start. D is replaced, not zeroed in place: an engine that swaps parameters in and
        # out assigns the kernel and then its own D, and must find that untouched.
        d = self._parameters.get(d_names.get(name, ""))
        if d is not None and isinstance(value, nn.Parameter):
            self._parameters[d_names[name]] = nn.Parameter(torch.zeros_like(d), requires_grad=d.requires_grad)

    def _load_from_state_dict(
        self: nn.Module,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        base._load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        load_factors(self, kernels, state_dict, prefix, local_metadata, missing_keys)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        _, arguments, *rest = cast("tuple[Any, ...]", base.__reduce_ex__(self, max(2, int(protocol))))
        return (_new_overlaid, (base, kernels, *arguments[1:]), *rest)

    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__setattr__": __setattr__,
        "__reduce_ex__": __reduce_ex__,
        "_load_from_state_dict": _load_from_state_dict,
        "_overlay_base": base,
        "_cached_kernels": None,
        "stored_kernels": kernels,
        **{kernel.name: _kernel_property(kernel) for kernel in kernels},
        **{kernel.slots_name: _slots_property(kernel) for kernel in kernels},
    }
    return type(f"DO{base.__name__}", (base,), members)


def _new_overlaid(base: type[nn.Module], kernels: tuple[StoredKernel, ...], *arguments: Any) -> nn.Module:
    """Rebuild a pickled or copied overlaid module; its state follows."""
    cls = _overlay_class(base, kernels)  # type: ignore[arg-type]
    return cls.__new__(cls, *arguments)
