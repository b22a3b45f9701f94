"""Folders of torch.distributed.checkpoint, read without a process group and without running what is in them.

`.metadata` is a pickle, which torch itself reads with `pickle.load`. Here the few classes that such a file names
become inert records; any other name is refused before it is looked up. The tensors' shards are slices of the
`.distcp` files, read with `weights_only=True`. Entries that are pickled objects are never read.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from doconv_convert.errors import DoconvError

METADATA_FILE = ".metadata"
_SHOWN = 5


class _Record:
    """Stands for any class of the metadata: its attributes, or what it was called with, and no behaviour."""

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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DoconvError(f"found {module}.{name}")
        return _ALLOWED[module, name]


def is_distributed(path: Path) -> bool:
    return (path / METADATA_FILE).is_file()


def read_distributed(folder: Path, wrappers: Sequence[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The model's tensors, whole, and remarks on what was left out.

    `wrappers`: the names under which training scripts keep the model beside other things; where one of them is in
    the folder, only what is under it is read.

    Raises DoconvError: a metadata file with anything but metadata in it, damaged or missing shards.
    """
    metadata = _read_metadata(folder / METADATA_FILE)
    try:
        places = {(index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()}
        entries, notes = _choose(_tree(metadata), wrappers, folder)
        state = {
            name: _assemble(folder, key, entry, places)
            for name, (key, entry) in entries.items()
            if isinstance(entry, _Tensor)
        }
    except (AttributeError, TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise DoconvError(f"'{folder}': its {METADATA_FILE} does not add up ({error!r}); it is damaged.") from error
    unread = [name for name in entries if name not in state]
    if unread:
        more = ", ..." if len(unread) > _SHOWN else ""
        notes.append(f"left {len(unread)} pickled entries unread: {', '.join(unread[:_SHOWN])}{more}")
    return state, tuple(notes)


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
        *parents, name = (metadata.planner_data or {}).get(key, (key,))
        node = tree
        for parent in parents:
            node = node.setdefault(str(parent), {})
        node[str(name)] = (str(key), entry)
    return tree


def _choose(tree: Tree, wrappers: Sequence[str], folder: Path) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """The model's part of what was saved, flat, and remarks."""
    notes: list[str] = []
    while True:
        nested = [name for name, value in tree.items() if isinstance(value, dict)]
        wrapper = next((name for name in wrappers if name in nested), None)
        if wrapper is None and nested and len(tree) == len(nested):
            if len(nested) > 1:
                raise DoconvError(
                    f"'{folder}' holds {', '.join(map(repr, nested))}; which is the model? Save it under 'model', or "
                    "alone."
                )
            wrapper = nested[0]
        if wrapper is None:
            return {name: value for name, value in tree.items() if name not in nested}, notes
        notes.append(f"took '{wrapper}' of {', '.join(tree)}")
        tree = tree[wrapper]


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
            file.seek(offset)
            content = file.read(length)
    except OSError as error:
        raise DoconvError(
            f"'{folder}': the shard '{name}' cannot be read ({error.strerror}); copy the whole folder, every rank's."
        ) from error
    if len(content) != length:
        raise DoconvError(
            f"'{folder}': '{name}' ends after {offset + len(content)} bytes, expected at least {offset + length} for "
            f"'{key}'; it is incomplete: copy or save it again."
        )
    try:
        piece = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file, and for more than tensors
        reason = str(error).splitlines()[0]
        raise DoconvError(
            f"'{folder}': '{key}' in '{name}' cannot be read ({type(error).__name__}: {reason}); it is damaged."
        ) from error
    if not isinstance(piece, Tensor):
        raise DoconvError(f"'{folder}': '{key}' in '{name}' is a {type(piece).__name__}, expected a tensor.")
    return piece
