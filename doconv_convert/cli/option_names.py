"""The library's errors name arguments (`input_shapes`); a command's user knows them as options (--input-shape)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_OPTIONS = {
    "against": "--against",
    "attest": "--attest",
    "certificate": "--certificate",
    "d_mul": "--d-mul",
    "device": "--device",
    "dims": "--dim",
    "dynamic": "--dynamic",
    "ema": "--ema",
    "exclude": "--exclude",
    "graph_only": "--graph-only",
    "include": "--include",
    "input_file": "--input",
    "input_shapes": "--input-shape",
    "jobs": "--jobs",
    "kernels": "--kernel",
    "merge": "--merge",
    "min_coverage": "--min-coverage",
    "model": "--model",
    "model_args": "--model-args",
    "opset": "--opset",
    "onnx": "--onnx",
    "plain": "-o",
    "prefix": "--prefix",
    "report": "--report",
    "resume": "--resume",
    "timeout": "--timeout",
    "verify=False": "--no-verify",
    "weights": "--weights",
}
_ARGUMENT = re.compile("`(" + "|".join(map(re.escape, _OPTIONS)) + ")`")


def with_options(value: Any) -> Any:
    """The same text, or document of texts, with the options in the arguments' place."""
    if isinstance(value, str):
        return _ARGUMENT.sub(lambda match: _OPTIONS[match[1]], value)
    if isinstance(value, Mapping):
        return {key: with_options(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [with_options(one) for one in value]
    return value
