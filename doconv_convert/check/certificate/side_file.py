"""The side file of a certificate: the inputs of the outputs check and the float64 outputs on them, in bounded size.

An output of more than WHOLE elements is kept as a count sketch: each element goes, with a sign of its own, into one
of BUCKETS sums, both drawn from its index by a hash. Every element counts, the sketch is linear, and the squared
norm of a sketched difference is, in the mean, that of the difference itself. Importing this needs no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_STORED, ZipFile

import numpy as np

from doconv_convert.check.outputs.compare import FLOOR, Array, bound_for, relative_error
from doconv_convert.check.outputs.detections import KEYS, in_order_of
from doconv_convert.errors import DoconvError
from doconv_convert.files import atomic_write, require_file

if TYPE_CHECKING:
    from doconv_convert.check.outputs.expected import ReferenceRun

WHOLE = 1 << 16
BUCKETS = 1 << 16
# Inputs above this are not copied: only their hash is kept, and the check asks for the samples.
INPUT_BYTES = 32 * 2**20
# A sketched error's norm has a relative standard deviation of sqrt(1 / (2 * BUCKETS)) = 0.28 %; over 60 random
# errors in 1e6 elements it was 0.26 %, the largest deviation 0.63 %.
SLACK = 1.02
# Between a sketch's norm and that of what it sketches, several times what chance makes.
NORM_SLACK = 0.05
_CHUNK = 1 << 22
_HEADER_BYTES = 1 << 12


@dataclass(frozen=True)
class Expected:
    """What an output should be: its float64 values or their sketch, and the whole tensor's norm."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    norm: float
    whole: bool
    plain_error: float
    values: Array


def sketch(array: Array) -> Array:
    """BUCKETS signed sums of the elements, in float64. The same on every machine: the hash is integer arithmetic."""
    flat = array.reshape(-1)
    sums = np.zeros(BUCKETS)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float64)
        mixed = _mix(np.arange(start, start + part.size, dtype=np.uint64))
        signs = np.where(mixed >> np.uint64(63), 1.0, -1.0)
        sums += np.bincount((mixed % np.uint64(BUCKETS)).astype(np.int64), signs * part, BUCKETS)
    return sums


def _mix(index: Array) -> Array:
    """splitmix64's finalizer: every bit of the index reaches every bit of the result."""
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def array_hash(array: Array) -> str:
    """SHA-256 of the elements in row order, little-endian."""
    ordered = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(ordered.tobytes()).hexdigest()


def write_reference(path: Path, reference: ReferenceRun) -> None:
    """The side file for `reference`; the same values give the same bytes."""
    arrays: dict[str, Any] = {}
    if sum(array.nbytes for array in reference.inputs) <= INPUT_BYTES:
        arrays |= {f"input_{index}": array for index, array in enumerate(reference.inputs)}
    whole = _kept_whole(reference.truth, reference.detections)
    for index, array in enumerate(reference.truth):
        arrays[f"output_{index}"] = array if index in whole else sketch(array)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def describe_inputs(names: Sequence[str], reference: ReferenceRun) -> list[dict[str, Any]]:
    stored = sum(array.nbytes for array in reference.inputs) <= INPUT_BYTES
    return [
        {
            "name": name,
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "sha256": array_hash(array),
            "stored": stored,
        }
        for name, array in zip(names, reference.inputs, strict=True)
    ]


def describe_outputs(names: Sequence[str], reference: ReferenceRun) -> list[dict[str, Any]]:
    whole = _kept_whole(reference.truth, reference.detections)
    return [
        {
            "name": name,
            "dtype": str(plain.dtype),
            "shape": list(truth.shape),
            "norm": float(np.linalg.norm(truth.ravel().astype(np.float64))),
            "kept": "whole" if index in whole else "sketch",
        }
        for index, (name, truth, plain) in enumerate(zip(names, reference.truth, reference.plain, strict=True))
    ]


def _kept_whole(truth: Sequence[Array], detections: Sequence[Mapping[str, int]]) -> set[int]:
    """Small outputs, and the boxes, labels and scores by which detections are brought into order."""
    small = {index for index, array in enumerate(truth) if array.size <= WHOLE}
    return small | {index for group in detections for key, index in group.items() if key in KEYS}


def expected_bytes(inputs: Sequence[Mapping[str, Any]], tensors: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How much each array of the side file takes, by what its certificate says of it (`describe_inputs`,
    `describe_outputs`)."""
    sizes = {
        f"input_{index}": math.prod(one["shape"]) * np.dtype(one["dtype"]).itemsize
        for index, one in enumerate(inputs)
        if one["stored"]
    }
    for index, one in enumerate(tensors):
        elements = BUCKETS if one["kept"] == "sketch" else math.prod(one["shape"])
        sizes[f"output_{index}"] = elements * max(8, np.dtype(one["dtype"]).itemsize)
    return sizes


def read_arrays(path: Path, sizes: Mapping[str, int]) -> dict[str, Array]:
    """The side file's arrays, of these names and at most these bytes. Raises DoconvError where it cannot be read or is
    packed: ours never are, and 5 MB can unpack to gigabytes."""
    try:
        require_file(path, "a certificate's side file")
        with ZipFile(path) as archive:
            for entry in archive.infolist():
                most = sizes.get(entry.filename.removesuffix(".npy"), -1) + _HEADER_BYTES
                if entry.compress_type != ZIP_STORED or entry.file_size > most:
                    raise ValueError(f"'{entry.filename}' is packed, or not as the certificate says")
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except DoconvError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds for a file of another kind
        raise DoconvError(f"'{path}' cannot be read as a certificate's side file ({error}).") from error


def compare_with(
    expected: Sequence[Expected],
    got: Sequence[Array],
    detections: Sequence[Mapping[str, int]],
    floor: float = FLOOR,
) -> list[tuple[str, float, float, str | None]]:
    """(name, error, bound, problem) of every output of a run, held to the proof's own bound (`floor`, its least).

    Raises DoconvError where their number differs.
    """
    if len(expected) != len(got):
        raise DoconvError(f"the file has {len(got)} outputs, the certificate {len(expected)}.")
    # what is kept as a sketch only has a shape: nothing is matched by its values
    shown = [one.values if one.whole else np.broadcast_to(np.float32(0), one.shape) for one in expected]
    ordered = in_order_of(shown, got, detections)
    return [(one.name, *_compare(one, array, floor)) for one, array in zip(expected, ordered, strict=True)]


def _compare(expected: Expected, got: Array, floor: float) -> tuple[float, float, str | None]:
    floating = np.issubdtype(np.dtype(expected.dtype), np.floating)
    bound = (bound_for(expected.plain_error, floor) if floating else 0.0) * (1.0 if expected.whole else SLACK)
    if str(got.dtype) != expected.dtype or got.shape != expected.shape:
        return float("nan"), bound, f"is {got.dtype} {got.shape}, expected {expected.dtype} {expected.shape}"
    if not np.isfinite(got).all():
        return float("nan"), bound, "has values that are NaN or infinite"
    if expected.whole:
        error = relative_error(got, expected.values)
    else:
        own = float(np.linalg.norm(expected.values))
        if not abs(own - expected.norm) <= NORM_SLACK * own:
            return (
                float("nan"),
                bound,
                f"has the norm {own:.3e} in the side file, {expected.norm:.3e} in the certificate",
            )
        error = float(np.linalg.norm(sketch(got) - expected.values)) / (expected.norm or 1.0)
    problem = None if error <= bound else f"is off by {error:.1e} of its scale, allowed {bound:.1e}"
    return error, bound, problem
