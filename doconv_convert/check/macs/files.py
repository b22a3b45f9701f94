"""Counting files of unknown origin: as `counting` does, in a process with limits. Importing this imports no onnx."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from doconv_convert.check.confined import SECONDS, Confined, Limits, confined
from doconv_convert.check.macs.result import MacCount, RegionLeft
from doconv_convert.errors import DoconvError
from doconv_convert.files import require_file

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from doconv_convert.check.onnx_files.model import ModelSource


def count_macs(
    model: ModelSource, dims: Mapping[str, int] | None = None, ignore: Collection[str] = (), timeout: float = SECONDS
) -> MacCount:
    """Count the multiply-accumulates (MACs; FLOPs are twice as many) of one run of an ONNX `model` (a path or a
    ModelProto). Exact integers: `.total`, and node by node `.nodes`; `.uncounted` names operators not understood,
    `.claimed` values whose sizes the file only states.

    `dims` gives sizes to dynamic dimensions by name (`input[axis]` for one that has no name). A dimension 0 that
    is not given is a batch of 1. The operators in `ignore` ('com.example.Mask') are taken to multiply nothing
    where they cannot be counted. The count runs in a process of its own and ends after `timeout` seconds of work.

    Raises DoconvError if another dimension is not given, if `dims` names one that the model does not have or gives
    less than 1, if the file is not a valid ONNX model, or if its count takes more time or memory than a model's.
    """
    with confined() as process:
        if isinstance(model, str | os.PathLike):
            return count_file(process, Path(model), dims or {}, ignore, timeout)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(model.SerializeToString())
            return count_file(process, path, dims or {}, ignore, timeout)


def count_file(
    process: Confined, path: Path, dims: Mapping[str, int], ignore: Collection[str], timeout: float
) -> MacCount:
    require_file(path, "an ONNX file")
    limits = Limits(timeout)
    found = process.call("check.macs.counting:count_as_json", path, dict(dims), list(ignore), limits=limits)
    return MacCount.from_json(found)


def regions_of_file(
    process: Confined,
    path: Path,
    count: MacCount,
    dims: Mapping[str, int],
    ignore: Collection[str],
    timeout: float,
    *,
    required: bool,
) -> tuple[RegionLeft, ...]:
    """The linear regions that the counted file still has. Where they are not `required`, a file in which they cannot be
    looked for has none."""
    arguments = path, count.to_json(), dict(dims), list(ignore), required
    try:
        found = process.call("check.macs.regions:regions_as_json", *arguments, limits=Limits(timeout))
    except DoconvError as error:
        if required:
            raise
        logger.info("'%s': linear regions were not looked for (%s)", path, error)
        return ()
    return tuple(RegionLeft(tuple(one["nodes"]), one["convolutions"], one["macs"], one["wasted"]) for one in found)


def dims_of_file(process: Confined, path: Path, timeout: float) -> list[str]:
    """The names by which `count_file` takes sizes for the file's dynamic dimensions."""
    require_file(path, "an ONNX file")
    names: list[str] = process.call("check.macs.counting:dynamic_dims", path, limits=Limits(timeout))
    return names
