"""The files of `torch.save`: zipped, and as before torch 1.6. Their pickles run in the inert machine (`inert.py`), and
of their tensors only those are read that are asked for.

What a file claims is held against its size before anything is allocated for it.
"""

from __future__ import annotations

import io
import operator
import struct
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from doconv_convert.artifacts.checkpoints.inert import Machine
from doconv_convert.artifacts.checkpoints.records import ITEM_BYTES, Storage, StoredTensor, Stub, is_ordinary
from doconv_convert.errors import DoconvError
from doconv_convert.words import listed

# How often a file's bytes may come again in its tensors: layers that share weights, and expanded buffers.
_REPEATS = 64
# Text and structure, no weights: those are storages.
_PICKLE_BYTES = 2**28
# The format before torch 1.6: magic number, protocol, system, content, the storages' keys; then the storages.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# No network has more, or any so deep; a module that holds another twice, which does so too, has 2^depth.
_MOST_MODULES, _DEEPEST = 100_000, 64
_CHUNK = 2**24


class PickledFile:
    """What a file of `torch.save` holds: `root`, with records in the tensors' places (`inert.py`). `others` are the
    names in its pickles that no state dict has."""

    def __init__(
        self, what: str, size: int, root: Any, machine: Machine, places: Mapping[str, tuple[int, int]]
    ) -> None:
        """`places` are each storage's offset in the file and its bytes."""
        self.root, self.others = root, [name for name in machine.names if not is_ordinary(name)]
        self._what, self._size, self._places = what, size, places
        self._read: dict[str, torch.UntypedStorage] = {}
        self._total = 0
        for storage in machine.storages.values():
            held = places.get(storage.key, (0, 0))[1]
            _require_room(f"storage {storage.key}", storage.size, held, what)

    def tensor(self, file: BinaryIO, stored: StoredTensor) -> Tensor:
        """The tensor with its values, on the CPU; tensors of one storage share it, as when they were saved."""
        count = 1
        for size in stored.shape:
            count *= size
        self._total += count * ITEM_BYTES[stored.dtype]
        _require_room("the tensors' shapes", self._total, _REPEATS * self._size, self._what)
        item = ITEM_BYTES[stored.dtype]
        start = stored.storage.start * ITEM_BYTES[stored.storage.dtype]
        if start % item:
            raise DoconvError(f"'{self._what}': a storage begins within an element; it is damaged.")
        memory, offset = self._storage(file, stored.storage), stored.offset + start // item
        return torch.empty(0, dtype=getattr(torch, stored.dtype)).set_(memory, offset, stored.shape, stored.stride)

    def _storage(self, file: BinaryIO, storage: Storage) -> torch.UntypedStorage:
        if storage.key not in self._read:
            offset, size = self._places[storage.key]
            values = torch.empty(size, dtype=torch.uint8)
            _read_into(file, offset, memoryview(cast("Any", values.numpy())))
            self._read[storage.key] = values.untyped_storage()
        return self._read[storage.key]


def refused(what: str, kind: str, names: Collection[str]) -> DoconvError:
    """The error about a file whose model is no state dict; `names` are what its pickles refer to."""
    found = listed([name for name in names if not is_ordinary(name)])
    told = f" Found: {found}." if found else ""
    return DoconvError(
        f"'{what}' {kind}; unpickling it can run code, and nothing of it was run.{told} Where you trust it, load it "
        "yourself (torch.load with weights_only=False, in a place without secrets) and save only the tensors: "
        "torch.save(model.state_dict(), 'weights.pth')."
    )


def _big_endian(what: str) -> DoconvError:
    return DoconvError(f"'{what}' was saved on a big-endian machine; load it there and save it as safetensors.")


@contextmanager
def open_pickled(content: Path | bytes, what: str) -> Iterator[tuple[PickledFile, BinaryIO]]:
    """What a file that `torch.save` made holds, and the file to read its tensors from; nothing in it is run.

    Raises DoconvError, where `what` names the thing: damaged, or sizes that the file cannot have.
    """
    with _opened(content) as (file, size):
        try:
            pickled = _parse(file, size, what)
        except DoconvError:
            raise
        except Exception as error:  # a damaged file raises many kinds
            raise damaged(what, error) from error
        yield pickled, file


def damaged(what: str, error: Exception) -> DoconvError:
    reason = (str(error).splitlines() or [""])[0][:200]
    return DoconvError(f"'{what}' cannot be read ({type(error).__name__}: {reason}); it is damaged.")


