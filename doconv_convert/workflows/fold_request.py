"""What `fold` is asked for. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doconv_convert.artifacts.checkpoints.unwrap import Selection
from doconv_convert.artifacts.export.job import Flags
from doconv_convert.errors import UsageError
from doconv_convert.rewrite.linear.steps import Merge
from doconv_convert.rewrite.options import Options


@dataclass(frozen=True)
class FoldRequest:
    """What `fold` is asked for: the command line's options. `plain` and `onnx` are the files to write."""

    checkpoint: Path
    plain: Path | None = None
    onnx: Path | None = None
    model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    options: Options = field(default_factory=Options)
    selection: Selection = field(default_factory=Selection)
    kernels: Sequence[str] = ()
    constant_kernels: bool = False
    merge: Merge = "none"
    input_shapes: Sequence[str] = ()
    input_file: Path | None = None
    flags: Flags = field(default_factory=Flags)
    verify: bool = True
    device: str = "cpu"
    min_coverage: float = 0.0
    layers: bool = False

    def __post_init__(self) -> None:
        if self.plain is None and self.onnx is None:
            raise UsageError("fold: name what to write: `plain` plain.safetensors, `onnx` out.onnx, or both.")
        if self.plain == self.onnx:
            raise UsageError(f"fold: `plain` and `onnx` both name '{self.plain}', expected two files.")
