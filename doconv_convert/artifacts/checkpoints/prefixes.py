"""The names that a file's keys have in a model: without what wrappers put into them, under the prefix that fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import replace

from torch import Tensor, nn

from doconv_convert.artifacts.checkpoints.foreign_keys import names_when_folded
from doconv_convert.artifacts.checkpoints.reading import Checkpoint
from doconv_convert.artifacts.checkpoints.unwrap import AVERAGED
from doconv_convert.errors import DoconvError
from doconv_convert.words import counted, listed

# What DDP, torch.compile, FSDP and activation checkpointing put between a module's name and its children's.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_PREFIXES = ("module.", "_orig_mod.", "model.")
# Absent from files older than torch 0.4.1; torch itself fills it in, in strict loads too.
FORGIVEN = "num_batches_tracked"
# So many keys of a model, or all, tell which keys of a file are its own.
_NAMED_IN_ERRORS = 5


def as_in_model(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """The checkpoint with the keys that `model` has: without wrappers' names, and of the keys under one prefix those
    alone, where no other prefix fits. `notes` say what was taken and left.

    Where nothing fits all of the model, only wrappers' prefixes are gone. Raises DoconvError where several prefixes
    fit, and for several state dicts of which none fits.
    """
    own = model.state_dict(keep_vars=True)
    checkpoint = _without_counter(checkpoint, own)
    plain = {key: key for key in checkpoint.state}
    for renamed in (plain, _without_wrappers(checkpoint.state, own.keys())):
        if len(set(renamed.values())) < len(renamed):
            continue  # two keys would be one
        named = {renamed[key]: tensor for key, tensor in checkpoint.state.items()}
        prefixes = fitting_prefixes(named, own)
        if prefixes:
            prefix = _only(prefixes, checkpoint, model)
            return _taken(checkpoint, renamed, prefix)
    if checkpoint.parts:
        raise DoconvError(
            f"'{checkpoint.path}' holds several state dicts ({listed(checkpoint.parts)}), and none fits "
            f"{type(model).__name__}; take one of them: `prefix` {checkpoint.parts[0]}."
        )
    return without_prefixes(checkpoint, own.keys())


def without_prefixes(checkpoint: Checkpoint, own: Set[str] | None = None) -> Checkpoint:
    """The checkpoint without the prefixes that wrappers (DDP, torch.compile, Lightning) put before every key.

    Only where no key fits the model's `own` (known or not): a network may have a child named `model` of its own.
    Raises DoconvError for several state dicts where no model says which.
    """
    if own is None and checkpoint.parts:
        raise DoconvError(
            f"'{checkpoint.path}' holds several state dicts ({listed(checkpoint.parts)}); take one of them: `prefix` "
            f"{checkpoint.parts[0]}."
        )
    checkpoint = _without_counter(checkpoint, own or ())
    state, notes = checkpoint.state, list(checkpoint.notes)
    kept = checkpoint
    while own is None or not own & names_when_folded(state):
        prefix = next((one for one in _PREFIXES if all(key.startswith(one) for key in state)), None)
        if prefix is None or not state:
            return kept if own is not None else replace(checkpoint, state=state, notes=tuple(notes))
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        notes.append(f"stripped '{prefix}' from every key")
    return replace(checkpoint, state=state, notes=tuple(notes))


def fitting_prefixes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Every prefix under which the state has all that a model with the entries `own` needs; [""] where its own names
    do. Of tensors that the model shares, one name is enough. Shapes decide only between prefixes."""
    names = names_when_folded(state)
    shared: dict[int, list[str]] = {}
    for name, tensor in own.items():
        if not name.endswith(FORGIVEN):
            shared.setdefault(id(tensor), []).append(name)
    if not shared:
        return [""]
    anchors = max(shared.values(), key=lambda group: len(group[0]))
    in_order = [*state, *sorted(names - state.keys())]
    candidates = dict.fromkeys(
        name.removesuffix(anchor) for name in in_order for anchor in anchors if f".{name}".endswith(f".{anchor}")
    )
    fitting = [
        one for one in candidates if all(any(one + name in names for name in group) for group in shared.values())
    ]
    if "" in fitting or len(fitting) < 2:
        return [""] if "" in fitting else fitting
    same = [one for one in fitting if all(state.get(one + k, t).shape == t.shape for k, t in own.items())]
    return same or fitting


def tied(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the state lacks of tensors that the model shares between several names and of which it has one: savers store
    those once."""
    groups: dict[int, list[str]] = {}
    for name, tensor in own.items():
        groups.setdefault(id(tensor), []).append(name)
    found: dict[str, Tensor] = {}
    for names in groups.values():
        held = next((name for name in names if name in state), None)
        if held is not None:
            found |= {name: state[held] for name in names if name not in state}
    return found


def _only(prefixes: list[str], checkpoint: Checkpoint, model: nn.Module) -> str:
    if len(prefixes) > 1:
        options = ", ".join(f"`prefix` {one}" for one in prefixes[:_NAMED_IN_ERRORS])
        raise DoconvError(
            f"'{checkpoint.path}' holds {len(prefixes)} parts that fit {type(model).__name__}; say which one: {options}"
        )
    return prefixes[0]


def _taken(checkpoint: Checkpoint, renamed: Mapping[str, str], prefix: str) -> Checkpoint:
    """The keys under the prefix, without it; what was done to them, in words."""
    notes = list(checkpoint.notes)
    for wrapper in _WRAPPERS:
        changed = [
            key for key, name in renamed.items() if key.split(".").count(wrapper) > name.split(".").count(wrapper)
        ]
        if changed and len(changed) == len(renamed) and all(key.startswith(f"{wrapper}.") for key in changed):
            notes.append(f"stripped '{wrapper}.' from every key")
        elif changed:
            notes.append(f"stripped '{wrapper}.' from {counted(len(changed), 'key')}, which the model does not have")
    state, rest = {}, []
    for key, name in renamed.items():
        if name.startswith(prefix):
            state[name.removeprefix(prefix)] = checkpoint.state[key]
        else:
            rest.append(name)
    if prefix and not rest:
        notes.append(f"stripped '{prefix}' from every key")
    elif prefix:
        notes.append(
            f"took the {counted(len(state), 'key')} under '{prefix}', the only prefix that fits the model; left "
            f"{len(rest)}: {listed(rest)}"
        )
    return replace(checkpoint, state=state, notes=tuple(notes), parts=())


def _without_counter(checkpoint: Checkpoint, own: Collection[str]) -> Checkpoint:
    """Without what torch's AveragedModel counts beside the averaged weights."""
    if AVERAGED not in checkpoint.state or AVERAGED in own:
        return checkpoint
    state = {key: value for key, value in checkpoint.state.items() if key != AVERAGED}
    note = f"took the averaged weights (there is an '{AVERAGED}')"
    return replace(checkpoint, state=state, notes=(*checkpoint.notes, note))


def _without_wrappers(state: Collection[str], own: Collection[str]) -> dict[str, str]:
    """{key: the key without wrappers' names}, at any depth; names that the model itself has there stay."""
    known = {""}
    for name in own:
        parts = name.split(".")
        known |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    renamed = {}
    for key in state:
        kept: list[str] = []
        for part in key.split("."):
            if part not in _WRAPPERS or ".".join([*kept, part]) in known:
                kept.append(part)
        renamed[key] = ".".join(kept)
    return renamed
