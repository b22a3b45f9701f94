"""Comparing outputs: per tensor its name, shape, dtype, finiteness and values, against a float64 run.

Errors and bounds are L2 norms relative to the float64 output's. onnxruntime may be off by FACTOR times what
plain fp32 torch itself is off: by FLOOR in any case, by CEILING in none.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from doconv_convert.errors import DoconvError

Array = npt.NDArray[Any]

# Over 19 torchvision networks with random batch-norm statistics onnxruntime was off by 0.37 to 1.39 times what
# fp32 torch was off (optimizations on or off), over 13 randomized ones by 0.53 to 1.25.
FACTOR = 4.0
# Where fp32 torch happens to be nearly exact (a few layers), its own error says too little: 8 epsilon of fp32.
FLOOR = 8 * 2.0**-23
# A network that float32 itself computes worse than this has no use for a float32 file. The largest error of fp32 torch
# over the networks above is 3e-5, which allows 1.2e-4.
CEILING = 1e-3
# Two fp32 implementations of one ONNX graph differ by up to 3e-5 of the scale in deep nets; 1024 epsilon is 1.2e-4.
ONNX_BOUND = 1024 * 2.0**-23
# A kernel counts as covered where a change of 1e-3 in it is predicted to move an output by more than so many bounds.
# The real movement was at least 0.59 times the predicted one over 440 kernels of 13 networks (docs/mutations.md).
COVERED_ABOVE = 1.75


@dataclass(frozen=True)
class OutputCheck:
    """One output tensor. `error`, `plain_error` and `bound` are relative L2; `largest` is the largest absolute
    difference of an element; `variation` is how much the samples differ, relative to the output; `agreeing`, for class
    scores, the number of samples with the truth's argmax."""

    name: str
    shape: tuple[int, ...]
    error: float
    plain_error: float
    bound: float
    largest: float
    variation: float
    problem: str | None
    agreeing: int | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None


def bound_for(plain_error: float, floor: float = FLOOR) -> float:
    return min(max(FACTOR * plain_error, floor), CEILING)


def relative_error(got: Array, truth: Array) -> float:
    """||got - truth|| / ||truth|| (NaN where anything is NaN); of an all-zero truth, ||got||."""
    scale = float(np.linalg.norm(truth.ravel().astype(np.float64)))
    distance = float(np.linalg.norm((got.astype(np.float64) - truth).ravel()))
    return distance / scale if scale else distance


def compare_output(
    name: str, truth: Array, plain: Array, got: Array, samples: int, floor: float = FLOOR, varies: bool = True
) -> OutputCheck:
    """Compare one output of onnxruntime (`got`) and of plain fp32 torch with the float64 `truth`.

    `samples` is the batch: a float output whose first dimension it is must differ between samples, unless it is known
    to hold constants (not `varies`). `floor` is the least bound of a float output.
    """
    problem: str | None = None
    error = plain_error = largest = float("nan")
    bound = FLOOR
    variation = _variation(truth, samples) if varies else float("inf")
    if got.shape != truth.shape:
        problem = f"has shape {got.shape}, expected {truth.shape}"
    elif got.dtype != plain.dtype:
        problem = f"has dtype {got.dtype}, expected {plain.dtype}"
    elif truth.size == 0:
        problem = "is empty, nothing was compared; pass `input_file` with a real sample"
    elif not np.issubdtype(truth.dtype, np.floating):
        error = largest = float(np.count_nonzero(got != truth))
        plain_error = float(np.count_nonzero(plain != truth))
        bound = 0.0
        problem = f"differs in {int(error)} of {truth.size} values" if error else None
    elif not np.isfinite(truth).all():
        problem = "is not finite in the float64 run; the model or the input is broken"
    elif not np.isfinite(got).all():
        problem = f"has {int((~np.isfinite(got)).sum())} of {got.size} values that are NaN or infinite"
    else:
        error, plain_error = relative_error(got, truth), relative_error(plain, truth)
        largest = float(np.abs(got.astype(np.float64) - truth).max())
        bound = bound_for(plain_error, floor)
        if not error <= bound:
            problem = f"is off by {error:.1e} of its scale, allowed {bound:.1e}"
            if FACTOR * plain_error > CEILING:
                problem += f"; fp32 torch itself is off by {plain_error:.1e}: the network needs more than float32"
        elif variation <= bound:
            problem = "is the same for every sample"
            if variation:
                problem = f"differs between samples by {variation:.1e} of its scale, less than the tolerance"
            problem += ", which shows nothing; pass `input_file` with real samples"
    agreeing = _agreeing(truth, got, samples)
    return OutputCheck(name, tuple(truth.shape), error, plain_error, bound, largest, variation, problem, agreeing)


def compare_outputs(
    names: Sequence[str],
    truth: Sequence[Array],
    plain: Sequence[Array],
    got: Sequence[Array],
    samples: int,
    floor: float = FLOOR,
    constants: Collection[str] = (),
) -> list[OutputCheck]:
    """Every output, in order; those named in `constants` do not depend on the inputs. Raises DoconvError where the
    number of outputs differs."""
    if not len(truth) == len(plain) == len(got) == len(names):
        raise DoconvError(f"the ONNX model has {len(got)} outputs, the torch model {len(truth)}.")
    rows = zip(names, truth, plain, got, strict=True)
    return [compare_output(*row, samples, floor, row[0] not in constants) for row in rows]


def _agreeing(truth: Array, got: Array, samples: int) -> int | None:
    scores = truth.ndim == 2 and truth.shape[0] == samples and truth.shape[1] > 1
    if not scores or got.shape != truth.shape or not np.issubdtype(truth.dtype, np.floating):
        return None
    return int((got.argmax(1) == truth.argmax(1)).sum())


def _variation(truth: Array, samples: int) -> float:
    """How much the samples of a batch differ, relative to the output; infinite where there is nothing to compare."""
    batched = truth.ndim > 0 and truth.shape[0] == samples and samples > 1
    if not batched or not truth.size:
        return float("inf")
    return relative_error(np.broadcast_to(truth.mean(axis=0), truth.shape), truth)
