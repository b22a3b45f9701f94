"""Inputs for an ONNX file that is run without its torch model. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from doconv_convert.artifacts.sources.inputs import parse_input_shape
from doconv_convert.artifacts.sources.samples import in_order, read_samples
from doconv_convert.check.onnx_files.model import onnx_inputs
from doconv_convert.check.outputs.compare import Array
from doconv_convert.errors import UsageError


def onnx_samples(model: Path, shapes: Sequence[str], file: Path | None) -> list[Array]:
    """The user's samples, or random ones from a generator of their own; a dynamic dimension 0 is a batch of 2."""
    inputs = onnx_inputs(model)
    if file is not None:
        return in_order(read_samples(file), list(inputs), f"'{file}'")
    specs = [parse_input_shape(text) for text in shapes]
    unnamed = len(specs) == len(inputs) and all(spec.name == "" for spec in specs)
    given = dict(zip(inputs, specs, strict=True)) if unnamed else {spec.name: spec for spec in specs}
    if unknown := given.keys() - inputs.keys():
        raise UsageError(f"`input_shapes`: '{model}' has no input '{unknown.pop()}', it has {', '.join(inputs)}.")
    generator = np.random.default_rng(0)
    arrays: list[Array] = []
    for name, (dtype, dims) in inputs.items():
        if not np.issubdtype(dtype, np.floating):
            raise UsageError(
                f"input '{name}' is {dtype}, no values can be made up for it; give samples with `input_file`."
            )
        if name in given:
            dims = list(given[name].shape)
        elif any(not isinstance(dim, int) for dim in dims[1:]):
            raise UsageError(
                f"input '{name}' has dynamic sizes {dims}; give them with `input_shapes` {name}=1,3,224,224."
            )
        size = [dim if isinstance(dim, int) else 2 for dim in dims]
        arrays.append(generator.standard_normal(size).astype(dtype))
    return arrays
