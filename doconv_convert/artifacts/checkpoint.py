"""Checkpoints: our own (safetensors with a recipe) written and read, plain state dicts read."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from doconv_convert.artifacts.distributed import is_distributed, read_distributed
from doconv_convert.artifacts.files import atomic_write
from doconv_convert.artifacts.recipe import (
    METADATA_KEY,
    Recipe,
    apply_recipe,
    may_be_factor,
    recipe_sites,
    sites_from_keys,
)
from doconv_convert.artifacts.sources import Source, build, parse_source
from doconv_convert.errors import DoconvError
from doconv_convert.nn.composition import memory_format
from doconv_convert.nn.stored import refuse_shards
from doconv_convert.rewrite.sites import Options

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
# Absent from files older than torch 0.4.1; torch itself fills it in, in strict loads too.
_FORGIVEN = "num_batches_tracked"
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# What torch.optim.swa_utils.AveragedModel counts beside the averaged weights.
_AVERAGED = "n_averaged"
_SHOWN = 5


@dataclass(frozen=True)
class Checkpoint:
    """A file's tensors (aliases expanded), its recipe if it is one of ours, and what was unwrapped."""

    path: str
    state: dict[str, Tensor]
    recipe: Recipe | None
    notes: tuple[str, ...] = ()


def save(model: nn.Module, path: str | Path, *, source: Source | str | None = None) -> None:
    """Write `model`'s state dict and its recipe as safetensors, atomically; the same model gives the same bytes.

    `source` ("torchvision:resnet18", ...) lets `load` and the command line rebuild the model without being told.
    Raises DoconvError for a state that is not tensors, is on the meta device, or cannot be written.
    """
    refuse_shards(model, "save it with torch.distributed.checkpoint")
    source = parse_source(source) if isinstance(source, str) else source
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    channels_last = []
    first_name: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            got = "a tensor on the meta device" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise DoconvError(f"'{name}' is {got}, expected a tensor with values; it cannot be stored.")
        if id(tensor) in first_name:
            aliases[name] = first_name[id(tensor)]
            continue
        first_name[id(tensor)] = name
        if memory_format(tensor) is not torch.contiguous_format:
            channels_last.append(name)
        # a copy where two tensors are views of one storage: safetensors stores each value once
        stored[name] = tensor.detach().cpu().contiguous()
    _separate(stored)
    recipe = Recipe(recipe_sites(model), source, aliases, tuple(channels_last))
    with atomic_write(Path(path)) as temporary:
        mode = temporary.stat().st_mode
        save_file(stored, temporary, metadata={METADATA_KEY: recipe.dump()})
        temporary.chmod(mode)  # safetensors makes private files (0600)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model a file of ours holds, converted as its recipe says, on the CPU.

    `model`: the plain (or equally converted) network to put it into, changed in place; needed where the recipe
    has no source, or one whose code is only run when named. Raises DoconvError for a damaged or misfitting file.
    """
    checkpoint = read_checkpoint(path)
    if model is None:
        if checkpoint.recipe is None:
            raise DoconvError(f"'{path}' has no recipe; pass the network it belongs to: load(path, model=...).")
        model = build(checkpoint.recipe.trusted_source(str(path)))
    return load_into(model, checkpoint)


def load_into(model: nn.Module, checkpoint: Checkpoint, options: Options | None = None) -> nn.Module:
    """Convert the plain `model` as the checkpoint demands and load it strictly, in place, with the checkpoint's
    dtypes. Without a recipe the keys tell (`sites_from_keys`, where `options` names what was left out).

    Raises DoconvError for another architecture's file or a damaged one, before the first change."""
    checkpoint = without_prefixes(checkpoint, model)
    state, path, recipe = checkpoint.state, checkpoint.path, checkpoint.recipe
    _require_fit(model, state, path, plain=True)
    sites = recipe.sites if recipe else sites_from_keys(model, state, options or Options(), path)
    apply_recipe(model, sites, state, path)
    load_strictly(model, state, path)
    for name in recipe.channels_last if recipe else ():
        tensor = model.state_dict(keep_vars=True).get(name)
        if tensor is None or tensor.dim() not in _CHANNELS_LAST:
            raise DoconvError(f"'{path}': its recipe has '{name}' in channels last, which cannot be; it is damaged.")
        tensor.data = tensor.data.contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])
    return model


