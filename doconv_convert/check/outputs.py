"""Comparing outputs: per tensor its name, shape, dtype, finiteness and values, against a float64 run.

Errors and bounds are L2 norms relative to the float64 output's. onnxruntime may be off by FACTOR times what
plain fp32 torch itself is off, and by FLOOR in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from doconv_convert.check.onnx_model import read_model
from doconv_convert.errors import DoconvError

Array = npt.NDArray[Any]

# Over 19 torchvision networks with random batch-norm statistics onnxruntime was off by 0.37 to 1.39 times what
# fp32 torch was off (optimisations on or off), over 13 lively ones by 0.53 to 1.25.
FACTOR = 4.0
# Where fp32 torch happens to be nearly exact (a few layers), its own error says too little: 8 epsilon of fp32.
FLOOR = 8 * 2.0**-23
# A kernel counts as covered where a change of 1e-3 in it is predicted to move an output by more than so many bounds.
# The real movement was at least 0.59 times the predicted one over 440 kernels of 13 networks (docs/mutations.md).
SEEN = 1.75


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


def bound_for(plain_error: float) -> float:
    return max(FACTOR * plain_error, FLOOR)


def relative_error(got: Array, truth: Array) -> float:
    """||got - truth|| / ||truth|| (NaN where anything is NaN); of an all-zero truth, ||got||."""
    scale = float(np.linalg.norm(truth.ravel().astype(np.float64)))
    distance = float(np.linalg.norm((got.astype(np.float64) - truth).ravel()))
    return distance / scale if scale else distance


def compare_output(name: str, truth: Array, plain: Array, got: Array, samples: int) -> OutputCheck:
    """Compare one output of onnxruntime (`got`) and of plain fp32 torch with the float64 `truth`.

    `samples` is the batch: a float output whose first dimension it is must differ between samples.
    """
    problem: str | None = None
    error = plain_error = largest = float("nan")
    bound = FLOOR
    variation = _variation(truth, samples)
    if got.shape != truth.shape:
        problem = f"has shape {got.shape}, expected {truth.shape}"
    elif got.dtype != plain.dtype:
        problem = f"has dtype {got.dtype}, expected {plain.dtype}"
    elif truth.size == 0:
        problem = "is empty, nothing was compared; pass --input with a real sample"
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
        bound = bound_for(plain_error)
        if not error <= bound:
            problem = f"is off by {error:.1e} of its scale, allowed {bound:.1e}"
        elif variation <= bound:
            problem = "is the same for every sample, which shows nothing; pass --input with real samples"
    agreeing = _agreeing(truth, got, samples)
    return OutputCheck(name, tuple(truth.shape), error, plain_error, bound, largest, variation, problem, agreeing)


def compare_outputs(
    names: Sequence[str], truth: Sequence[Array], plain: Sequence[Array], got: Sequence[Array], samples: int
) -> list[OutputCheck]:
    """Every output, in order. Raises DoconvError where the number of outputs differs."""
    if not len(truth) == len(plain) == len(got) == len(names):
        raise DoconvError(f"the ONNX model has {len(got)} outputs, the torch model {len(truth)}.")
    return [compare_output(*one, samples) for one in zip(names, truth, plain, got, strict=True)]


class OnnxSession:
    """A file in onnxruntime on the CPU. Raises DoconvError where it cannot be loaded, or `run` cannot run it."""

    def __init__(self, path: Path, *, optimise: bool = True) -> None:
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)
        self.path = path
        options = onnxruntime.SessionOptions()
        # Waiting threads would take the cores from the exports and rehearsals that run beside this.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own classes share no public base
            raise DoconvError(f"onnxruntime cannot load '{path}': {_first_line(error)}") from error
        self.inputs: list[str] = [item.name for item in self._session.get_inputs()]
        self.outputs: list[str] = [item.name for item in self._session.get_outputs()]

    @property
    def dynamic_batch(self) -> bool:
        """Whether the first dimension of an input is open."""
        return any(item.shape and not isinstance(item.shape[0], int) for item in self._session.get_inputs())

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        if len(self.inputs) != len(inputs):
            names = ", ".join(self.inputs)
            raise DoconvError(f"'{self.path}' takes {len(self.inputs)} inputs ({names}), got {len(inputs)}.")
        feeds = dict(zip(self.inputs, inputs, strict=True))
        try:
            values = self._session.run(None, feeds)
        except Exception as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
            raise DoconvError(f"onnxruntime cannot run '{self.path}' on {shapes}: {_first_line(error)}") from error
        return [np.asarray(value) for value in values]


def run_onnx(path: Path, inputs: Sequence[Array]) -> tuple[list[str], list[Array]]:
    """(output names, values) of one run in onnxruntime on the CPU. Raises DoconvError where it cannot run."""
    session = OnnxSession(path)
    return session.outputs, session.run(inputs)


def onnx_input_shapes(path: Path) -> Mapping[str, list[int | str]]:
    """Input names and shapes of a file; a dynamic dimension is its name, or "?"."""
    return {name: shape for name, (_, shape) in onnx_inputs(path).items()}


def onnx_inputs(path: Path) -> Mapping[str, tuple[np.dtype[Any], list[int | str]]]:
    """Input names, dtypes and shapes of a file. Raises DoconvError where it is no ONNX model."""
    from onnx import helper

    graph = read_model(path).graph
    known = {tensor.name for tensor in graph.initializer}
    found = {}
    for value in graph.input:
        tensor = value.type.tensor_type
        shape: list[int | str] = [dim.dim_value or dim.dim_param or "?" for dim in tensor.shape.dim]
        if value.name not in known:
            found[value.name] = helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape
    return found


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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
