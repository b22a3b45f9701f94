"""What a pickle's content becomes: records of tensors, dicts and tuples, and stubs that do nothing (`inert.py`)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# Larger integers can all have one hash.
_LARGEST_KEY = 2**60
STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
}
ITEM_BYTES = {
    **dict.fromkeys(("complex128",), 16),
    **dict.fromkeys(("float64", "int64", "complex64", "uint64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 1),
}


class Name(NamedTuple):
    """What a pickle refers to by module and name. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Stub:
    """An object that a pickle makes of anything but tensors: what it names (`of`), and the `state` it is given."""

    __slots__ = ("of", "state")

    def __init__(self, of: str) -> None:
        self.of = of
        self.state: Any = None


@dataclass(frozen=True, eq=False)
class Storage:
    """A block of `count` elements of `dtype`, from element `start` on of what the file has under `key`."""

    key: str
    dtype: str
    count: int
    start: int = 0

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A dense tensor as a pickle describes it; its values are still in the file."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def is_ordinary(name: str) -> bool:
    """Whether every state dict may name it."""
    module, _, last = name.rpartition(".")
    ordinary = last in STORAGE_DTYPES or last in ITEM_BYTES
    return (module.partition(".")[0] == "torch" and ordinary) or Name(module, last) in _KNOWN


class Unreadable(Exception):
    """The opcodes do not add up."""


def made(function: Any, arguments: Any) -> Any:
    """What a call in a pickle stands for; of unknown functions and classes a stub."""
    if not isinstance(function, Name):
        return Stub(function.of if isinstance(function, Stub) else "call")
    make = _KNOWN.get(function)
    if make is not None and isinstance(arguments, tuple):
        return make(*arguments)
    return Stub(str(function))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    """`torch._utils._rebuild_tensor_v2`; `rest` is requires_grad, hooks and flags."""
    flags = rest[2] if len(rest) > 2 else None
    if not isinstance(storage, Storage) or flags:  # a conjugate or negative view
        return Stub("torch._utils._rebuild_tensor_v2")
    return _described(storage, storage.dtype, offset, shape, stride)


def _typed_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Any:
    """`torch._utils._rebuild_tensor_v3`: the storage has bytes, the tensor a dtype."""
    known = isinstance(dtype, Name) and dtype.module == "torch" and dtype.name in ITEM_BYTES
    if not isinstance(storage, Storage) or not known or any(rest):
        return Stub("torch._utils._rebuild_tensor_v3")
    return _described(storage, dtype.name, offset, shape, stride)


def _described(storage: Storage, dtype: str, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    shape, stride = tuple(map(operator.index, shape)), tuple(map(operator.index, stride))
    offset = operator.index(offset)
    if len(shape) != len(stride) or len(shape) > 64 or min((offset, *shape, *stride)) < 0:
        raise Unreadable(f"a tensor of shape {shape[:8]}, stride {stride[:8]} and offset {offset}")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * ITEM_BYTES[dtype] > storage.size:
        raise Unreadable(f"a tensor of shape {shape[:8]} reaches behind the end of its storage")
    return StoredTensor(storage, dtype, offset, shape, stride)


def _subclass(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`; of torch's own classes only."""
    plain = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
    return made(function, arguments) if str(kind) in plain and function in _KNOWN else Stub(str(kind))


def _dict(content: Any = ()) -> Any:
    """`OrderedDict`, also of a list of pairs, as protocol 2 writes it."""
    if isinstance(content, Mapping):
        return dict(content)
    pairs = [pair for pair in content if isinstance(pair, list | tuple) and len(pair) == 2]
    return {_key(key): value for key, value in pairs}


def pairs(items: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _key(key: Any) -> Any:
    """What is safe to hash: of nested tuples, each of which holds the one before twice, hashing would not end."""
    if isinstance(key, int):
        return key if abs(key) < _LARGEST_KEY else hex(key)
    return key if isinstance(key, str | float | bytes | None | Stub | StoredTensor) else Stub("a key")


def made_set(items: Any = ()) -> Stub:
    """What is in a set need not be fit to be hashed here: a stub with a list."""
    made = Stub("builtins.set")
    made.state = list(items)
    return made


_KNOWN: dict[Name, Callable[..., Any]] = {
    Name("torch._utils", "_rebuild_tensor"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    Name("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    Name("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    Name("torch._tensor", "_rebuild_from_type_v2"): _subclass,
    Name("torch", "Size"): lambda sizes=(): tuple(sizes),
    Name("collections", "OrderedDict"): _dict,
    Name("collections", "defaultdict"): lambda *_: {},
    Name("builtins", "set"): made_set,
    Name("builtins", "frozenset"): made_set,
}
