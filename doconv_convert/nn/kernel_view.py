"""What a read of `layer.weight` gives: the composed kernel, through which other people's code may write.

A read composes k = D^ W. Whatever changes that tensor, or a view of its memory, in place sets the layer's kernel:
W := k and D := 0, which is exact (k + 0 k = k). Nothing that is written is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from doconv_convert.errors import DoconvError
from doconv_convert.nn.composition import compose_kernel
from doconv_convert.nn.factors import StoredKernel, read_factors, set_kernel

_IN_PLACE = frozenset(
    f"__{name}__"
    for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
)
# What layers do with a kernel: nothing is written, and no view comes out. The way is kept short.
_CONVOLUTIONS = frozenset((torch.conv1d, torch.conv2d, torch.conv3d))
_GRAD: Any = Tensor.grad
_IS_LEAF: Any = Tensor.is_leaf


class _Source:
    """Where a kernel was read: its module, and the memory (`value`) that all views of this one read share."""

    def __init__(self, module: nn.Module, kernel: StoredKernel, value: Tensor) -> None:
        self.module, self.kernel, self.value = module, kernel, value
        self.seen = self._state()

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return read_factors(self.module, self.kernel)

    def _state(self) -> list[tuple[int, int | None]]:
        factors = [factor for factor in self.factors if factor is not None]
        try:
            return [(id(factor), factor._version) for factor in factors]
        except RuntimeError:  # inference tensors count no versions
            return [(id(factor), None) for factor in factors]

    def refresh(self, always: bool) -> None:
        """Bring `value` up to date, as a plain layer's tensor would be after a step of the optimizer. Version counters
        miss fused optimizers and writes to `.data`, so before a write (`always`) the kernel is composed anew."""
        if always or self._state() != self.seen:
            with torch.no_grad():
                fresh = compose_kernel(*self.factors, self.kernel.groups)
                if not torch.equal(fresh, self.value):
                    self.value.copy_(fresh)
            self.seen = self._state()

    def write(self) -> None:
        set_kernel(self.module, self.kernel, self.value)
        self.seen = self._state()


class KernelView(Tensor):
    """The kernel of an over-parameterized layer, (C_out, C_in/g, *kernel_size), or a view of it.

    For `isinstance` the kernel itself is an nn.Parameter; it is no leaf, since D and W are what trains. Freezing it
    freezes both. Its numpy array is read-only. In-place changes set the layer's kernel; raw memory (`data_ptr`, DLPack)
    is a copy.
    """

    _source: _Source
    _whole: bool

    @staticmethod
    def of(source: _Source, value: Tensor, whole: bool = False) -> KernelView:
        view: Any = value.as_subclass(KernelView)
        view._source, view._whole = source, whole
        return cast("KernelView", view)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS and len(args) > 1 and isinstance(args[1], KernelView):
            args[1]._source.refresh(always=False)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        views = list(_views((*args, *kwargs.values())))
        with torch._C.DisableTorchFunctionSubclass():
            writes = _may_write(func, kwargs)
            for view in views:
                view._source.refresh(writes)
            before = [view._version for view in views]
            result = func(*args, **kwargs)
            for view, version in zip(views, before, strict=True):
                if view._version != version:
                    view._source.write()
            return _wrapped(result, func, views)

    @property
    def _is_param(self) -> bool:
        """What `isinstance(x, nn.Parameter)` asks for."""
        return self._whole

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # nn.Parameter(x) ends with this: it is to be an ordinary Parameter with these values.
        self.__dict__.clear()
        self.__class__ = nn.Parameter  # type: ignore[assignment]

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """False: an optimizer that is given the kernel raises, as D and W are what it should be given."""
        return not self._whole and _plain(_IS_LEAF.__get__, self)

    @property
    def data(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            self._source.refresh(always=False)
            return KernelView.of(self._source, Tensor.data.__get__(self))  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        if not self._whole:
            _plain(Tensor.data.__set__, self, value)  # type: ignore[attr-defined]
            return
        set_kernel(self._source.module, self._source.kernel, value)
        self._source.refresh(always=True)

    @property
    def requires_grad(self) -> bool:
        if self._whole:
            return any(factor is not None and factor.requires_grad for factor in self._source.factors)
        return _plain(Tensor.requires_grad.__get__, self)  # type: ignore[attr-defined,no-any-return]

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> KernelView:
        """Freeze or train W, D and weight_extra; of a view or a detached kernel, what torch does."""
        if not self._whole:
            _plain(Tensor.requires_grad_, self, requires_grad)
            return self
        for factor in self._source.factors:
            if factor is not None:
                factor.requires_grad_(requires_grad)
        return self

    @property
    def grad(self) -> Tensor | None:
        """None, with torch's warning of a tensor that is no leaf: gradients are those of W, D and weight_extra."""
        return cast("Tensor | None", _plain(_GRAD.__get__, self))

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if not self._whole:
            _plain(_GRAD.__set__, self, value)
        elif value is not None:
            raise DoconvError(f"{self._name}: its gradient cannot be set; set those of {self._factor_names}.")
        else:
            for factor in self._source.factors:
                if factor is not None:
                    factor.grad = None

    def register_hook(self, hook: Any) -> Any:
        if self._whole:
            raise DoconvError(
                f"{self._name}: a hook on it would never run, since each forward composes the kernel anew; register "
                f"it on {self._factor_names}."
            )
        return _plain(Tensor.register_hook, self, hook)

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """torch.nn.utils.parametrize does this."""
        raise refusal(self._source.module, self._source.kernel, "its memory cannot be replaced, as parametrize does")

    def __copy__(self) -> KernelView:
        with torch._C.DisableTorchFunctionSubclass():
            return KernelView.of(self._source, self.view_as(self), self._whole)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return cast("Tensor", memo.setdefault(id(self), self._apart()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._apart().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _apart(self) -> Tensor:
        """An ordinary Parameter (of a view: a tensor) with the same values."""
        wanted = self.requires_grad
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            self._source.refresh(always=False)
            values = self.detach().clone(memory_format=torch.preserve_format).as_subclass(Tensor)
        return nn.Parameter(values, requires_grad=wanted) if self._whole else values

    @property
    def _name(self) -> str:
        return f"'{self._source.kernel.name}' of {type(self._source.module).__name__}"

    @property
    def _factor_names(self) -> str:
        kernel = self._source.kernel
        return f"'{kernel.slots_name}' and '{kernel.d_name}'"


def view_kernel(module: nn.Module, kernel: StoredKernel, composed: Any) -> Any:
    """What the attribute gives for a composed kernel: a KernelView, or the kernel itself where a tracer, a compiler or
    torch.func follows (its own tensors are no places to write to)."""
    if type(composed) is not Tensor or _is_followed():
        return composed
    with torch._C.DisableTorchFunctionSubclass():
        return KernelView.of(_Source(module, kernel, composed), composed, whole=True)


def source_module(view: KernelView) -> nn.Module:
    """The module whose kernel it is."""
    return view._source.module


def source_parameter(view: KernelView) -> nn.Parameter:
    """The Parameter that holds W's first slots."""
    return cast("nn.Parameter", view._source.factors[0])


def refusal(module: nn.Module, kernel: StoredKernel, what: str) -> DoconvError:
    """The error for tools that would put another formula in the kernel's place."""
    return DoconvError(
        f"'{kernel.name}' of {type(module).__name__}: {what}; it is composed of '{kernel.slots_name}' and "
        f"'{kernel.d_name}'. Call fold(model) first, or apply it before to_doconv, which keeps such a layer as it is."
    )


def _is_followed() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def _views(values: Any) -> Iterator[KernelView]:
    """The kernels among arguments, also in lists of tensors."""
    for value in values:
        if isinstance(value, KernelView):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _views(value)


def _may_write(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None


def _plain(func: Any, *args: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args)


def _wrapped(result: Any, func: Any, views: list[KernelView]) -> Any:
    """`result`, with what shares memory with one of `views` as a view too."""
    if type(result) is Tensor:
        same_memory: Any = torch._C._is_alias_of  # type: ignore[attr-defined]
        source = next((view._source for view in views if same_memory(result, view._source.value)), None)
        return result if source is None else KernelView.of(source, result)
    if type(result) in (list, tuple):
        return type(result)(_wrapped(one, func, views) for one in result)
    if func is Tensor.__iter__:
        return iter([_wrapped(one, func, views) for one in result])
    if type(result).__module__ == "numpy" and hasattr(result, "flags") and not result.flags.owndata:
        result.flags.writeable = False  # a write there could not be seen
    return result
