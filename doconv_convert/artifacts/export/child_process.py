"""One export in a process of its own: an exporter's memory and crashes stay there.

`python -m doconv_convert.artifacts.export.child_process` reads an ExportJob as JSON from stdin and answers on stdout.
A fresh interpreter, not a fork: OpenMP's threads do not survive forking.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from doconv_convert.artifacts.export.job import ExportJob
from doconv_convert.artifacts.sources.source import build
from doconv_convert.errors import DoconvError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from doconv_convert.artifacts.export.exporter import ExportReport


logger = logging.getLogger(__name__)

# torch gives back little memory: a fresh process takes over after so many exports.
_JOBS_A_PROCESS = 8


class Child:
    """A process that exports: it imports torch while the caller is still busy, and takes one job after another.

    With `reuse` it lives on after a job, else `export_in_child` closes it; a closed one starts anew when needed.
    """

    def __init__(self, *, reuse: bool = False) -> None:
        self.reuse = reuse
        self._jobs = 0
        self._start()

    def export(self, job: ExportJob) -> ExportReport:
        """Raises what `export_onnx` and `build` raise, and DoconvError where the process dies, with its last words."""
        if self._process.poll() is not None:
            self._start()
        answer = self._ask(json.dumps(job.to_json()))
        self._jobs += 1
        if not answer:
            raise _death(job, *self._end())
        if self._jobs == _JOBS_A_PROCESS:
            self.close()
        fields = json.loads(answer)
        if "report" not in fields:
            raise UsageError(fields["usage"]) if "usage" in fields else DoconvError(fields["error"])
        return _report_from_json(fields["report"])

    def close(self) -> None:
        """Ends the process, in the middle of a job too."""
        self._process.kill()
        self._end()

    def _start(self) -> None:
        # the parent's import path and nothing else: a folder `timm` where the user stands must not win
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (a pipe could fill up)
        self._jobs = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "doconv_convert.artifacts.export.child_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            encoding="utf-8",
            errors="replace",
            # An export is Python's work, not OpenMP's: threads of several processes only wait for each other, spinning.
            env=os.environ
            | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        )

    def _ask(self, line: str) -> str:
        """The answer's line; empty where the process died."""
        questions, answers = self._process.stdin, self._process.stdout
        if questions is None or answers is None:
            return ""
        with suppress(BrokenPipeError):
            questions.write(line + "\n")
            questions.flush()
        return answers.readline()

    def _end(self) -> tuple[int, str]:
        """The exit code of the process that ends, and what it said."""
        with suppress(BrokenPipeError):
            self._process.communicate()
        if self._words.closed:
            return self._process.returncode, ""
        with self._words:
            self._words.seek(0)
            return self._process.returncode, self._words.read()


@contextmanager
def waiting_children(count: int, *, reuse: bool = False) -> Iterator[list[Child]]:
    """Children that import torch while the caller is still busy; all are ended with the scope."""
    children = [Child(reuse=reuse) for _ in range(count)]
    try:
        yield children
    finally:
        for child in children:
            child.close()


def export_in_child(
    jobs: Sequence[ExportJob], *, parallel: bool = False, waiting: Sequence[Child] = ()
) -> list[ExportReport]:
    """Runs each job in its own process, side by side if `parallel`; the reports come in the jobs' order.

    The `waiting` children take the first jobs, new ones the rest. One after the other (large models), no process
    keeps its memory while the next works. Raises what `Child.export` raises.
    """

    def run(job: ExportJob, waiting: Child | None) -> ExportReport:
        child = waiting or Child()
        try:
            report = child.export(job)
            batch = "dynamic" if report.dynamic_batch else "static"
            logger.info("'%s': the %s exporter, opset %d, %s batch", report.path, report.exporter, report.opset, batch)
            return report
        finally:
            if not (child.reuse and parallel):
                child.close()

    with ThreadPoolExecutor(len(jobs) if parallel and jobs else 1) as threads:
        return list(threads.map(run, jobs, chain(waiting, repeat(None))))


def main() -> None:
    """The child: a job a line on stdin, an answer a line on stdout. An expected error is an answer too, the rest a
    traceback on stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an exporter or a model prints must not get among the answers
    jobs: SimpleQueue[str] = SimpleQueue()
    Thread(target=_listen, args=(jobs,), daemon=True).start()
    # This takes seconds, and the job may still be in the making.
    importlib.import_module("doconv_convert.artifacts.export.exporter")
    while True:
        line = jobs.get()
        try:
            answer: dict[str, Any] = {"report": asdict(_export(ExportJob.from_json(json.loads(line))))}
        except DoconvError as error:
            answer = {"usage" if isinstance(error, UsageError) else "error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _listen(jobs: SimpleQueue[str]) -> None:
    """Passes the lines of stdin on. Its end is the parent's: an export that nobody waits for must not go on."""
    for line in sys.stdin:
        jobs.put(line)
    os._exit(0)


def _death(job: ExportJob, code: int, said: str) -> DoconvError:
    end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    # the kernel's answer to a machine without free memory
    hint = "; out of memory? use a smaller input, or fewer at a time" if code == -9 else ""
    words = [line.strip() for line in said.splitlines() if line.strip()]
    last = words[-1] if words else "it said nothing"
    return DoconvError(f"the process that exports '{job.source.text}' to '{job.path}' {end}: {last}{hint}")


def _export(job: ExportJob) -> ExportReport:
    import torch

    from doconv_convert.artifacts.export.exporter import export_onnx

    dtype = getattr(torch, job.dtype)
    model = _model(job).to(dtype)
    inputs = [array.to(dtype) if array.is_floating_point() else array for array in _arrays(job.inputs_file)]
    return export_onnx(model, (inputs,) if job.image_list else tuple(inputs), job.path, **vars(job.flags))


def _model(job: ExportJob) -> nn.Module:
    from doconv_convert.artifacts.checkpoints.checkpoint import load_into, load_strictly
    from doconv_convert.artifacts.checkpoints.reading import read_checkpoint
    from doconv_convert.rewrite.fold import fold_in_place

    def fold(model: nn.Module) -> nn.Module:
        return fold_in_place(model, constant_kernels=job.constant_kernels, check_first=False).model

    model = build(job.source)
    if job.checkpoint is None:
        model = fold(model) if job.fold_foreign else model
        load_strictly(model, read_checkpoint(job.state_file).state, str(job.state_file))
        return model
    return fold(load_into(model, read_checkpoint(job.checkpoint, job.selection), job.options))


def _arrays(path: Path) -> list[Any]:
    import numpy as np
    import torch

    with np.load(path, allow_pickle=False) as arrays:
        return [torch.from_numpy(arrays[f"input_{index}"]) for index in range(len(arrays.files))]


def _report_from_json(data: Mapping[str, Any]) -> ExportReport:
    from doconv_convert.artifacts.export.exporter import ExportReport

    named = {key: [(name, shape) for name, shape in data[key]] for key in ("inputs", "outputs")}
    return ExportReport(**{**data, **named})


if __name__ == "__main__":
    main()