def without_prefixes(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """The checkpoint without the prefixes that wrappers (DDP, torch.compile, Lightning) put before every key.

    Only where no key fits `model` as it is: a network may have a child named `model` of its own.
    """
    own, state, notes = model.state_dict().keys(), checkpoint.state, list(checkpoint.notes)
    if _AVERAGED in state and _AVERAGED not in own:
        state = {key: value for key, value in state.items() if key != _AVERAGED}
        notes.append(f"took the averaged weights (there is an '{_AVERAGED}')")
    while not own & state.keys():
        prefix = next((one for one in _PREFIXES if all(key.startswith(one) for key in state)), None)
        if prefix is None:
            return checkpoint
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        notes.append(f"stripped '{prefix}' from every key")
    return replace(checkpoint, state=state, notes=tuple(notes))


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """`load_state_dict` with every difference named, in the state's dtypes. Raises DoconvError, first."""
    _require_fit(model, state, path)
    own = model.state_dict(keep_vars=True)
    for name, tensor in own.items():
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    forgiven = {name: own[name] for name in own.keys() - state.keys() if name.endswith(_FORGIVEN)}
    versioned = OrderedDict({**state, **forgiven})
    # Without the versions that `state_dict` gives to modules, torchvision's MNASNet refuses its own tensors.
    vars(versioned)["_metadata"] = vars(own)["_metadata"]
    model.load_state_dict(versioned, strict=True)


def _require_fit(model: nn.Module, state: Mapping[str, Tensor], path: str, *, plain: bool = False) -> None:
    """Raises DoconvError naming the keys that are missing, unexpected or of another shape.

    `plain`: `model` is still to be converted, so that keys which may belong to a D are no reason to refuse.
    """
    own = model.state_dict(keep_vars=True)
    missing = [k for k in own if k not in state and not k.endswith(_FORGIVEN)]
    unexpected = [k for k in state if k not in own and not (plain and may_be_factor(k, own))]
    misshapen = [
        f"'{k}' got {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if missing or unexpected or misshapen:
        parts = [
            f"{len(found)} {what}: {', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''}"
            for what, found in (
                ("missing", [f"'{k}'" for k in missing]),
                ("unexpected", [f"'{k}'" for k in unexpected]),
                ("of another shape", misshapen),
            )
            if found
        ]
        raise DoconvError(
            f"'{path}' does not fit {type(model).__name__}: {'; '.join(parts)}. Name the architecture it was "
            "trained with (--model, --model-args)."
        )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read .safetensors, a pickled state dict (.pt, .pth, ...) with `weights_only=True`, or a folder of
    torch.distributed.checkpoint.

    Raises DoconvError: not there, damaged, a pickle with more than tensors in it, or no tensors.
    """
    name = os.fspath(path)
    if is_distributed(Path(path)):
        state, notes = read_distributed(Path(path), _WRAPPERS)
        checkpoint = Checkpoint(name, state, None, notes)
    elif not Path(path).is_file():
        raise DoconvError(f"'{name}' is no file; expected a checkpoint (.safetensors, .pt, .pth).")
    elif _is_pickle(name):
        state, notes = _read_pickle(name)
        checkpoint = Checkpoint(name, state, None, notes)
    else:
        checkpoint = _read_safetensors(name)
    if not checkpoint.state:
        raise DoconvError(f"'{name}' holds no tensors.")
    return checkpoint


def require_finite(checkpoint: Checkpoint) -> None:
    """Raises DoconvError naming the tensors that hold NaN or infinite values."""
    bad = [
        f"'{name}' ({int((~torch.isfinite(t)).sum())} of {t.numel()})"
        for name, t in checkpoint.state.items()
        if t.is_floating_point() and not torch.isfinite(t).all()
    ]
    if bad:
        more = ", ..." if len(bad) > _SHOWN else ""
        raise DoconvError(
            f"'{checkpoint.path}' has NaN or infinite values in {', '.join(bad[:_SHOWN])}{more}; expected none. "
            "The training diverged or the file is damaged: go back to an earlier checkpoint."
        )


def _is_pickle(path: str) -> bool:
    """Whether torch.load is to read it; also where the end of a zip file is lost."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise DoconvError(f"'{path}' cannot be read ({error.strerror}); expected a checkpoint file.") from error
    # safetensors starts with its header's length, which may end in 0x80 like a pickle, and the header's brace
    return head[:2] == b"PK" or (head[:1] == b"\x80" and head[4:] != b"\0\0\0\0{")


def _read_safetensors(path: str) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except Exception as error:  # safetensors and torch raise many kinds for a damaged header
        raise DoconvError(
            f"'{path}' cannot be read as safetensors ({error}); it is damaged, incomplete or another kind of file: "
            "copy or save it again."
        ) from error
    recipe = Recipe.parse(metadata[METADATA_KEY], path) if METADATA_KEY in metadata else None
    for alias, stored in recipe.aliases.items() if recipe else ():
        if stored not in state or alias in state:
            raise DoconvError(
                f"'{path}': by its recipe '{alias}' is stored as '{stored}' alone; the file has not that one only, it "
                "is damaged."
            )
    for alias, stored in recipe.aliases.items() if recipe else ():
        state[alias] = state[stored]
    return Checkpoint(path, state, recipe)


def _read_pickle(path: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = ", ".join(sorted(_foreign_globals(path))[:_SHOWN]) or str(error).splitlines()[0]
        raise DoconvError(
            f"'{path}' holds more than tensors, and unpickling that can run code; it was not opened. Found: {found}. "
            "Where you trust it, load it yourself and save only model.state_dict()."
        ) from error
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise DoconvError(f"'{path}' cannot be read ({type(error).__name__}: {error}); it is damaged.") from error
    notes = []
    # a state dict's values are tensors, so a dict under one of these names is what was wrapped
    while isinstance(content, Mapping) and (
        wrapper := next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
    ):
        notes.append(f"took '{wrapper}' of {', '.join(map(str, content))}")
        content = content[wrapper]
    if not isinstance(content, Mapping):
        raise DoconvError(f"'{path}' holds a {type(content).__name__}, expected a state dict; save model.state_dict().")
    state = {str(key): value for key, value in content.items()}
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        kind = type(state[other[0]]).__name__
        raise DoconvError(f"'{path}': '{other[0]}' is a {kind}, expected tensors only; save model.state_dict().")
    return state, tuple(notes)


def _foreign_globals(path: str) -> list[str]:
    try:
        return [str(name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)]
    except Exception:  # only names for a message; formats older than torch 1.6 have none to give
        return []


def _separate(stored: dict[str, Tensor]) -> None:
    seen: set[int] = set()
    for name, tensor in stored.items():
        pointer = tensor.untyped_storage().data_ptr()
        if tensor.numel() and pointer in seen:
            stored[name] = tensor.clone()
        seen.add(pointer)
