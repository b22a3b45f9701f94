"""Which of a file's tensors are the model: wrappers, averages, prefixes; and what was taken, in words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from doconv_convert.errors import DoconvError
from doconv_convert.words import listed

# Under these names training scripts keep the model, and its average, beside other things.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params")
AVERAGES = ("ema", "model_ema", "state_dict_ema", "ema_state_dict", "params_ema")
# What torch.optim.swa_utils.AveragedModel counts beside the averaged weights.
AVERAGED = "n_averaged"


@dataclass(frozen=True)
class Selection:
    """What the user asked for: the averaged weights (`ema`), and only the keys under `prefix`."""

    ema: bool = False
    prefix: str = ""


class Unwrapper:
    """Walks into nested dictionaries, one level after the other, and notes what it took."""

    def __init__(self, path: str, selection: Selection) -> None:
        self.path, self.selection = path, selection
        self.notes: list[str] = []
        self._open = selection.ema  # whether the average is still to be found

    def choose(self, nested: Collection[str], every: Collection[str]) -> str | None:
        """The name of the dictionary to enter among the `nested` ones, or None where this level is the model.

        Raises DoconvError where only an average is there and was not asked for.
        """
        average = next((name for name in AVERAGES if name in nested), None)
        wrapper = next((name for name in WRAPPERS if name in nested), None)
        if self._open and average is not None:
            self._open, wrapper = False, average
        elif average is not None and not self.selection.ema:
            if wrapper is None:
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


def unwrap(content: Mapping[Any, Any], unwrapper: Unwrapper) -> dict[str, Any]:
    """The model's part of what a script saved. A state dict's values are tensors, so a dictionary under one of
    the known names is what was wrapped."""
    while True:
        nested = [str(key) for key, value in content.items() if isinstance(value, Mapping)]
        name = unwrapper.choose(nested, [str(key) for key in content])
        if name is None:
            break
        content = content[name]
    state = {str(key): value for key, value in content.items()}
    unwrapper.finish(state)
    return under_prefix(state, unwrapper)


def under_prefix(state: dict[str, Any], unwrapper: Unwrapper) -> dict[str, Any]:
    """Only the keys under the prefix that was asked for, without it, of dictionaries in dictionaries too.

    Raises DoconvError where nothing is there.
    """
    prefix = unwrapper.selection.prefix
    if not prefix:
        return state
    flat = _flatten(state)
    taken = {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix) and key != prefix}
    rest = [key for key in flat if not key.startswith(prefix)]
    if not taken:
        known = dict.fromkeys(key.partition(".")[0] + "." for key in flat)
        raise DoconvError(f"'{unwrapper.path}' has no key under '{prefix}'; its keys begin with {listed(known)}")
    unwrapper.notes.append(f"took the {len(taken)} keys under '{prefix}'")
    if rest:
        unwrapper.notes.append(f"left {len(rest)} keys outside of '{prefix}': {listed(rest)}")
    return taken


def _flatten(state: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": one for inner, one in value.items()}
        else:
            flat[key] = value
    return flat
