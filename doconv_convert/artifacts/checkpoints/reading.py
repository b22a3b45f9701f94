"""Reading checkpoints: safetensors (one file or shards with an index), pickled tensors, distributed folders."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from doconv_convert.artifacts.checkpoints.distributed import is_distributed, read_distributed
from doconv_convert.artifacts.checkpoints.foreign_keys import Unit
from doconv_convert.artifacts.checkpoints.pickles import load_tensors
from doconv_convert.artifacts.checkpoints.recipe import METADATA_KEY, Recipe
from doconv_convert.artifacts.checkpoints.unwrap import Selection, Unwrapper, under_prefix, unwrap
from doconv_convert.errors import DoconvError
from doconv_convert.words import listed

INDEX_SUFFIX = ".index.json"
# Files of other frameworks, by how they begin.
_OTHER_KINDS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file (Keras, TensorFlow)",
    struct.pack("<Q", 0x112): "an MXNet parameter file",
}


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors (aliases expanded), its recipe if it is one of ours, and what was taken of it.

    `units` are foreign DO-Conv layers that were told by their keys; their tensors are no longer in `state`.
    """

    path: str
    state: dict[str, Tensor]
    recipe: Recipe | None
    notes: tuple[str, ...] = ()
    selection: Selection = field(default_factory=Selection)
    units: tuple[Unit, ...] = ()


def read_checkpoint(path: str | Path, selection: Selection | None = None) -> Checkpoint:
    """Read .safetensors, shards by their `.index.json` (or the folder with it), a pickled state dict (.pt, .pth,
    .ckpt, .bin) with `weights_only=True`, or a folder of torch.distributed.checkpoint.

    `selection` says which of the file's tensors are meant. Raises DoconvError: not there, damaged, a pickle with
    more than tensors in it, or no tensors.
    """
    name, place, selection = os.fspath(path), Path(path), selection or Selection()
    index = _index_of(place)
    unwrapper = Unwrapper(name, selection)
    recipe = None
    if is_distributed(place):
        state = under_prefix(read_distributed(place, unwrapper), unwrapper)
    elif index is not None:
        state = _selected(_read_shards(index), unwrapper)
    elif not place.is_file():
        raise DoconvError(f"'{name}' is no file; expected a checkpoint (.safetensors, .pt, .pth).")
    elif _is_pickle(name):
        state = _read_pickle(place, unwrapper)
    else:
        state, recipe = _read_safetensors(name)
        if recipe is not None and (selection.prefix or selection.ema):
            raise DoconvError(f"'{name}' is a file of ours, which is one whole model: leave out `prefix` and `ema`.")
        state = state if recipe else _selected(state, unwrapper)
    if not state:
        raise DoconvError(f"'{name}' holds no tensors.")
    return Checkpoint(name, state, recipe, tuple(unwrapper.notes), selection)


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
            head = file.read(9)
    except OSError as error:
        raise DoconvError(f"'{path}' cannot be read ({error.strerror}); expected a checkpoint file.") from error
    for magic, kind in _OTHER_KINDS.items():
        if head.startswith(magic):
            raise DoconvError(f"'{path}' is {kind}; expected a PyTorch checkpoint: convert its tensors to one first.")
    # safetensors starts with its header's length, which may end in 0x80 like a pickle, and the header's brace
    return head[:2] == b"PK" or (head[:1] == b"\x80" and head[4:] != b"\0\0\0\0{")


def _read_safetensors(path: str) -> tuple[dict[str, Tensor], Recipe | None]:
    _require_whole_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # safetensors and torch raise many kinds for a damaged header
        raise _not_safetensors(path, str(error)[:200]) from error
    recipe = Recipe.parse(metadata[METADATA_KEY], path) if METADATA_KEY in metadata else None
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


def _index_of(place: Path) -> Path | None:
    """The index of shards that `place` is, or the only one in the folder that it is."""
    if place.is_dir():
        found = sorted(place.glob(f"*{INDEX_SUFFIX}"))
        if len(found) > 1:
            raise DoconvError(
                f"'{place}' has several indices ({listed([one.name for one in found])}); name one of them."
            )
        return found[0] if found else None
    return place if place.name.endswith(INDEX_SUFFIX) and place.is_file() else None


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of every shard that an index (`{"weight_map": {key: file}}`) lists.

    Raises DoconvError where a shard or a key is missing, or a name points out of the folder.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("its weight_map is no map from keys to files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DoconvError(f"'{index}' cannot be read as an index of shards ({error!r:.200}); it is damaged.") from error
    state: dict[str, Tensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        shard = index.parent / name
        if Path(name).name != name:
            raise DoconvError(f"'{index}' names the shard '{name}', outside of its folder; it was not opened.")
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
    content: Any = load_tensors(path, str(path))
    if not isinstance(content, Mapping):
        raise DoconvError(f"'{path}' holds a {type(content).__name__}, expected a state dict; save model.state_dict().")
    state = unwrap(content, unwrapper)
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if len(other) == len(state) > 1 and all(isinstance(value, Mapping) for value in state.values()):
        raise DoconvError(
            f"'{path}' holds several dictionaries ({listed(list(state))}); take one of them: `prefix` {other[0]}."
        )
    if other:
        kind = type(state[other[0]]).__name__
        raise DoconvError(
            f"'{path}': '{other[0][:80]}' is a {kind}, expected tensors only; save model.state_dict(), or take the "
            "model's part with `prefix`."
        )
    return state
