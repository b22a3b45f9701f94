"""One export in a process of its own: an exporter's memory and crashes stay there.

`python -m doconv_convert.artifacts.export_child` reads an ExportJob as JSON from stdin and answers on stdout.
A fresh interpreter, not a fork: OpenMP's threads do not survive forking.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doconv_convert.artifacts.sources import Source, build
from doconv_convert.errors import DoconvError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from doconv_convert.artifacts.onnx_export import ExportReport


@dataclass(frozen=True)
class ExportJob:
    """What the child needs: `source` draws the network, `state_file` (safetensors) is its whole state dict.

    `inputs_file` is an .npz with the arrays 'input_0', 'input_1', ...: forward's positional arguments, or
    with `image_list` the images of the one list that it takes. The rest is as in `export_onnx`.
    """

    source: Source
    state_file: Path
    inputs_file: Path
    path: Path
    opset: int | None = None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    dynamic_batch: bool = True
    dynamic: Mapping[str, Mapping[int, str]] | None = None
    dtype: str = "float32"
    image_list: bool = False


def export_in_child(jobs: Sequence[ExportJob], *, parallel: bool = False) -> list[ExportReport]:
    """Runs each job in its own new process, side by side if `parallel`; the reports come in the jobs' order.

    Raises what `export_onnx` and `build` raise, and DoconvError where a process dies, with its last words.
    """
    with ThreadPoolExecutor(len(jobs) if parallel and jobs else 1) as threads:
        return list(threads.map(_run, jobs))


def main() -> None:
    """The child: stdin to stdout. An expected error is an answer too, the rest a traceback on stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an exporter or a model prints must not get among the answers
    try:
        answer: dict[str, Any] = {"report": asdict(_export(_job_from_json(json.load(sys.stdin))))}
    except DoconvError as error:
        answer = {"usage" if isinstance(error, UsageError) else "error": str(error)}
    with answers:
        json.dump(answer, answers)


def _run(job: ExportJob) -> ExportReport:
    # the parent's import path and nothing else: a folder `timm` where the user stands must not win
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    process = subprocess.run(
        [sys.executable, "-m", "doconv_convert.artifacts.export_child"],
        input=json.dumps(_job_to_json(job)),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    if process.returncode != 0:
        raise _death(job, process)
    answer = json.loads(process.stdout)
    if "report" not in answer:
        raise UsageError(answer["usage"]) if "usage" in answer else DoconvError(answer["error"])
    return _report_from_json(answer["report"])


def _death(job: ExportJob, process: subprocess.CompletedProcess[str]) -> DoconvError:
    code = process.returncode
    end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    words = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    last = words[-1] if words else "no message; it may have run out of memory"
    return DoconvError(f"the process that exports '{job.source.text}' to '{job.path}' {end}: {last}")


def _export(job: ExportJob) -> ExportReport:
    import torch

    from doconv_convert.artifacts.onnx_export import export_onnx

    dtype = getattr(torch, job.dtype)
    model = build(job.source).to(dtype)
    _load(model, job)
    inputs = [array.to(dtype) if array.is_floating_point() else array for array in _arrays(job.inputs_file)]
    return export_onnx(
        model,
        (inputs,) if job.image_list else tuple(inputs),
        job.path,
        opset=job.opset,
        input_names=job.input_names,
        output_names=job.output_names,
        dynamic_batch=job.dynamic_batch,
        dynamic=job.dynamic,
    )


def _load(model: nn.Module, job: ExportJob) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(job.state_file), strict=True)
    except (OSError, SafetensorError) as error:
        raise DoconvError(f"cannot read '{job.state_file}': {error}; write it again") from error
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 600)
        raise DoconvError(
            f"'{job.state_file}' does not fit '{job.source.text}': {reason}; name the source it was made from"
        ) from error


def _arrays(path: Path) -> list[Any]:
    import numpy as np
    import torch

    with np.load(path, allow_pickle=False) as arrays:
        return [torch.from_numpy(arrays[f"input_{index}"]) for index in range(len(arrays.files))]


def _job_to_json(job: ExportJob) -> dict[str, Any]:
    paths = {key: os.fspath(getattr(job, key)) for key in ("state_file", "inputs_file", "path")}
    # JSON has only text for keys: axes go as pairs
    dynamic = {name: list(axes.items()) for name, axes in job.dynamic.items()} if job.dynamic else None
    return vars(job) | paths | {"source": job.source.to_json(), "dynamic": dynamic}


def _job_from_json(data: Mapping[str, Any]) -> ExportJob:
    paths = {key: Path(data[key]) for key in ("state_file", "inputs_file", "path")}
    dynamic = data["dynamic"] and {name: dict(axes) for name, axes in data["dynamic"].items()}
    return ExportJob(**{**data, **paths, "source": Source.from_json(data["source"]), "dynamic": dynamic})


def _report_from_json(data: Mapping[str, Any]) -> ExportReport:
    from doconv_convert.artifacts.onnx_export import ExportReport

    named = {key: [(name, shape) for name, shape in data[key]] for key in ("inputs", "outputs")}
    return ExportReport(**{**data, **named})


if __name__ == "__main__":
    main()
