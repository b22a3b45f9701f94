"""Reading checkpoints: safetensors (one file or shards with an index), files of torch.save, distributed folders."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from doconv_convert.artifacts.checkpoints.distributed import read_distributed
from doconv_convert.artifacts.checkpoints.foreign_keys import Unit
from doconv_convert.artifacts.checkpoints.pickles import damaged, open_pickled, refused, with_modules
from doconv_convert.artifacts.checkpoints.places import find_place, read_index
from doconv_convert.artifacts.checkpoints.recipe import METADATA_KEY, Recipe
from doconv_convert.artifacts.checkpoints.records import StoredTensor, Stub
from doconv_convert.artifacts.checkpoints.unwrap import Selection, Unwrapper, under_prefix, unwrap
from doconv_convert.errors import DoconvError
from doconv_convert.words import listed

# Files of other frameworks, by how they begin.
_OTHER_KINDS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras, TensorFlow)",
    b"version https://git-lfs": "a pointer of Git LFS, without the file itself (git lfs pull)",
    b"<!DOCTYPE": "an HTML page, perhaps of a download that failed",
    b"<html": "an HTML page, perhaps of a download that failed",
    struct.pack("<Q", 0x112): "an MXNet parameter file",
}


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors (aliases expanded), its recipe if it is one of ours, and what was taken of it.

    `units` are foreign DO-Conv layers that were told by their keys; their tensors are no longer in `state`. `parts` are
    the names of several state dicts, which lead their keys.
    """

    path: str
    state: dict[str, Tensor]
    recipe: Recipe | None
    notes: tuple[str, ...] = ()
    selection: Selection = field(default_factory=Selection)
    units: tuple[Unit, ...] = ()
    parts: tuple[str, ...] = ()


def read_checkpoint(path: str | Path, selection: Selection | None = None) -> Checkpoint:
    """Read .safetensors, shards by their `.index.json`, a file of `torch.save` (.pt, .pth, .ckpt, .bin), of which
    nothing is run, a folder with one of them, or a folder of torch.distributed.checkpoint.

    `selection` says which of the file's tensors are meant. Raises DoconvError: not there, damaged, or no tensors.
    """
    name, selection = os.fspath(path), selection or Selection()
    unwrapper, place, recipe = Unwrapper(name, selection), find_place(Path(path)), None
    if place.note is not None:
        unwrapper.notes.append(place.note)
    if place.distributed:
        state = under_prefix(read_distributed(place.file, unwrapper), unwrapper)
    elif place.index:
        state = _selected(_read_shards(place.file), unwrapper)
    elif _is_pickle(str(place.file)):
        state = _read_pickle(place.file, unwrapper)
    else:
        state, recipe = _read_safetensors(str(place.file), unwrapper.notes)
        if recipe is not None and (selection.prefix or selection.ema):
            raise DoconvError(f"'{name}' is a file of ours, which is one whole model: leave out `prefix` and `ema`.")
        state = state if recipe else _selected(state, unwrapper)
    if not state:
        raise DoconvError(f"'{name}' holds no tensors.")
    return Checkpoint(name, state, recipe, tuple(unwrapper.notes), selection, parts=unwrapper.parts)


def require_finite(checkpoint: Checkpoint) -> None:
    """Raises DoconvError naming the tensors that hold NaN or infinite values."""
    bad = [
        f"'{name}' ({int((~torch.isfinite(t)).sum())} of {t.numel()})"
        for name, t in checkpoint.state.items()
        if (t.is_floating_point() or t.is_complex()) and not torch.isfinite(t).all()
    ]
    if bad:
        raise DoconvError(
            f"'{checkpoint.path}' has NaN or infinite values in {listed(bad)}; expected none. "
            "The training diverged or the file is damaged: go back to an earlier checkpoint."
        )


def _selected(state: dict[str, Tensor], unwrapper: Unwrapper) -> dict[str, Tensor]:
    unwrapper.finish(state)
    return under_prefix(state, unwrapper)


def _is_pickle(path: str) -> bool:
    """Whether torch.load is to read it; also where the end of a zip file is lost. Raises DoconvError for the files
    of other frameworks."""
    try:
        with open(path, "rb") as file:
            head = file.read(24)
    except OSError as error:
        raise DoconvError(f"'{path}' cannot be read ({error.strerror}); expected a checkpoint file.") from error
    for magic, kind in _OTHER_KINDS.items():
        if head.startswith(magic):
            raise DoconvError(f"'{path}' is {kind}; expected a PyTorch checkpoint: convert its tensors to one first.")
    # safetensors starts with its header's length, which may end in 0x80 like a pickle, and the header's brace
    return head[:2] == b"PK" or (head[:1] == b"\x80" and head[4:9] != b"\0\0\0\0{")


