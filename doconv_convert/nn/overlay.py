"""Over-parameterized kernels on any class: a subclass on which the attribute named like the kernel is a property.

A read composes, a write sets the kernel (`kernel_view`). `torch.nn.utils.parametrize` would rename the keys, change
the parameter order and forbid pickling. Here W and D stay ordinary entries of `_parameters`. DOConv2d is such a
subclass with a constructor; `overlay` makes one at run time for any other class.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, fx, nn

from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.nn.composition import compose_kernel
from doconv_convert.nn.counters import share_rules
from doconv_convert.nn.factors import CachedKernel, StoredKernel, load_factors, renew_d, set_kernel
from doconv_convert.nn.kernel_view import KernelView, refusal, source_module, view_kernel

if TYPE_CHECKING:
    from typing_extensions import Self


class OverParameterized(nn.Module):
    """What every over-parameterized class mixes in before the class it extends. `stored_kernels` are its kernels."""

    stored_kernels: tuple[StoredKernel, ...]
    plain_class: ClassVar[type[nn.Module]]
    _cached_kernels: dict[str, CachedKernel] | None = None
    __jit_unused_properties__: ClassVar[list[str]] = ["stored_kernels", "qconfig"]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A Parameter that is assigned as the kernel becomes W, and D a new zero; weight_extra stays.

        Raises DoconvError or UsageError for a kernel in another shape or of another layer, and for tools that move
        the kernel elsewhere (pruning, weight norm).
        """
        kernel = _kernel_called(self, name)
        if kernel is None:
            if isinstance(param, KernelView) and source_module(param) is self:
                raise refusal(self, self.stored_kernels[0], f"it cannot be moved to '{name}'")
            super().register_parameter(name, param)
            return
        current = self._parameters.get(name)
        if _is_sharded(param) or _is_sharded(current):
            self._parameters[name] = param  # what FSDP2 does itself where a class has no __setattr__
            return
        if param is None:
            raise refusal(self, kernel, "it cannot be None")
        if isinstance(param, KernelView):
            _set_from(self, kernel, param)
            return
        if current is not None and param.shape != current.shape:
            raise UsageError(
                f"'{name}' of {type(self).__name__}: expected the shape {tuple(current.shape)}, got "
                f"{tuple(param.shape)}; call fold(model) before changing shapes."
            )
        super().register_parameter(name, param)
        renew_d(self, kernel, param)

    def __delattr__(self, name: str) -> None:
        for kernel in self.stored_kernels:
            if name in (kernel.name, kernel.d_name, kernel.extra_name):
                raise refusal(self, kernel, f"'{name}' cannot be deleted or parametrized")
        super().__delattr__(name)

    @property
    def qconfig(self) -> Any:
        """None, or absent: torch.ao's quantization would leave the layer as it is, without a word."""
        if "qconfig" not in self.__dict__:
            raise AttributeError("qconfig")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        if value is not None and self.stored_kernels:
            raise refusal(self, self.stored_kernels[0], "torch.ao's quantization does not know such a layer")
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        self.__dict__.pop("qconfig", None)

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """As ever; counters of multiply-accumulates look up a layer's class in such a `fn`."""
        share_rules(type(self), self.plain_class)
        return super().apply(fn)

    def __prepare_scriptable__(self) -> Any:
        """Called by torch.jit.script. Raises DoconvError."""
        name = self.stored_kernels[0].name if self.stored_kernels else "weight"
        raise DoconvError(
            f"'{name}' of {type(self).__name__}: torch.jit.script cannot compile an over-parameterized layer; script "
            "the folded model: torch.jit.script(fold(model))."
        )

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        load_factors(self, self.stored_kernels, state_dict, prefix, local_metadata, missing_keys)


def kernel_property(name: str) -> property:
    """The attribute `name`: the composed kernel (W itself where there is no D)."""

    def read(module: OverParameterized) -> Any:
        if name not in module._parameters:
            raise AttributeError(f"'{type(module).__name__}' object has no attribute '{name}'")
        kernel = _kernel_called(module, name)
        if kernel is None:
            return first_slots(module, name)
        if not torch.compiler.is_compiling():
            caller = str(sys._getframe(1).f_globals.get("__name__", ""))
            if caller == "torch.nn.utils.weight_norm":  # it would go on by deleting W
                raise refusal(module, kernel, "it cannot be split into a norm and a direction")
            # FSDP2 swaps shards and whole parameters by `getattr` and `setattr`, its state dicts look them up: under
            # the kernel's name they mean W.
            if caller.startswith("torch.distributed.") and _is_sharded(module._parameters[name]):
                return module._parameters[name]
        if module._cached_kernels is not None:
            composed: Any = module._cached_kernels[name].read()
        else:
            composed = _composed(module, kernel)
        return view_kernel(module, kernel, composed)

    def write(module: OverParameterized, value: Any) -> None:
        # nn.Module's __setattr__ takes what is assigned to a registered Parameter. A DataParallel replica has none.
        if not getattr(module, "_is_replica", False):
            raise refusal(module, StoredKernel(name, 1), "it is no longer among the layer's parameters")
        module._parameters[name] = value

    return property(read, write)


