"""Where a checkpoint's tensors lie: one file, shards with an index, or a folder that a trainer left. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from doconv_convert.errors import DoconvError
from doconv_convert.words import listed

INDEX_SUFFIX = ".index.json"
METADATA_FILE = ".metadata"
# An index has a line for each tensor.
_INDEX_BYTES = 2**28
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pth", ".pt")
# What trainers keep beside the weights (transformers, accelerate, DeepSpeed): by how its name begins.
_OTHER_STATE = (
    "optimizer",
    "scheduler",
    "scaler",
    "sampler",
    "training_args",
    "random_states",
    "rng_state",
    "dl_state",
)


@dataclass(frozen=True)
class Place:
    """What to open: a `file`, which may be an `index` of shards, or a folder of torch.distributed.checkpoint. `note`
    says what was found in a folder."""

    file: Path
    index: bool = False
    distributed: bool = False
    note: str | None = None


def find_place(path: Path) -> Place:
    """What the tensors of a checkpoint are to be read from.

    Raises DoconvError for a folder with several models, or none, saying which file or folder to name, and for a path
    that is not there.
    """
    if not path.is_dir():
        if not path.is_file():
            raise DoconvError(f"'{path}' is no file; expected a checkpoint (.safetensors, .pt, .pth).")
        return Place(path, index=path.name.endswith(INDEX_SUFFIX))
    if (path / METADATA_FILE).is_file():
        return Place(path, distributed=True)
    names = sorted(one.name for one in path.iterdir() if one.is_file())
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    weights = _weights(names)
    if len(indices) > 1:
        raise DoconvError(f"'{path}' has several indices ({listed(indices)}); name one of them.")
    if indices:
        # shards are named NAME-00001-of-00002; a whole model beside them is another one
        whole = [name for name in weights if name == indices[0].removesuffix(INDEX_SUFFIX)]
        if whole:
            raise DoconvError(f"'{path}' has a whole model and shards ({whole[0]}, {indices[0]}); name one of them.")
        return Place(path / indices[0], index=True, note=f"took the shards of '{indices[0]}'")
    if len(weights) > 1:
        raise DoconvError(f"'{path}' has several checkpoints ({listed(weights)}); name one of them.")
    if weights:
        return Place(path / weights[0], note=f"took '{weights[0]}' of the folder")
    raise _no_weights(path)


def checkpoint_files(path: Path) -> list[Path]:
    """Every file that reading the checkpoint at `path` opens, as far as it is there; [] where it cannot be told."""
    try:
        place = find_place(path)
        if place.distributed:
            return [path / METADATA_FILE, *sorted(path.glob("*.distcp"))]
        if place.index:
            return [place.file, *(place.file.parent / name for name in dict.fromkeys(read_index(place.file).values()))]
    except DoconvError:
        return [path] if path.is_file() else []
    return [place.file]


def read_index(index: Path) -> dict[str, str]:
    """{key: shard} of an index (`{"weight_map": {key: file}}`).

    Raises DoconvError where it is damaged, or a name points out of its folder."""
    try:
        if index.stat().st_size > _INDEX_BYTES:
            raise ValueError(f"it has {index.stat().st_size} bytes")
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("its weight_map is no map from keys to files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DoconvError(f"'{index}' cannot be read as an index of shards ({error!r:.200}); it is damaged.") from error
    for name in weight_map.values():
        if Path(name).name != name:
            raise DoconvError(f"'{index}' names the shard '{name}', outside of its folder; it was not opened.")
    return dict(weight_map)


def _weights(names: list[str]) -> list[str]:
    """The weight files among a folder's; of one model in two formats, as save_pretrained leaves it, the safetensors."""
    found = [name for name in names if name.endswith(_WEIGHTS) and not name.startswith(_OTHER_STATE)]
    kinds = [[name for name in found if name.endswith(kind)] for kind in (".safetensors", ".bin")]
    if len(kinds[0]) == 1 and len(kinds[1]) == 1 and len(found) == 2:
        return kinds[0]
    return found


def _no_weights(path: Path) -> DoconvError:
    """What a folder without a model of its own holds: models in folders, as a diffusers pipeline or a Trainer."""
    inner = sorted(
        folder.name
        for folder in path.iterdir()
        if folder.is_dir()
        and ((folder / METADATA_FILE).is_file() or _weights([one.name for one in folder.iterdir() if one.is_file()]))
    )
    if inner:
        return DoconvError(
            f"'{path}' holds models in folders of their own ({listed(inner)}); name one of them: '{path / inner[0]}'."
        )
    return DoconvError(
        f"'{path}' is a folder without weights; expected model.safetensors, shards with an index, or what "
        "torch.distributed.checkpoint writes."
    )
