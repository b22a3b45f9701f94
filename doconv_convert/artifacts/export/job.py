"""What is exported, from what, and how: what an exporting process is asked. Importing this needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from doconv_convert.artifacts.checkpoints.unwrap import Selection
from doconv_convert.artifacts.sources.source import Source
from doconv_convert.rewrite.linear.steps import Merge
from doconv_convert.rewrite.options import Options

_PATHS = ("state_file", "inputs_file", "path", "checkpoint", "twin")


@dataclass(frozen=True)
class Flags:
    """How to export: `export_onnx`'s arguments."""

    opset: int | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    dynamic_batch: bool = True
    dynamic: Mapping[str, Mapping[int, str]] | None = None


@dataclass(frozen=True)
class ExportJob:
    """What a child needs: `source` draws the network, `state_file` (of `save`) is its whole plain state dict.

    With `checkpoint` the child loads that trained file instead, as `load_into` does with `options`, and folds it
    itself, merging regions as `merge` says: its export then owes nothing to the parent's fold. Where other people's
    layers are folded by graph, `fold_foreign` does so to the fresh network before `state_file` is loaded.

    `inputs_file` is an .npz with the arrays 'input_0', 'input_1', ...: forward's positional arguments, or
    with `image_list` the images of the one list that it takes. `twin` is where the network in float64 goes.
    """

    source: Source
    state_file: Path
    inputs_file: Path
    path: Path
    flags: Flags = Flags()
    dtype: str = "float32"
    image_list: bool = False
    checkpoint: Path | None = None
    options: Options = field(default_factory=Options)
    selection: Selection = field(default_factory=Selection)
    fold_foreign: bool = False
    constant_kernels: bool = False
    twin: Path | None = None
    merge: Merge = "none"

    def with_flags(self, **changes: Any) -> ExportJob:
        """The same job with other flags."""
        return replace(self, flags=replace(self.flags, **changes))

    def to_json(self) -> dict[str, Any]:
        """JSON has only text for keys: axes go as pairs."""
        named = (self.flags.dynamic or {}).items()
        dynamic = {name: list(axes.items()) for name, axes in named} or None
        parts = {key: vars(getattr(self, key)) for key in ("options", "selection")}
        paths = {key: os.fspath(getattr(self, key)) for key in _PATHS if getattr(self, key) is not None}
        flags = vars(self.flags) | {"dynamic": dynamic}
        return vars(self) | parts | paths | {"source": self.source.to_json(), "flags": flags}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ExportJob:
        flags = data["flags"]
        dynamic = flags["dynamic"] and {name: dict(axes) for name, axes in flags["dynamic"].items()}
        parts = {
            "source": Source.from_json(data["source"]),
            "flags": Flags(**{**flags, "dynamic": dynamic}),
            "options": Options(**data["options"]),
            "selection": Selection(**data["selection"]),
        }
        paths = {key: Path(data[key]) for key in _PATHS if data[key] is not None}
        return cls(**{**data, **paths, **parts})
