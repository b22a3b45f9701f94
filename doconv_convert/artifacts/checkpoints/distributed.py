"""Folders of torch.distributed.checkpoint, read without a process group and without running what is in them.

`.metadata` is a pickle, which torch itself reads with `pickle.load`. Here the few classes that such a file names
become inert records; any other name is refused before it is looked up. The tensors' shards are slices of the
`.distcp` files, read as every file of `torch.save` is (`pickles.py`). Entries that are pickled objects are never read.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doconv_convert.artifacts.checkpoints.pickles import open_pickled
from doconv_convert.artifacts.checkpoints.places import METADATA_FILE
from doconv_convert.artifacts.checkpoints.records import StoredTensor
from doconv_convert.artifacts.checkpoints.unwrap import Unwrapper
from doconv_convert.errors import DoconvError
from doconv_convert.words import listed


class _Record:
    """Stands for any class of the metadata: its attributes, or what it was called with, and no behavior.

    Not torch's own dataclasses: a file may give a state to the class itself, which sets the attributes of those, and
    finds `__setstate__` here. Importing them takes seconds, in which all of torch.distributed.checkpoint comes along.
    """

    def __init__(self, *values: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.values = state


class _Metadata(_Record):
    state_dict_metadata: dict[str, Any]
    storage_data: dict[Any, Any]
    planner_data: dict[str, tuple[str | int, ...]] | None = None


class _Tensor(_Record):
    size: tuple[int, ...]
    chunks: list[Any]


class _Index(_Record):
    fqn: str
    offset: tuple[int, ...] | None = None


class _Place(_Record):
    relative_path: str
    offset: int
    length: int
    transform_descriptors: Sequence[str] | None = None


_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED: dict[tuple[str, str], Any] = {
    (f"{_CHECKPOINT}.metadata", "Metadata"): _Metadata,
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"): _Index,
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): _Place,
    **{
        (f"{_CHECKPOINT}.metadata", name): _Record
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "StorageMeta",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    },
    # what the fields of these hold: sizes, dtypes, layouts, the folder's own name
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _Record,
    **{("torch", str(dtype)[6:]): _Record for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
    **{(module, name): _Record for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
}


# Python's own unpickler: the C one allocates a table as long as the largest index in the file.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DoconvError(f"found {module}.{name}")
        return _ALLOWED[module, name]


def read_distributed(folder: Path, unwrapper: Unwrapper) -> dict[str, Tensor]:
    """The model's tensors, whole. Where one of the names under which training scripts keep the model is in the
    folder, only what is under it is read; `unwrapper` notes what was taken and what was left out.

    Raises DoconvError: a metadata file with anything but metadata in it, damaged or missing shards.
    """
    metadata = _read_metadata(folder / METADATA_FILE)
    try:
        places = {(index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()}
        entries = _choose(_tree(metadata), unwrapper)
        under = unwrapper.selection.prefix  # what it leaves aside is not read
        state = {
            name: _assemble(folder, key, entry, places)
            for name, (key, entry) in entries.items()
            if isinstance(entry, _Tensor) and name.startswith(under)
        }
    except (AttributeError, TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise DoconvError(f"'{folder}': its {METADATA_FILE} does not add up ({error!r}); it is damaged.") from error
    unread = [name for name, (_, entry) in entries.items() if not isinstance(entry, _Tensor)]
    if unread:
        unwrapper.notes.append(f"left {len(unread)} pickled entries unread: {listed(unread)}")
    if under and (rest := [name for name in entries if name not in state and name not in unread]):
        unwrapper.notes.append(f"left {len(rest)} keys outside of '{under}': {listed(rest)}")
    return state


def _read_metadata(path: Path) -> _Metadata:
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except DoconvError as error:
        raise DoconvError(
            f"'{path}' holds more than a checkpoint's metadata, and unpickling that can run code; it was not opened: "
            f"{error}. Where you trust it, load the folder with torch.distributed.checkpoint yourself and save only "
            "model.state_dict()."
        ) from error
    except Exception as error:  # a damaged pickle raises many kinds
        raise DoconvError(f"'{path}' cannot be read ({type(error).__name__}: {error}); it is damaged.") from error
    if not isinstance(metadata, _Metadata):
        raise DoconvError(f"'{path}' is no metadata of {_CHECKPOINT}; it is damaged or another kind of file.")
    return metadata


Tree = dict[str, Any]


def _tree(metadata: _Metadata) -> Tree:
    """The saved dictionary's nesting, which the planner flattened; its leaves are (key in the folder, entry)."""
    tree: Tree = {}
    for key, entry in metadata.state_dict_metadata.items():
        *parents, name = path = (metadata.planner_data or {}).get(key, (key,))
        if not isinstance(key, str) or not all(isinstance(part, (str, int)) for part in path):
            raise TypeError("a key that is no text")
        node = tree
        for parent in parents:
            node = node.setdefault(str(parent), {})
        node[str(name)] = (key, entry)
    return tree


