"""Where a model's external data may lie: in regular files of the model's own folder, as large as the model says.

Checked here, before any runtime or reader follows the model: onnxruntime 1.22 reads whatever path a model names,
and takes the address in memory that stands in a path's place in some models for its own.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from stat import S_ISREG

from onnx import TensorProto, helper

from doconv_convert.check.onnx_files.model import ModelSource, read_model, tensors
from doconv_convert.errors import DoconvError

# onnxruntime's tag for a tensor that lies in its own memory: a number is the address then.
_IN_MEMORY = "_ORT_MEM_ADDR_"
_MARK = b"location"  # the key without which no tensor names a file
_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}  # of those types that share a byte


def external_files(model: ModelSource) -> list[str]:
    """The names of the files that hold the model's external data, as the model names them, in order.

    Raises DoconvError for one that is not a relative path to a place in or below the model's folder.
    """
    return sorted({_location(tensor) for tensor in _external(read_model(model))})


def require_own_data(path: Path) -> None:
    """Raises DoconvError where the ONNX file at `path` asks for data that is not its own: outside of its folder, also
    by way of a link, in what is no regular file, beyond the end of that file, or in memory."""
    if not _names_files(path):
        return
    for tensor in _external(read_model(path)):
        own_file(tensor, path.parent)


def own_file(tensor: TensorProto, folder: Path) -> Path:
    """The file with the external data of a tensor of a model in `folder`. Raises as `require_own_data`."""
    location = _location(tensor)
    try:
        place = (folder / location).resolve()
        found, inside = place.stat(), folder.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # also for a zero byte, and links in a circle
        reason = getattr(error, "strerror", None) or error
        raise _refused(tensor, location, f"cannot be read ({reason}); ship it beside the model") from error
    if not place.is_relative_to(inside):
        raise _refused(tensor, location, "is a link out of the model's folder; put the file itself there")
    if not S_ISREG(found.st_mode):
        raise _refused(tensor, location, "is no regular file; export the model again")
    _require_range(tensor, location, found.st_size)
    return place


def _names_files(path: Path) -> bool:
    """Whether anything in the file can be the path of external data. Raises DoconvError where it cannot be read."""
    if not path.is_file():
        raise DoconvError(f"'{path}' is no file; expected an ONNX model.")
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:  # cannot be mapped
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(_MARK) >= 0
    except (OSError, ValueError) as error:
        raise DoconvError(f"'{path}' cannot be read as an ONNX file ({error}): export it again") from error


def _external(model: ModelSource) -> Iterator[TensorProto]:
    for tensor in tensors(read_model(model)):
        if tensor.data_location == TensorProto.EXTERNAL:
            yield tensor


def _location(tensor: TensorProto) -> str:
    """The path that the tensor names. Raises DoconvError where that is none below the model's folder."""
    names = [entry.value for entry in tensor.external_data if entry.key == "location"]
    if len(names) != 1:
        raise DoconvError(f"tensor '{tensor.name}' names {len(names)} files for its external data, expected 1.")
    name = str(names[0])
    if _IN_MEMORY in name:
        raise _refused(tensor, name, "is an address in memory, which no file may give; export the model again")
    paths = PurePosixPath(name), PureWindowsPath(name)
    if not name or any(path.is_absolute() or path.drive or path.root or ".." in path.parts for path in paths):
        raise _refused(tensor, name, "points out of the model's folder; put the data there and name it by its name")
    return name


def _require_range(tensor: TensorProto, location: str, size: int) -> None:
    """Raises DoconvError unless the tensor's elements lie within the `size` bytes of its file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    needed = _bytes(tensor)
    offset, length = (_number(tensor, location, key, entries.get(key)) for key in ("offset", "length"))
    if length is not None and length != needed:
        raise _refused(tensor, location, f"holds {length:,} bytes of it, expected {needed:,}; export the model again")
    if (offset or 0) + needed > size:
        end = (offset or 0) + needed
        raise _refused(tensor, location, f"has {size:,} bytes, expected {end:,}; copy it once more, or export again")


def _bytes(tensor: TensorProto) -> int:
    """How many bytes the tensor's elements take."""
    known = TensorProto.DataType.values()
    if tensor.data_type not in known or tensor.data_type in (TensorProto.UNDEFINED, TensorProto.STRING):
        raise DoconvError(f"tensor '{tensor.name}' has external data of type {tensor.data_type}, which cannot be read.")
    if any(size < 0 for size in tensor.dims):
        raise DoconvError(f"tensor '{tensor.name}' has the shape {list(tensor.dims)}, which cannot be.")
    whole_bytes = 8 * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    bits = _BITS.get(TensorProto.DataType.Name(tensor.data_type), whole_bytes)
    return -(-int(prod(tensor.dims)) * bits // 8)


def _number(tensor: TensorProto, location: str, key: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _refused(tensor, location, f"has the {key} '{text}', expected a number of bytes; export the model again")
    return int(text)


def _refused(tensor: TensorProto, location: str, why: str) -> DoconvError:
    return DoconvError(f"the external data of tensor '{tensor.name}', '{location}', {why}.")