class _Bounded:
    """A file that allocates no more than it has: an ordinary one allocates all that it is asked for. Not a mapped file,
    which ends the process where a training cuts the file off meanwhile."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int | None = None) -> bytes:
        left = min(max(0, self._size - self._file.tell()), _PICKLE_BYTES)
        return self._file.read(left if size is None or size < 0 else min(size, left))

    def readline(self) -> bytes:
        return self._file.readline(_PICKLE_BYTES)


@contextmanager
def _opened(content: Path | bytes) -> Iterator[tuple[BinaryIO, int]]:
    if isinstance(content, bytes):
        yield io.BytesIO(content), len(content)
        return
    with content.open("rb") as file:
        size = content.stat().st_size
        yield cast("BinaryIO", _Bounded(file, size)), size


def _parse(file: BinaryIO, size: int, what: str) -> PickledFile:
    zipped = file.read(2) == b"PK"
    file.seek(0)
    return _parse_zip(file, size, what) if zipped else _parse_legacy(file, size, what)


def _parse_zip(file: BinaryIO, size: int, what: str) -> PickledFile:
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
        _require_room("its pickle", pickled[0].file_size, _PICKLE_BYTES, what)
        folder = pickled[0].filename.removesuffix("data.pkl")
        byteorder = [archive.read(entry) for entry in entries if entry.filename == f"{folder}byteorder"]
        if byteorder and byteorder[0].strip() != b"little":
            raise _big_endian(what)
        machine = Machine()
        root = machine.load(io.BytesIO(archive.read(pickled[0])))
    places = {}
    for entry in entries:
        if entry.filename.startswith(f"{folder}data/"):
            places[entry.filename.removeprefix(f"{folder}data/")] = (_data_offset(file, entry), entry.file_size)
    return PickledFile(what, size, root, machine, places)


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, which may be longer than the directory says."""
    file.seek(entry.header_offset)
    signature, name, extra = struct.unpack("<4s22xHH", file.read(30))
    if signature != b"PK\3\4":
        raise ValueError("an entry without a header")
    return entry.header_offset + 30 + int(name) + int(extra)


def _parse_legacy(file: BinaryIO, size: int, what: str) -> PickledFile:
    machine = Machine()
    if machine.load(file) != _LEGACY_MAGIC or machine.load(file) != _LEGACY_PROTOCOL:
        raise refused(what, "is a pickle that torch.save did not write", machine.names)
    system = machine.load(file)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise _big_endian(what)
    root = machine.load(file)
    keys = machine.load(file)
    places, offset = {}, file.tell()
    for key in keys if isinstance(keys, list) else ():
        storage = machine.storages[key]
        file.seek(offset)
        count = struct.unpack("<q", file.read(8))[0]
        if count != storage.count or offset + 8 + storage.size > size:
            left = max(0, size - offset - 8)
            raise DoconvError(
                f"'{what}': storage {key[:80]} claims {storage.size} bytes, the file has {left} for it; it is damaged: "
                "copy or save it again."
            )
        places[key] = (offset + 8, storage.size)
        offset += 8 + storage.size
    return PickledFile(what, size, root, machine, places)


def _read_into(file: BinaryIO, offset: int, values: memoryview) -> None:
    file.seek(offset)
    for start in range(0, len(values), _CHUNK):
        part = file.read(min(_CHUNK, len(values) - start))
        values[start : start + len(part)] = part
        if len(part) != min(_CHUNK, len(values) - start):
            raise ValueError("the file ends within a storage")


def with_modules(content: Any, notes: list[str]) -> Any:
    """The content with state dicts in the places of pickled modules, at the top and one level down; `notes` says which.
    Raises as `module_state`."""
    state = module_state(content)
    if state is not None:
        notes.append(f"took the tensors of a pickled '{content.of[:80]}', none of whose code was run")
        return state
    if not isinstance(content, dict):
        return content
    found = {key: state for key, value in content.items() if (state := module_state(value)) is not None}
    for key in found:
        notes.append(f"'{str(key)[:80]}' is a pickled '{content[key].of[:80]}': its tensors are read, no code is run")
    return {**content, **found}


def module_state(content: Any) -> dict[str, Any] | None:
    """The state dict of a pickled module, read from the parts that every `nn.Module` has; None of anything else.

    What the module's own class would do (hooks, names of its own) is not run. Raises ValueError for modules within
    modules without end.
    """
    if not _is_module(content):
        return None
    state: dict[str, Any] = {}
    open_parts, seen = [(content, "", 0)], 0
    while open_parts:
        module, prefix, depth = open_parts.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST_MODULES:
            raise ValueError("modules within modules without end")
        fields = module.state
        not_saved = fields.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, value in (fields.get(kind) or {}).items():
                if value is not None and not (kind == "_buffers" and _holds(not_saved, name)):
                    state[f"{prefix}{name}"] = value
        children = (fields.get("_modules") or {}).items()
        open_parts += [(child, f"{prefix}{name}.", depth + 1) for name, child in children if _is_module(child)][::-1]
    return state


def _is_module(content: Any) -> bool:
    return (
        isinstance(content, Stub)
        and isinstance(content.state, dict)
        and {"_parameters", "_buffers", "_modules"} <= content.state.keys()
        and all(isinstance(content.state[part], dict | None) for part in ("_parameters", "_buffers", "_modules"))
    )


def _holds(names: Any, name: Any) -> bool:
    return isinstance(names, Stub) and isinstance(names.state, list) and name in names.state


def _require_room(part: str, claimed: int, held: int, what: str) -> None:
    if not 0 <= operator.index(claimed) <= held:
        raise DoconvError(
            f"'{what}': {part[:80]} claims {claimed} bytes, the file has {held} for it; it is damaged: copy or save it "
            "again."
        )
