"""Checkpoints into models and back: our own files (safetensors with a recipe), plain and foreign state dicts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from doconv_convert.artifacts.checkpoints.bounded import build_within
from doconv_convert.artifacts.checkpoints.foreign_keys import Unit, find_units, units_told
from doconv_convert.artifacts.checkpoints.prefixes import FORGIVEN, as_in_model, tied
from doconv_convert.artifacts.checkpoints.reading import Checkpoint, read_checkpoint
from doconv_convert.artifacts.checkpoints.recipe import (
    METADATA_KEY,
    Recipe,
    apply_recipe,
    may_be_factor,
    recipe_sites,
    sites_from_keys,
)
from doconv_convert.artifacts.sources.source import Source, parse_source
from doconv_convert.errors import DoconvError
from doconv_convert.files import FREE, atomic_write, require_safetensors
from doconv_convert.nn.composition import memory_format
from doconv_convert.nn.factors import refuse_shards
from doconv_convert.rewrite.foreign.authors import folded_authors_kernel, install_authors
from doconv_convert.rewrite.options import Options
from doconv_convert.words import listed

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def save(model: nn.Module, path: str | Path, *, source: Source | str | None = None) -> None:
    """Write `model`'s state dict and its recipe to `path` as safetensors, atomically; the same model gives the same
    bytes.

    `source` ("torchvision:resnet18", ...) lets `load` and the command line rebuild the model without being told.
    Raises UsageError for a path that does not end in .safetensors, DoconvError for a state that is not tensors, is on
    the meta device, or cannot be written.
    """
    require_safetensors(Path(path), "path")
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
    write_tensors(stored, recipe, Path(path))


def write_tensors(stored: dict[str, Tensor], recipe: Recipe, path: Path) -> None:
    """Write contiguous tensors on the CPU that share no memory, and their recipe, atomically. Raises DoconvError."""
    with atomic_write(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file(stored, temporary, metadata={METADATA_KEY: recipe.dump()})
        except SafetensorError as error:  # its words for what the operating system said
            raise DoconvError(f"cannot write '{path}': {error}; {FREE}") from error
        except KeyError as error:
            names = ", ".join(f"'{name}'" for name, tensor in stored.items() if tensor.dtype == error.args[0])
            raise DoconvError(f"{names}: tensors of {error.args[0]} cannot be stored as safetensors.") from error
        temporary.chmod(mode)  # safetensors makes private files (0600)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model that the file of ours at `path` holds, converted as its recipe says, on the CPU.

    `model`: the plain (or equally converted) network to put it into, changed in place; needed where the recipe
    has no source, or one whose code is only run when named. Raises DoconvError for a damaged or misfitting file.
    """
    checkpoint = read_checkpoint(path)
    if model is None:
        if checkpoint.recipe is None:
            raise DoconvError(f"'{path}' has no recipe; pass the network it belongs to: load(path, model=...).")
        model = build_within(checkpoint.recipe.trusted_source(str(path)), checkpoint.state, str(path))
    return load_into(model, checkpoint)


def load_into(model: nn.Module, checkpoint: Checkpoint, options: Options | None = None) -> nn.Module:
    """Convert the plain `model` as the checkpoint demands and load it strictly, in place, with the checkpoint's
    dtypes. Without a recipe the keys tell (`sites_from_keys`, where `options` names what was left out).

    Raises DoconvError for another architecture's file or a damaged one, before the first change."""
    checkpoint = fitted(checkpoint, model)
    path, recipe = checkpoint.path, checkpoint.recipe
    state = checkpoint.state | plain_tensors(checkpoint.units, model, path)
    _require_fit(model, state, path, plain=True)
    sites = recipe.sites if recipe else sites_from_keys(model, state, options or Options(), path)
    apply_recipe(model, sites, state, path)
    load_strictly(model, state, path)
    _install(checkpoint.units, model, path)
    for name in recipe.channels_last if recipe else ():
        tensor = model.state_dict(keep_vars=True).get(name)
        if tensor is None or tensor.dim() not in _CHANNELS_LAST:
            raise DoconvError(f"'{path}': its recipe has '{name}' in channels last, which cannot be; it is damaged.")
        tensor.data = tensor.data.contiguous(memory_format=_CHANNELS_LAST[tensor.dim()])
    return model


