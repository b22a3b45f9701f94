"""Pickled tensors, read with `weights_only=True`, after the file's own claims were held against its size.

torch reads as many bytes as a zip entry or a pickle claims that a storage has. So first the pickle is walked
through by an unpickler for which every name is an inert record, and each claim is compared with what is there.
"""

from __future__ import annotations

import argparse
import io
import operator
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from doconv_convert.errors import DoconvError
from doconv_convert.words import listed

# How often a file's bytes may come again in its tensors: layers that share weights, and expanded buffers.
_REPEATS = 64
# A file of the format before torch 1.6: magic number, protocol, system, content, the storages' keys.
_LEGACY_PICKLES = 5
# What training scripts store beside the weights, timm's among them, and what does nothing when it is made: attributes.
_INERT: list[Any] = [argparse.Namespace]
_ITEM_SIZES = {
    **dict.fromkeys(("ComplexDoubleStorage",), 16),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
}


class Inert:
    """Stands for whatever a pickle names: takes any call, state or item, and does nothing."""

    def __new__(cls, *values: Any, **named: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *values: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def __call__(self, *values: Any, **named: Any) -> Inert:
        return self

    def add(self, value: Any) -> None:
        pass


# Python's own unpickler, not the C one: that one allocates a table as long as the largest index in the file.
class _Inventory(pickle._Unpickler):
    """Which names a pickle holds, and how many bytes it claims each storage has."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.names: dict[str, None] = {}
        self.claims: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 writes it
        self.names[f"{module}.{name}"] = None
        return type(str(name), (Inert,), {})

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "storage":
            _, storage, key, _, count = pid[:5]
            size = _ITEM_SIZES.get(storage.__name__ if isinstance(storage, type) else "", 1)
            claimed = operator.index(count) * size
            if not isinstance(key, str) or claimed < 0:
                raise pickle.UnpicklingError("a storage without a key or a size")
            self.claims[key] = max(self.claims.get(key, 0), claimed)
        return Inert()


def load_tensors(content: Path | bytes, what: str) -> Any:
    """What a file that `torch.save` made holds, on the CPU; nothing in it is run.

    Raises DoconvError, where `what` names the thing: damaged, sizes that the file cannot have, or more than tensors.
    """
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    try:
        with _opened(content) as file:
            names = _check_claims(file, size, what)
    except DoconvError:
        raise
    except Exception as error:  # a damaged file raises many kinds
        raise _damaged(what, error) from error
    try:
        with _opened(content) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other pickle protocols: what matters raises
            with torch.serialization.safe_globals(_INERT):
                loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(what, names, error) from error
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise _damaged(what, error) from error
    _require_real_tensors(loaded, size, what)
    return loaded


def _opened(content: Path | bytes) -> BinaryIO:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def _check_claims(file: BinaryIO, size: int, what: str) -> list[str]:
    """The names in the file's pickles. Raises DoconvError for a size that the file cannot have."""
    if file.read(2) != b"PK":
        file.seek(0)
        names: dict[str, None] = {}
        with suppress(EOFError):  # one pickle alone, which torch refuses
            for _ in range(_LEGACY_PICKLES):
                inventory = _Inventory(file)
                inventory.load()
                names |= inventory.names
                _require_room("its storages", sum(inventory.claims.values()), size, what)
        return list(names)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise DoconvError(
                    f"'{what}': its entry '{entry.filename[:80]}' is compressed, which torch.save never does; it is "
                    "damaged or no checkpoint: save it again."
                )
        # entries that overlap are many times the file
        _require_room("its entries", sum(entry.file_size for entry in entries), size, what)
        pickled = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise DoconvError(f"'{what}' is a zip file without one 'data.pkl' in it; expected what torch.save writes.")
        inventory = _Inventory(io.BytesIO(archive.read(pickled[0])))
        inventory.load()
        folder = pickled[0].filename.removesuffix("data.pkl")
        held = {entry.filename: entry.file_size for entry in entries}
        for key, claimed in inventory.claims.items():
            _require_room(f"storage {key}", claimed, held.get(f"{folder}data/{key}", 0), what)
        return list(inventory.names)


def _require_room(part: str, claimed: int, held: int, what: str) -> None:
    if not 0 <= claimed <= held:
        raise DoconvError(
            f"'{what}': {part[:80]} claims {claimed} bytes, the file has {held} for it; it is damaged: copy or save it "
            "again."
        )


def _require_real_tensors(loaded: Any, size: int, what: str) -> None:
    """Raises DoconvError for tensors without values of their own, and for more values than a file can mean."""
    total = 0
    for tensor in _tensors(loaded):
        kind = type(tensor).__name__
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            raise DoconvError(f"'{what}' holds a {kind} of layout {tensor.layout}; expected ordinary dense tensors.")
        if tensor.is_meta or tensor.is_quantized:
            state = "without values (meta)" if tensor.is_meta else "that is quantized"
            raise DoconvError(f"'{what}' holds a tensor {state}; expected ordinary dense tensors with values.")
        total += tensor.numel() * tensor.element_size()
    _require_room("the tensors' shapes", total, _REPEATS * size, what)


def _tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor in dicts, lists and tuples, each container once: a pickle may nest one in itself."""
    open_parts, seen = [content], set()
    while open_parts:
        part = open_parts.pop()
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, (dict, list, tuple)) and id(part) not in seen:
            seen.add(id(part))
            open_parts.extend(part.values() if isinstance(part, dict) else part)


def _damaged(what: str, error: Exception) -> DoconvError:
    reason = (str(error).splitlines() or [""])[0][:200]
    return DoconvError(f"'{what}' cannot be read ({type(error).__name__}: {reason}); it is damaged.")


def _refused(what: str, names: list[str], error: Exception) -> DoconvError:
    found = listed([name for name in names if not _is_ordinary(name)]) or str(error).splitlines()[0][:200]
    return DoconvError(
        f"'{what}' holds more than tensors, and unpickling that can run code; it was not opened. Found: {found}. "
        "Where you trust it, load it yourself (torch.load with weights_only=False, in a place without secrets) and "
        "save only the tensors: torch.save(model.state_dict(), 'weights.pth')."
    )


def _is_ordinary(name: str) -> bool:
    """Whether every state dict may name it."""
    module, _, last = name.rpartition(".")
    in_torch = module == "torch" and (last.endswith("Storage") or isinstance(getattr(torch, last, None), torch.dtype))
    ordinary = ("torch.Size", "collections.OrderedDict", "argparse.Namespace")
    return in_torch or name in ordinary or name.startswith("torch._utils._rebuild_")