def slots_property(name: str) -> property:
    """W's first K slots of the kernel `name`."""
    return property(lambda module: first_slots(module, name))


def first_slots(module: nn.Module, name: str) -> Any:
    """W's first K slots, or what a tracer hands out for them."""
    # Looked up at each call: torch.fx patches this very method to record reads of parameters.
    weight = nn.Module.__getattr__(module, name)
    if isinstance(weight, fx.Proxy):
        # A GraphModule copies by attribute access what its graph reads: let it find W, not the composed kernel.
        owner, _, attribute = str(weight.node.target).rpartition(".")
        if attribute == name:  # fx hands out one proxy for every read
            weight.node.target = f"{owner}.{StoredKernel(name, 1).slots_name}".lstrip(".")
    return weight


def overlay(module: nn.Module, kernels: Sequence[StoredKernel]) -> None:
    """Turn `module`, whose `_parameters` already hold every D, into its own run-time subclass."""
    base = base_class(module)
    module.__class__ = _overlay_class(base, (*stored_kernels(module), *kernels))  # type: ignore[arg-type]


def base_class(module: nn.Module) -> type[nn.Module]:
    """The user's class of a module, whether it is overlaid or not."""
    return cast("type[nn.Module]", getattr(type(module), "_overlay_base", type(module)))


def is_over_parameterized(module: nn.Module) -> bool:
    """Whether it is a DOConv layer (one without D too) or an overlaid module."""
    return isinstance(module, OverParameterized)


def is_overlaid(module: nn.Module) -> bool:
    return hasattr(type(module), "_overlay_base")


def stored_kernels(module: nn.Module) -> tuple[StoredKernel, ...]:
    """The over-parameterized kernels of a DOConv layer or an overlaid module; () for any other module."""
    # Asked of the class: wrappers (torch.compile, checkpoint_wrapper) pass attributes of what they wrap for their own.
    ours = hasattr(type(module), "stored_kernels") and not isinstance(module, fx.GraphModule)
    return getattr(module, "stored_kernels", ()) if ours else ()


def _kernel_called(module: OverParameterized, name: str) -> StoredKernel | None:
    return next((kernel for kernel in module.stored_kernels if kernel.name == name), None)


def _composed(module: nn.Module, kernel: StoredKernel) -> Any:
    try:
        factors = first_slots(module, kernel.name), getattr(module, kernel.d_name)
        extra = getattr(module, kernel.extra_name, None)
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            # An inference tensor counts no versions, and a write would not be seen.
            with torch.inference_mode(False), torch.no_grad():
                return compose_kernel(*factors, extra, kernel.groups)
        return compose_kernel(*factors, extra, kernel.groups)
    except AttributeError as error:  # it would make Python fall back to __getattr__: W, uncomposed
        raise RuntimeError(f"'{kernel.name}' could not be composed: {error}") from error


def _is_sharded(tensor: Tensor | None) -> bool:
    return type(tensor).__module__.startswith("torch.distributed")


def _set_from(module: nn.Module, kernel: StoredKernel, view: KernelView) -> None:
    """`layer.weight *= 2` ends with an assignment of what was read. Another layer's kernel would look tied, and not
    be."""
    if source_module(view) is not module:
        raise UsageError(
            f"'{kernel.name}' of {type(module).__name__}: got the kernel of another over-parameterized layer; tie "
            "layers before to_doconv, or assign a copy: nn.Parameter(other.weight.detach().clone())."
        )
    with torch._C.DisableTorchFunctionSubclass():
        set_kernel(module, kernel, view)


@functools.cache
def _overlay_class(base: type[nn.Module], kernels: tuple[StoredKernel, ...]) -> type[nn.Module]:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        _, arguments, *rest = cast("tuple[Any, ...]", base.__reduce_ex__(self, max(2, int(protocol))))
        return (_new_overlaid, (base, kernels, *arguments[1:]), *rest)

    names = [name for kernel in kernels for name in (kernel.name, kernel.slots_name)]
    unused = [*OverParameterized.__jit_unused_properties__, *getattr(base, "__jit_unused_properties__", []), *names]
    members: dict[str, Any] = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "__jit_unused_properties__": unused,
        "_overlay_base": base,
        "plain_class": base,
        "stored_kernels": kernels,
        **{kernel.name: kernel_property(kernel.name) for kernel in kernels},
        **{kernel.slots_name: slots_property(kernel.name) for kernel in kernels},
    }
    return type(f"DO{base.__name__}", (OverParameterized, base), members)


def _new_overlaid(base: type[nn.Module], kernels: tuple[StoredKernel, ...], *arguments: Any) -> nn.Module:
    """Rebuild a pickled or copied overlaid module; its state follows."""
    cls = _overlay_class(base, kernels)  # type: ignore[arg-type]
    return cls.__new__(cls, *arguments)