def _read_safetensors(path: str, notes: list[str] | None = None) -> tuple[dict[str, Tensor], Recipe | None]:
    _require_whole_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # safetensors and torch raise many kinds for a damaged header
        raise _not_safetensors(path, str(error)[:200]) from error
    recipe = Recipe.parse(metadata[METADATA_KEY], path) if METADATA_KEY in metadata else None
    if recipe is None:
        # what safetensors' save_model leaves out: the further names of a shared tensor
        aliases = {alias: name for alias, name in metadata.items() if name in state and alias not in state}
        state |= {alias: state[name] for alias, name in aliases.items()}
        if aliases and notes is not None:
            told = [f"'{alias}' is '{name}'" for alias, name in aliases.items()]
            notes.append(f"tensors stored once, by the file's own metadata: {listed(told)}")
    for alias, stored in recipe.aliases.items() if recipe else ():
        if stored not in state or alias in state:
            raise DoconvError(
                f"'{path}': by its recipe '{alias}' is stored as '{stored}' alone; the file has not that one only, it "
                "is damaged."
            )
    for alias, stored in recipe.aliases.items() if recipe else ():
        state[alias] = state[stored]
    return state, recipe


def _require_whole_header(path: str) -> None:
    """Raises DoconvError where the header claims to be longer than the file, before anything is allocated for it."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(8)
    claimed = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if len(head) < 8 or claimed > size - 8:
        raise _not_safetensors(path, f"its header claims {claimed} bytes, the file has {max(0, size - 8)} for it")


def _not_safetensors(path: str, reason: str) -> DoconvError:
    return DoconvError(
        f"'{path}' cannot be read as safetensors ({reason}); it is damaged, incomplete or another kind of file: copy "
        "or save it again."
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of every shard that an index lists. Raises DoconvError where a shard or a key is missing."""
    state: dict[str, Tensor] = {}
    weight_map = read_index(index)
    for name in dict.fromkeys(weight_map.values()):
        shard = index.parent / name
        if not shard.is_file():
            raise DoconvError(f"'{index}' names the shard '{name}', which is not there; copy the whole folder.")
        held = _read_shard(shard)
        expected = {key for key, file in weight_map.items() if file == name}
        if lost := expected - held.keys():
            raise DoconvError(f"'{shard}' lacks {listed(sorted(lost))}, which the index places in it; it is damaged.")
        if more := held.keys() - expected:
            raise DoconvError(f"'{shard}' holds {listed(sorted(more))}, which the index does not list; it is damaged.")
        state |= held
    return {key: state[key] for key in weight_map}


def _read_shard(shard: Path) -> dict[str, Tensor]:
    if _is_pickle(str(shard)):
        return _read_pickle(shard, Unwrapper(str(shard), Selection()))
    return _read_safetensors(str(shard))[0]


def _read_pickle(path: Path, unwrapper: Unwrapper) -> dict[str, Tensor]:
    with open_pickled(path, str(path)) as (pickled, file):
        try:
            content = with_modules(pickled.root, unwrapper.notes)
        except ValueError as error:
            raise damaged(str(path), error) from error
        if isinstance(content, Stub):
            raise refused(str(path), f"holds more than tensors, a '{content.of[:80]}'", pickled.others)
        if not isinstance(content, Mapping):
            kind = "Tensor" if isinstance(content, StoredTensor) else type(content).__name__
            raise DoconvError(f"'{path}' holds a {kind}, expected a state dict; save model.state_dict().")
        state = unwrap(content, unwrapper, lambda value: isinstance(value, StoredTensor))
        other = [key for key, value in state.items() if not isinstance(value, StoredTensor)]
        if other:
            raise DoconvError(
                f"'{path}': '{other[0][:80]}' is {_kind(state[other[0]])}, expected tensors only; save "
                "model.state_dict(), or take the model's part with `prefix`."
            )
        if pickled.others:
            unwrapper.notes.append(f"left out, and not run: {listed(pickled.others)}")
        try:
            return {key: pickled.tensor(file, value) for key, value in state.items()}
        except (ValueError, RuntimeError) as error:
            raise damaged(str(path), error) from error


# What torch.save makes of tensors that are no dense ones.
_ODD_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor (save its to_dense())",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without values (meta)",
    "torch._utils._rebuild_qtensor": "a tensor that is quantized",
}


def _kind(value: Any) -> str:
    if isinstance(value, Stub):
        return _ODD_TENSORS.get(value.of, f"a {value.of[:80]}")
    return f"a {type(value).__name__}"