def fitted(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """The checkpoint without wrappers' prefixes, and with foreign DO-Conv layers that `model` has plain
    convolutions for as `units`. Raises DoconvError for damaged units."""
    if checkpoint.recipe is not None or checkpoint.units:
        return checkpoint
    own = model.state_dict().keys()
    checkpoint = as_in_model(checkpoint, model)
    units = find_units(checkpoint.state, checkpoint.path, own)
    units = tuple(unit for unit in units if unit.key("weight") in own)  # others are unexpected keys
    return with_units(checkpoint, units)


def plain_tensors(units: Sequence[Unit], model: nn.Module, path: str) -> dict[str, Tensor]:
    """Every unit's folded kernel in the shape that `model` has for it, cast once, and its bias.

    Raises DoconvError for a kernel or a group count that the model's convolution does not have.
    """
    made: dict[str, Tensor] = {}
    for unit in units:
        owner = model.get_submodule(unit.name)
        plain, groups = owner._parameters.get("weight"), getattr(owner, "groups", None)
        if plain is None or plain.dim() < 3 or plain.shape[2:].numel() != unit.positions:
            shape = None if plain is None else tuple(plain.shape)
            raise DoconvError(
                f"'{path}': the DO-Conv layer '{unit.name}' has {unit.positions} kernel positions, the model's "
                f"'weight' there {shape}; name the architecture it was trained with (`model`, `model_args`)."
            )
        if unit.groups is not None and groups is not None and unit.groups != groups:
            raise DoconvError(
                f"'{path}': the DO-Conv layer '{unit.name}' has {unit.groups} groups by its shapes, the model's "
                f"{groups}; name the architecture it was trained with (`model`, `model_args`)."
            )
        # a kernel that was folded already has its own height and width: another order is another shape
        made |= folded_tensors(unit, plain.shape[2:] if unit.d is not None or unit.positions == 1 else unit.w.shape[2:])
    return made


def folded_tensors(unit: Unit, size: Sequence[int]) -> dict[str, Tensor]:
    """A unit's `weight` and `bias` as an ordinary layer has them, composed in float64 and cast once to W's dtype."""
    kernel = folded_authors_kernel(unit.name, unit.w, unit.d, unit.identity, unit.mul)
    made = {unit.key("weight"): kernel.reshape(*kernel.shape[:2], *size).to(unit.w.dtype).contiguous()}
    if unit.bias is not None:
        exact = unit.bias.double() if unit.mul is None else unit.bias.double() * unit.mul.double()
        made[unit.key("bias")] = exact.to(unit.bias.dtype)
    return made


def with_units(checkpoint: Checkpoint, units: Sequence[Unit]) -> Checkpoint:
    """The checkpoint with the units' tensors taken out of its state."""
    used = {key for unit in units for key in unit.keys}
    state = {key: tensor for key, tensor in checkpoint.state.items() if key not in used}
    return replace(checkpoint, state=state, units=tuple(units), notes=(*checkpoint.notes, *units_told(units)))


def _install(units: Sequence[Unit], model: nn.Module, path: str) -> None:
    """Let the model compute its kernels by the authors' formula from the stored tensors: the unfolded truth."""
    first: dict[int, Unit] = {}
    for unit in units:
        owner = model.get_submodule(unit.name)
        known = first.setdefault(id(owner), unit)
        if known is not unit:
            if not _same(known, unit):
                raise DoconvError(f"'{path}': '{known.name}' and '{unit.name}' are one layer in the model, but differ.")
        elif unit.d is not None or unit.mul is not None:
            install_authors(owner, "weight", unit.w, unit.d, unit.identity, unit.bias, unit.mul)


def _same(a: Unit, b: Unit) -> bool:
    pairs = ((a.w, b.w), (a.d, b.d), (a.identity, b.identity), (a.bias, b.bias), (a.mul, b.mul))
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """`load_state_dict` with every difference named, in the state's dtypes. Raises DoconvError, first."""
    own = model.state_dict(keep_vars=True)
    state = {**state, **tied(state, own)}
    _require_fit(model, state, path)
    for name, tensor in own.items():
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    forgiven = {name: own[name] for name in own.keys() - state.keys() if name.endswith(FORGIVEN)}
    versioned = OrderedDict({**state, **forgiven})
    # Without the versions that `state_dict` gives to modules, torchvision's MNASNet refuses its own tensors.
    vars(versioned)["_metadata"] = vars(own)["_metadata"]
    model.load_state_dict(versioned, strict=True)


def _require_fit(model: nn.Module, state: Mapping[str, Tensor], path: str, *, plain: bool = False) -> None:
    """Raises DoconvError naming the keys that are missing, unexpected or of another shape.

    `plain`: `model` is still to be converted, so that keys which may belong to a D are no reason to refuse.
    """
    own = model.state_dict(keep_vars=True)
    state = {**state, **tied(state, own)}
    missing = [k for k in own if k not in state and not k.endswith(FORGIVEN)]
    unexpected = [k for k in state if k not in own and not (plain and may_be_factor(k, own))]
    misshapen = [
        f"'{k}' got {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    misshapen += [
        f"'{k}' got {state[k].dtype}, expected {own[k].dtype}"
        for k in own
        if k in state and _kind(state[k]) != _kind(own[k])
    ]
    if missing or unexpected or misshapen:
        parts = [
            f"{len(found)} {what}: {listed(found)}"
            for what, found in (
                ("missing", [f"'{k}'" for k in missing]),
                ("unexpected", [f"'{k}'" for k in unexpected]),
                ("of another shape or kind", misshapen),
            )
            if found
        ]
        raise DoconvError(
            f"'{path}' does not fit {type(model).__name__}: {'; '.join(parts)}. Name the architecture it was "
            "trained with (`model`, `model_args`)."
        )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _separate(stored: dict[str, Tensor]) -> None:
    seen: set[int] = set()
    for name, tensor in stored.items():
        pointer = tensor.untyped_storage().data_ptr()
        if tensor.numel() and pointer in seen:
            stored[name] = tensor.clone()
        seen.add(pointer)
