"""The outputs of a certified file, run here: onnxruntime against the float64 outputs of the side file.

It runs a file of unknown origin, so `verify` has it called in a process with limits (`check.confined`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from doconv_convert.artifacts.sources.samples import in_order, read_samples
from doconv_convert.check.certificate.side_file import (
    Expected,
    array_hash,
    compare_with,
    expected_bytes,
    read_arrays,
)
from doconv_convert.check.onnxruntime_run import retry_in_float64
from doconv_convert.check.outputs.compare import Array
from doconv_convert.check.outputs.session import OnnxSession
from doconv_convert.check.status import Status
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.words import counted

MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError)
"""What reading a certificate raises whose digest is right and whose content is not ours."""


def outputs_as_json(candidate: str, side_file: str, expected: Mapping[str, Any], samples: str | None) -> dict[str, Any]:
    """`check_outputs` for `check.confined`; `malformed` says what is wrong with `expected`."""
    try:
        status = check_outputs(Path(candidate), Path(side_file), expected, None if samples is None else Path(samples))
        return asdict(status)
    except UsageError:
        raise
    except MALFORMED as error:
        return {"malformed": f"{type(error).__name__}: {error}"}


def check_outputs(candidate: Path, side_file: Path, expected: Mapping[str, Any], samples: Path | None) -> Status:
    """onnxruntime against the float64 outputs, to the proof's own bound, with optimizations on and off.

    `expected` is the certificate's part `outputs`.
    """
    arrays = read_arrays(side_file, expected_bytes(expected["inputs"], expected["tensors"]))
    inputs = _inputs(arrays, expected["inputs"], samples)
    outputs = [_expected(one, arrays[f"output_{index}"]) for index, one in enumerate(expected["tensors"])]

    def compare(precise: bool, floor: float) -> tuple[Status, None]:
        problems, worst = [], (0.0, 0.0)
        for optimize in (True, False):
            session = OnnxSession(candidate, optimize=optimize, precise=precise)
            if session.outputs != [one.name for one in outputs]:
                detail = f"outputs are named {session.outputs}, not as in the certificate"
                return Status("outputs", "failed", detail), None
            how = "" if optimize else ", with optimizations off"
            for name, error, bound, problem in compare_with(
                outputs, session.run(inputs), expected["detections"], floor
            ):
                if problem is not None:
                    problems.append(f"'{name}' {problem}{how}")
                elif bound and error / bound >= (worst[0] / worst[1] if worst[1] else 0.0):
                    worst = error, bound
        if problems or not outputs:
            told = "other than the certificate's float64 outputs"
            return Status("outputs", "failed", told, tuple(problems)), None
        compared = f"{counted(len(outputs), 'output')}, {counted(expected['samples'], 'sample')}"
        detail = f"{compared}: relative error {worst[0]:.1e} (tolerance {worst[1]:.1e}); optimizations on and off"
        return Status("outputs", "passed", detail), None

    return retry_in_float64(compare)[0]


def _expected(one: Mapping[str, Any], values: Array) -> Expected:
    plain_error = float("nan") if one["plain_error"] is None else float(one["plain_error"])
    shape = tuple(int(size) for size in one["shape"])
    return Expected(one["name"], one["dtype"], shape, float(one["norm"]), one["kept"] == "whole", plain_error, values)


def _inputs(arrays: Mapping[str, Array], expected: Sequence[Mapping[str, Any]], samples: Path | None) -> list[Array]:
    names = [one["name"] for one in expected]
    if all(one["stored"] for one in expected):
        inputs = [arrays[f"input_{index}"] for index in range(len(expected))]
    elif samples is not None:
        inputs = list(in_order(read_samples(samples), names, f"'{samples}'"))
    else:
        raise UsageError("the inputs were too large for the side file; give them with `input_file` FILE.npz.")
    for one, array in zip(expected, inputs, strict=True):
        if array_hash(array) != one["sha256"] or list(array.shape) != one["shape"]:
            raise DoconvError(f"input '{one['name']}' is not the one of the certificate: its SHA-256 differs.")
    return [np.asarray(array) for array in inputs]
