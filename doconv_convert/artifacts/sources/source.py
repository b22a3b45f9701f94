"""SOURCE, the text that says where a model comes from, and the model built from it.

    torchvision:resnet50            torchvision:googlenet@DEFAULT   (the network those weights belong to)
    timm:convnext_tiny              timm:resnet50.a1_in1k
    package.module:factory          path/to/file.py:factory
    path/to/model.pt2               (an exported program, which has its own weights)

A source without weights is built offline and with random values; `pinned` writes the variant of an
architecture that weights bring along into the source's text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from doconv_convert.artifacts.sources import factories, programs, zoos
from doconv_convert.errors import DoconvError, UsageError

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["torchvision", "timm", "module", "file", "program"]

FORMS = "'torchvision:NAME', 'timm:NAME', 'package.module:FACTORY', 'path/to/file.py:FACTORY' or 'model.pt2'"
# they reach for the network, or bring values that no checkpoint of ours knows of
WEIGHT_ARGS = frozenset(
    {"weights", "weights_backbone", "pretrained", "pretrained_backbone", "pretrained_cfg"}
    | {"pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
)


@dataclass(frozen=True)
class Source:
    """A model's origin as the user writes it, and its builder's keyword arguments; see `parse_source`."""

    text: str
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        if self.text.startswith("torchvision:"):
            return "torchvision"
        if self.text.startswith("timm:"):
            return "timm"
        if self.text.endswith(programs.SUFFIX):
            return "program"
        return "file" if self.place.endswith(".py") else "module"

    @property
    def place(self) -> str:
        """The package, module or file, before the last colon."""
        return self.text.rpartition(":")[0]

    @property
    def name(self) -> str:
        """The model or factory, after the last colon, without a torchvision variant."""
        name = self.text.rpartition(":")[2]
        return name.partition("@")[0] if self.kind == "torchvision" else name

    @property
    def variant(self) -> str | None:
        """The weights whose variant of a torchvision architecture is meant, if the text says so."""
        return self.text.partition("@")[2] if self.kind == "torchvision" and "@" in self.text else None

    def to_json(self) -> dict[str, Any]:
        return {"source": self.text, "args": dict(self.args)}

    def without_folders(self) -> Source:
        """The same for a file that others read: a path that is absolute or climbs ('..'), the source's own or among
        the arguments, is cut to its name. Where it lies is a matter of the machine; nobody opens it from there."""
        text = self.text
        if self.kind == "file":
            text = f"{_without_folders(self.place)}:{self.name}"
        elif self.kind == "program":
            text = _without_folders(text)
        return Source(text, _without_folders(self.args))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Source:
        """The inverse of `to_json`, checked like a user's own text. Raises UsageError."""
        if not isinstance(data, Mapping) or not isinstance(data.get("source"), str):
            raise UsageError(f"no source in {data!r}: expected {{'source': TEXT, 'args': {{...}}}}")
        return parse_source(data["source"], data.get("args"))


def parse_source(text: str, model_args: Mapping[str, Any] | None = None) -> Source:
    """Checks the form, and that torchvision or timm knows the name; opens no code before `build`.

    Raises UsageError, with the nearest names for an unknown one; DoconvError where timm is not installed.
    """
    args = {} if model_args is None else model_args
    if not isinstance(args, Mapping) or not all(isinstance(key, str) for key in args):
        raise UsageError(f"model arguments of '{text}' must be like {{\"width\": 32}}, got {args!r}")
    source = Source(text, dict(args))
    if source.kind == "torchvision":
        zoos.check_torchvision(source.name)
        if source.variant is not None:
            zoos.torchvision_weights(source.name, source.variant)
    elif source.kind == "timm":
        zoos.check_timm(source.name)
    elif source.kind == "program":
        if args:
            raise UsageError(f"'{text}' takes no model arguments, got {sorted(args)}: an exported program is fixed")
    elif not _names_a_factory(source):
        raise UsageError(f"'{text}' names no model: expected {FORMS}")
    if source.kind in ("torchvision", "timm") and (taken := sorted(WEIGHT_ARGS & args.keys())):
        raise UsageError(f"the argument '{taken[0]}' of '{text}' is not allowed: choose weights by `weights`")
    return source


def pinned(source: Source, weights: str | None) -> Source:
    """The source that builds, without any weights, the architecture that `build(source, weights)` has.

    Raises UsageError for weights that do not exist.
    """
    if weights is None:
        return source
    if source.kind == "torchvision":
        member = zoos.torchvision_weights(source.name, weights)
        return Source(f"torchvision:{source.name}@{member.name}", source.args)
    if source.kind == "timm":
        return Source(f"timm:{zoos.timm_weights(source.name, weights)}", source.args)
    raise UsageError(f"'{source.text}' has no named weights, got '{weights}': pass a checkpoint file")


def build(source: Source, weights: str | None = None, seed: int = 0) -> nn.Module:
    """Builds the model on the CPU. Without `weights` nothing is fetched, and random values come from `seed`.

    `weights` is 'DEFAULT', a member of torchvision's enum ('IMAGENET1K_V2') or a tag of timm's: downloaded by
    torchvision or timm into their own cache. torch's global random state stays as it was. Raises UsageError
    for weights that do not exist, DoconvError where the file, the factory or the download fails.
    """
    import torch
    from torch import nn

    exact = pinned(source, weights)
    fetch = weights is not None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if exact.kind == "torchvision":
            model = zoos.build_torchvision(exact.name, exact.variant, exact.args, fetch)
        elif exact.kind == "timm":
            model = zoos.build_timm(exact.name, exact.args, fetch)
        elif exact.kind == "program":
            model = programs.load_program(exact.text)
        else:
            model = factories.call_factory(exact.place, exact.name, exact.args)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise DoconvError(f"'{source.text}' returned a {kind}: return the torch.nn.Module itself")
    return model


def sample_models_folder() -> Path:
    """The folder of sample models: in the installed package, or beside it in a clone. Raises DoconvError."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "sample_models", package.parent / "sample_models"):
        if folder.is_dir():
            return folder
    raise DoconvError(f"no folder 'sample_models' in '{package}' or beside it: install doconv-convert again")


def _names_a_factory(source: Source) -> bool:
    parts = () if source.kind == "file" else source.place.split(".")
    return all(part.isidentifier() for part in (*parts, source.name))


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        path = Path(value)
        return path.name or value if path.is_absolute() or ".." in path.parts else value
    if isinstance(value, Mapping):
        return {key: _without_folders(one) for key, one in value.items()}
    return [_without_folders(one) for one in value] if isinstance(value, list | tuple) else value
