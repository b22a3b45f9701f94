"""What onnxruntime says of a file: its interface, and its outputs in one run on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from doconv_convert.check.onnx_files.external_data import require_own_data
from doconv_convert.check.onnx_files.model import read_model
from doconv_convert.check.outputs.compare import Array
from doconv_convert.check.outputs.float64_copy import in_float64
from doconv_convert.errors import DoconvError

# onnxruntime's key for where the external data of a model in memory lies
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_SMALL = 64  # elements


class OnnxSession:
    """A file in onnxruntime on the CPU, as it is or, `precise`, with sums and sigmoids in float64 (`in_float64`).

    Raises DoconvError where it cannot be loaded, asks for data that is not its own, or `run` cannot run it or takes
    more than `timeout` seconds.
    """

    def __init__(
        self, path: Path, *, optimize: bool = True, precise: bool = False, timeout: float | None = None
    ) -> None:
        require_own_data(path)
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)
        self.path, self.precise, self.timeout = path, precise, timeout
        options = onnxruntime.SessionOptions()
        # Waiting threads would take the cores from the exports and rehearsals that run beside this.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        model: str | bytes = str(path)
        if precise:
            folder = str(path.parent.absolute())
            model = _with_small_tensors(in_float64(read_model(path)), folder).SerializeToString()
            options.add_session_config_entry(_DATA_FOLDER, folder)
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
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
            values = self._values(feeds)
        except DoconvError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items())
            raise DoconvError(f"onnxruntime cannot run '{self.path}' on {shapes}: {_first_line(error)}") from error
        for name, value in zip(self.outputs, values, strict=True):
            if not isinstance(value, np.ndarray | np.generic):
                raise DoconvError(
                    f"output '{name}' of '{self.path}' is a sequence or a map: only tensors can be compared."
                )
        return [np.asarray(value) for value in values]

    def _values(self, feeds: Mapping[str, Array]) -> Any:
        if self.timeout is None:
            return self._session.run(None, feeds)
        import onnxruntime

        options = onnxruntime.RunOptions()
        clock = Timer(self.timeout, setattr, (options, "terminate", True))
        clock.start()
        try:
            return self._session.run(None, feeds, options)
        except Exception:
            if not options.terminate:
                raise
            text = f"'{self.path}' took more than {self.timeout:.0f} s of work; if it is worth that, give it more with"
            raise DoconvError(f"{text} `timeout`") from None
        finally:
            clock.cancel()


def run_onnx(path: Path, inputs: Sequence[Array]) -> tuple[list[str], list[Array]]:
    """(output names, values) of one run in onnxruntime on the CPU. Raises DoconvError where it cannot run."""
    session = OnnxSession(path)
    return session.outputs, session.run(inputs)


def _with_small_tensors(model: ModelProto, folder: str) -> ModelProto:
    """Axes and shapes read from the external data: of a model in memory onnxruntime wants to see them."""
    for tensor in model.graph.initializer:
        if uses_external_data(tensor) and math.prod(tensor.dims) <= _SMALL:
            load_external_data_for_tensor(tensor, folder)
            # which onnx 1.18 leaves as they were
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    return model


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
