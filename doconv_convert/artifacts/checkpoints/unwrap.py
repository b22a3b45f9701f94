"""Which of a file's tensors are the model: wrappers, averages, prefixes; and what was taken, in words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from doconv_convert.errors import DoconvError
from doconv_convert.words import listed

# Under these names training scripts keep the model, and its average, beside other things.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")
AVERAGES = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema")
# What torch.optim.swa_utils.AveragedModel counts beside the averaged weights, and mmengine's.
AVERAGED = "n_averaged"
_STEPS = "steps"
# How many dictionaries deep state dicts are looked for, and the names of what holds the optimizer's.
_DEEPEST = 3
_NO_MODEL = ("optim", "opt", "sched", "scaler", "param_groups", "callbacks", "loops")


@dataclass(frozen=True)
class Selection:
    """What the user asked for: the averaged weights (`ema`), and only the keys under `prefix`."""

    ema: bool = False
    prefix: str = ""


class Unwrapper:
    """Walks into nested dictionaries, one level after the other, and notes what it took. `parts` are the names of
    several state dicts of which none is known to be the model's."""

    def __init__(self, path: str, selection: Selection) -> None:
        self.path, self.selection = path, selection
        self.notes: list[str] = []
        self.parts: tuple[str, ...] = ()
        self._open = selection.ema  # whether the average is still to be found

    def choose(self, content: Mapping[Any, Any], parts: Collection[str] = ()) -> str | None:
        """The name of the dictionary to enter among the content's, or None where this level is the model, or `prefix`
        names another one. `parts` are state dicts under names of any kind.

        Raises DoconvError where only an average is there and was not asked for.
        """
        nested = [str(key) for key, value in content.items() if isinstance(value, Mapping)]
        every = [str(key) for key in content]
        average = next((name for name in AVERAGES if name in nested), None)
        wrapper = next((name for name in WRAPPERS if name in nested), None)
        swapped = _swapped(content) if wrapper == "state_dict" else None
        asked = self.selection.prefix.partition(".")[0] if "." in self.selection.prefix else ""
        entered = average if self._open and average is not None and swapped is None else wrapper
        if asked in nested and asked != entered:
            return None
        if swapped is not None:
            self._open = False
            trainer, raw = swapped
            self.notes.append(
                f"'state_dict' holds the averaged weights ({trainer} swaps them); the ones being trained are under "
                f"'{raw.partition('.')[0]}': `prefix` {raw}. takes them"
            )
        elif self._open and average is not None:
            self._open, wrapper = False, average
        elif average is not None and not self.selection.ema:
            others = [part for part in parts if part.partition(".")[0] not in AVERAGES]
            if wrapper is None and not others:
                raise DoconvError(
                    f"'{self.path}' holds the averaged weights '{average}' beside {listed(every)}; say that you want "
                    "them: `ema`"
                )
            self.notes.append(f"left the averaged weights '{average}' aside; `ema` takes them")
        if wrapper is not None:
            self.notes.append(f"took '{wrapper}' of {listed(every)}")
        return wrapper

    def finish(self, keys: Collection[str]) -> None:
        """Raises DoconvError where an average was asked for and none was found."""
        if self._open and AVERAGED not in keys:
            raise DoconvError(
                f"'{self.path}' holds no averaged weights (looked for {', '.join(AVERAGES)}); leave out `ema`"
            )


def _swapped(content: Mapping[Any, Any]) -> tuple[str, str] | None:
    """(who, where the raw weights are) of a file whose `state_dict` is the average: Lightning's WeightAveraging and
    mmengine's EMAHook save it in the model's place, to be deployed as it is."""
    if isinstance(content.get("current_model_state"), Mapping) and "averaging_state" in content:
        return "Lightning's WeightAveraging", "current_model_state"
    raw = content.get("ema_state_dict")
    if (
        isinstance(raw, Mapping)
        and _STEPS in raw
        and all(str(key).startswith("module.") for key in raw if key != _STEPS)
    ):
        return "mmengine's EMAHook", "ema_state_dict.module"
    return None


def unwrap(content: Mapping[Any, Any], unwrapper: Unwrapper, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
    """The model's part of what a script saved. A state dict's values are tensors, so a dictionary under one of
    the known names is what was wrapped; under other names, where it is the only one. Several are taken all, with their
    names before their keys (`Unwrapper.parts`)."""
    while True:
        flat_already = any(is_tensor(value) for value in content.values())
        parts = {} if flat_already else dict(_state_dicts(content, is_tensor))
        name = unwrapper.choose(content, parts)
        if name is not None:
            content = content[name]
            continue
        if unwrapper.selection.prefix or not parts:
            break
        if not unwrapper.selection.ema:
            parts = {key: part for key, part in parts.items() if key.partition(".")[0] not in AVERAGES}
        if len(parts) == 1:
            (name, content), *_ = parts.items()
            unwrapper.notes.append(f"took '{name}', the only state dict in the file")
            break
        unwrapper.parts = tuple(parts)
        content = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
        break
    state = {str(key): value for key, value in content.items()}
    unwrapper.finish(state)
    return under_prefix(state, unwrapper)


def _state_dicts(
    content: Mapping[Any, Any], is_tensor: Callable[[Any], bool], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """The dictionaries of nothing but tensors in a file, by their paths; not the optimizer's."""
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Mapping) or key.lower().startswith(_NO_MODEL):
            continue
        names = [str(name).rpartition(".")[2] for name in value]
        if value and all(is_tensor(one) for one in value.values()):
            if any("." in str(name) for name in value) or {"weight", "W"} & set(names):
                yield f"{prefix}{key}", value
        elif depth < _DEEPEST:
            yield from _state_dicts(value, is_tensor, f"{prefix}{key}.", depth + 1)


def under_prefix(state: dict[str, Any], unwrapper: Unwrapper) -> dict[str, Any]:
    """Only the keys under the prefix that was asked for, without it, of dictionaries in dictionaries too.

    Raises DoconvError where nothing is there.
    """
    prefix = unwrapper.selection.prefix
    if not prefix:
        return state
    flat = dict(_flat(state))
    taken = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix) and key != prefix}
    rest = [key for key in flat if not key.startswith(prefix)]
    if not taken:
        known = dict.fromkeys(key.partition(".")[0] + "." for key in flat)
        raise DoconvError(f"'{unwrapper.path}' has no key under '{prefix}'; its keys begin with {listed(known)}")
    unwrapper.notes.append(f"took the {len(taken)} keys under '{prefix}'")
    if rest:
        unwrapper.notes.append(f"left {len(rest)} keys outside of '{prefix}': {listed(rest)}")
    return taken


def _flat(state: Mapping[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, Mapping) and depth < _DEEPEST:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value
