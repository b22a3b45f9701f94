"""The values of ONNX tensors, compared bit by bit; weights in external files are read in pieces."""

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from doconv_convert.check.onnx_files.external_data import own_file
from doconv_convert.errors import DoconvError

# Elements compared at a time: 16 MiB of float32.
_CHUNK = 1 << 22


def differing(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> Iterator[str]:
    """How many elements of two flat arrays of one type differ in their bits, and by how much at most."""
    count, largest = 0, 0.0
    for start in range(0, a.size, _CHUNK):
        x, y = (np.ascontiguousarray(array[start : start + _CHUNK]) for array in (a, b))
        if a.dtype == object:
            count += int((x != y).sum())
            continue
        bits_x, bits_y = (array.view(np.uint8).reshape(array.size, -1) for array in (x, y))
        if np.array_equal(bits_x, bits_y):
            continue
        differs = (bits_x != bits_y).any(axis=1)
        count += int(differs.sum())
        wide = np.complex128 if a.dtype.kind == "c" else np.float64
        with np.errstate(all="ignore"):
            distance = np.abs(x[differs].astype(wide) - y[differs].astype(wide)).max()
        largest = float(np.maximum(largest, distance))  # hands NaN on, where max() could lose it
    if count:
        amount = "" if a.dtype == object else f", largest difference {largest:.1e}"
        yield f"{count:,} of {a.size:,} values differ{amount}"


def elements(tensor: TensorProto, folder: Path | None) -> np.ndarray[Any, Any]:
    """The tensor's elements as a flat array; mapped, not read, where they lie in an external file.

    Raises DoconvError where they cannot be read, or lie in a file that is not the model's own (`own_file`).
    """
    if tensor.data_type == TensorProto.STRING:
        return np.array(tensor.string_data, dtype=object)
    try:
        if not external_data_helper.uses_external_data(tensor):
            return numpy_helper.to_array(tensor).reshape(-1)
        if folder is None:
            raise DoconvError(f"initializer '{tensor.name}' lies in an external file: pass the model's path")
        place = own_file(tensor, folder)
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        if dtype.kind == "V" or not prod(tensor.dims):  # numpy cannot map packed types, nor nothing
            return numpy_helper.to_array(tensor, os.fspath(folder)).reshape(-1)
        info = external_data_helper.ExternalDataInfo(tensor)
        shape = (prod(tensor.dims),)
        return np.memmap(place, dtype, mode="r", offset=info.offset or 0, shape=shape)
    except (OSError, ValueError, KeyError, TypeError, onnx.checker.ValidationError) as error:
        raise DoconvError(f"the values of initializer '{tensor.name}' cannot be read ({error})") from error


def tensor_text(tensor: TensorProto) -> str:
    return f"{dtype_text(tensor.data_type)} {'x'.join(map(str, tensor.dims)) or 'scalar'}"


def dtype_text(number: int) -> str:
    if number not in TensorProto.DataType.values():
        return f"type {number}"
    name: str = TensorProto.DataType.Name(number).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)
