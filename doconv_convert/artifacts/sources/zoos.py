"""torchvision's and timm's models by name, built offline unless weights are asked for.

Some builders draw another network when they are given weights: torchvision's detectors take frozen batch
norms and its googlenet transforms its input; a tag of timm's changes the head. A *variant* names the weights
whose architecture is meant, with random values.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from doconv_convert.artifacts.sources.factories import nearest, user_code
from doconv_convert.errors import DoconvError, UsageError

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum  # type: ignore[import-untyped]


def model_names(library: str) -> list[str]:
    """Every architecture of "torchvision" or "timm", in alphabetical order."""
    if library == "timm":
        return sorted(_timm().list_models())
    from torchvision.models import list_models

    return sorted(list_models())


def expand(texts: Sequence[str]) -> list[str]:
    """Sources with the globs in `torchvision:*` and `timm:resnet*` replaced by the names that match.

    Raises UsageError for a glob that matches nothing.
    """
    found: list[str] = []
    for text in texts:
        library, _, pattern = text.partition(":")
        if library not in ("torchvision", "timm") or not any(mark in pattern for mark in "*?["):
            found.append(text)
            continue
        names = [name for name in model_names(library) if fnmatchcase(name, pattern)]
        if not names:
            raise UsageError(f"'{text}' matches no model of {library}.")
        found += [f"{library}:{name}" for name in names]
    return found


def check_torchvision(name: str) -> None:
    """Raises UsageError, with the nearest names, where torchvision has no model `name`."""
    from torchvision.models import list_models

    if name not in list_models():
        hint = nearest(name, list_models()) or "; torchvision.models.list_models() lists them"
        raise UsageError(f"torchvision has no model '{name}'{hint}")


def torchvision_family(name: str) -> str:
    """ "detection", "segmentation", "video", "optical_flow", ...; a classifier's own module."""
    from torchvision.models import get_model_builder

    return str(get_model_builder(name).__module__.split(".")[2])


def torchvision_weights(name: str, weights: str) -> WeightsEnum:
    """The member of the model's weights enum ('DEFAULT' is an alias), not fetched. Raises UsageError."""
    from torchvision.models import get_model_weights

    members = get_model_weights(name).__members__
    member = members.get(weights.rpartition(".")[2])
    if member is None:
        raise UsageError(f"'torchvision:{name}' has no weights '{weights}': choose {_choice(members)}")
    return member


def build_torchvision(name: str, variant: str | None, args: Mapping[str, Any], fetch: bool) -> object:
    """The model as `variant`'s weights (None: no weights) draw it; with their values if `fetch`, else random.

    Raises DoconvError where the builder or the download fails.
    """
    from torch import nn
    from torchvision.models import WeightsEnum, get_model_builder

    builder = get_model_builder(name)
    member = None if variant is None else torchvision_weights(name, variant)
    arguments: dict[str, Any] = {"weights": member, **args}
    if "weights_backbone" in inspect.signature(builder).parameters:
        arguments["weights_backbone"] = None
    if fetch and member is not None:
        return _fetched(f"torchvision:{name}", member.name, member.url, lambda: builder(**arguments))
    with warnings.catch_warnings(), user_code(f"torchvision:{name}"):
        # googlenet and inception announce a change of their random initialization
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        if member is None:
            return builder(**arguments)
        # architecture and values hang on the one argument `weights`: keep the first, leave out the second
        with (
            patch.object(WeightsEnum, "get_state_dict", lambda *_, **__: {}),
            patch.object(nn.Module, "load_state_dict", lambda *_, **__: None),
        ):
            return builder(**arguments)


def check_timm(name: str) -> None:
    """Raises UsageError, with the nearest names, where timm has no 'name' or 'name.tag'."""
    timm = _timm()
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        hint = nearest(arch, timm.list_models()) or "; timm.list_models() lists them"
        raise UsageError(f"timm has no model '{arch}'{hint}")
    if tag:
        timm_weights(arch, tag)


def timm_weights(name: str, weights: str) -> str:
    """The 'name.tag' of weights that timm has for `name`: a tag, or 'DEFAULT'. Raises UsageError."""
    timm = _timm()
    arch, _, tag = name.partition(".")
    if weights == "DEFAULT":
        config = timm.models.get_pretrained_cfg(arch)
        tag = tag or (config.tag if config else "")
    else:
        tag = weights
    full = f"{arch}.{tag}".rstrip(".")
    if not timm.models.is_model_pretrained(full):
        tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{arch}.*")]
        raise UsageError(f"'timm:{arch}' has no weights '{weights}': choose {_choice(tags)}")
    return full


def build_timm(name: str, args: Mapping[str, Any], fetch: bool) -> object:
    """The model 'name' or 'name.tag', with the tag's values if `fetch`, else random ones.

    Raises DoconvError where the builder or the download fails.
    """
    timm = _timm()
    if fetch:
        config = timm.models.get_pretrained_cfg(name)
        place = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
        tag = name.partition(".")[2] or "DEFAULT"
        return _fetched(f"timm:{name}", tag, place, lambda: timm.create_model(name, pretrained=True, **args))
    with user_code(f"timm:{name}"):
        return timm.create_model(name, pretrained=False, **args)


def _fetched(text: str, weights: str, place: str, make: Callable[[], object]) -> object:
    try:
        with user_code(text):
            return make()
    except DoconvError as error:
        raise DoconvError(
            f"the weights '{weights}' cannot be had: {error}; if they cannot be downloaded here, get {place} "
            "elsewhere and pass the file: `weights` FILE"
        ) from error.__cause__


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise DoconvError("a 'timm:' source needs timm: pip install timm") from error


def _choice(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in sorted(set(names)) if name) or "no weights, it has none"