def _choose(tree: Tree, unwrapper: Unwrapper) -> dict[str, tuple[str, Any]]:
    """The model's part of what was saved, flat."""
    while True:
        nested = [name for name, value in tree.items() if isinstance(value, dict)]
        wrapper = unwrapper.choose(tree)
        if wrapper is None and nested and len(tree) == len(nested) and not unwrapper.selection.prefix:
            if len(nested) > 1:
                raise DoconvError(
                    f"'{unwrapper.path}' holds {', '.join(map(repr, nested))}; which is the model? Take it with "
                    f"`prefix` {nested[0]}., or save it under 'model', or alone."
                )
            wrapper = nested[0]
            unwrapper.notes.append(f"took '{wrapper}' of {listed(list(tree))}")
        if wrapper is None:
            unwrapper.finish(tree)
            return _flat(tree) if unwrapper.selection.prefix else {k: v for k, v in tree.items() if k not in nested}
        tree = tree[wrapper]


def _flat(tree: Tree) -> dict[str, tuple[str, Any]]:
    flat: dict[str, tuple[str, Any]] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": one for inner, one in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _assemble(folder: Path, key: str, entry: _Tensor, places: Mapping[tuple[str, tuple[int, ...]], _Place]) -> Tensor:
    """One tensor, put together from its shards."""
    size = tuple(map(int, entry.size))
    pieces = []
    for chunk in entry.chunks:
        offsets, sizes = tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes))
        piece = _read_piece(folder, key, places[key, offsets])
        if tuple(piece.shape) != sizes:
            raise DoconvError(f"'{folder}': a shard of '{key}' got shape {tuple(piece.shape)}, expected {sizes}.")
        pieces.append((tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True)), piece))
    held = sum(piece.numel() for _, piece in pieces)
    if not pieces or held != math.prod(size):
        raise DoconvError(
            f"'{folder}': the shards of '{key}' hold {held} values, expected {math.prod(size)} {size}; the checkpoint "
            "is incomplete: save it again, or go back to an earlier one."
        )
    whole = torch.empty(size, dtype=pieces[0][1].dtype)
    missing = torch.ones(size, dtype=torch.bool)
    for region, piece in pieces:
        whole[region] = piece
        missing[region] = False
    if missing.any():
        raise DoconvError(f"'{folder}': the shards of '{key}' overlap and leave holes; its {METADATA_FILE} is damaged.")
    return whole


def _read_piece(folder: Path, key: str, place: _Place) -> Tensor:
    name, offset, length = place.relative_path, int(place.offset), int(place.length)
    if Path(name).name != name:
        raise DoconvError(f"'{folder}': '{key}' is in '{name}', outside of the folder; it was not opened.")
    if place.transform_descriptors:
        what = ", ".join(map(str, place.transform_descriptors))
        raise DoconvError(f"'{folder}': '{name}' is stored with {what}, which is not read here; save it without.")
    try:
        with (folder / name).open("rb") as file:
            # first the size: Python allocates all that it is asked to read
            held = os.fstat(file.fileno()).st_size
            content = b""
            if 0 <= offset <= offset + length <= held:
                file.seek(offset)
                content = file.read(length)
    except OSError as error:
        raise DoconvError(
            f"'{folder}': the shard '{name}' cannot be read ({error.strerror}); copy the whole folder, every rank's."
        ) from error
    if len(content) != length:
        raise DoconvError(
            f"'{folder}': '{name}' ends after {held} bytes, expected at least {offset + length} for '{key}'; it is "
            "incomplete: copy or save it again."
        )
    with open_pickled(content, f"{folder}': '{key}' in '{name}") as (pickled, file):
        if not isinstance(pickled.root, StoredTensor):
            raise DoconvError(f"'{folder}': '{key}' in '{name}' is no dense tensor.")
        return pickled.tensor(file, pickled.root)
