"""One export in a process of its own: an exporter's memory and crashes stay there.

`python -m doconv_convert.artifacts.export.child_process` is asked with an ExportJob (`json_process.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doconv_convert.artifacts.export.job import ExportJob
from doconv_convert.artifacts.export.json_process import JsonProcess, ProcessDied, serve
from doconv_convert.artifacts.sources.source import build
from doconv_convert.errors import DoconvError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from doconv_convert.artifacts.export.exporter import ExportReport


logger = logging.getLogger(__name__)


class Child(JsonProcess):
    """A process that exports: it imports torch while the caller is still busy, and takes one job after another.

    With `reuse` it lives on after a job, else `export_in_child` closes it; a closed one starts anew when needed.
    """

    def __init__(self, *, reuse: bool = False) -> None:
        self.reuse = reuse
        # An export is Python's work, not OpenMP's: threads of several processes only wait for each other, spinning.
        super().__init__("doconv_convert.artifacts.export.child_process", OMP_NUM_THREADS="1")

    def export(self, job: ExportJob) -> ExportReport:
        """Raises what `export_onnx` and `build` raise, and DoconvError where the process dies, with its last words."""
        try:
            fields = self.ask(job.to_json())
        except ProcessDied as died:
            hint = "; out of memory? use a smaller input, or fewer at a time" if died.out_of_memory else ""
            raise DoconvError(f"the process that exports '{job.source.text}' to '{job.path}' {died}{hint}") from None
        if "report" not in fields:
            raise UsageError(fields["usage"]) if "usage" in fields else DoconvError(fields["error"])
        return _report_from_json(fields["report"])


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


def _prepare() -> Callable[[Any], dict[str, Any]]:
    """The child: an expected error is an answer too."""
    import doconv_convert.artifacts.export.exporter  # noqa: F401 (takes seconds)

    _keep_operator_table()

    def answer(job: Any) -> dict[str, Any]:
        try:
            return {"report": asdict(_export(ExportJob.from_json(job)))}
        except DoconvError as error:
            return {"usage" if isinstance(error, UsageError) else "error": str(error)}

    return answer


def _keep_operator_table() -> None:
    """torch's exporter reads the source of its 500 operators anew for every export, a second each: once will do."""
    with suppress(ImportError, AttributeError):  # no public name: another version of torch may not have it
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]


def _export(job: ExportJob) -> ExportReport:
    import torch

    from doconv_convert.artifacts.export.exporter import export_onnx
    from doconv_convert.artifacts.export.twin import export_twin

    dtype = getattr(torch, job.dtype)
    model = _model(job).to(dtype)
    arrays = [array.to(dtype) if array.is_floating_point() else array for array in _arrays(job.inputs_file)]
    inputs = (arrays,) if job.image_list else tuple(arrays)
    report = export_onnx(model, inputs, job.path, **vars(job.flags))
    return report if job.twin is None else replace(report, no_twin=export_twin(model, inputs, job.twin, job.flags))


def _model(job: ExportJob) -> nn.Module:
    from doconv_convert.artifacts.checkpoints.checkpoint import load_into, load_strictly
    from doconv_convert.artifacts.checkpoints.reading import read_checkpoint
    from doconv_convert.rewrite.fold import fold_in_place

    def fold(model: nn.Module) -> nn.Module:
        constant = job.constant_kernels
        return fold_in_place(model, constant_kernels=constant, check_first=False, merge=job.merge).model

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
    serve(_prepare)
