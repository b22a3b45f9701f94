"""Processes that rehearse side by side; the death of one is its model's result, not the command's end."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from doconv_convert.artifacts.export.child_process import Child

# Models a process rehearses before a fresh one takes over: torch gives back little memory.
MODELS_A_PROCESS = 8


def rehearse_side_by_side(
    todo: Sequence[str], settings: dict[str, Any], jobs: int, children: int
) -> Iterator[dict[str, Any]]:
    """The results of `rehearse`, as JSON, in the order of their ends; `children` export for each process."""
    workers = [_Worker(settings, jobs, children) for _ in range(jobs)]
    free: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def run(text: str) -> dict[str, Any]:
        worker = free.get()
        try:
            return worker.rehearse(text)
        finally:
            free.put(worker)

    threads = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([threads.submit(run, text) for text in todo]):
            yield future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()


class _Worker:
    """One process, started anew after MODELS_A_PROCESS models or its death.

    Not one pool of `jobs` processes with `max_tasks_per_child`: Python's own hangs when all of them have had their
    share (python/cpython#115634), and when one dies it takes the others' models with it.
    """

    def __init__(self, settings: dict[str, Any], workers: int, children: int) -> None:
        self._settings, self._start = settings, (workers, children)
        self._pool: ProcessPoolExecutor | None = None
        self._left = 0

    def rehearse(self, text: str) -> dict[str, Any]:
        if self._left == 0:
            self.close()
        if self._pool is None:
            context = multiprocessing.get_context("spawn")  # never fork: OpenMP's threads do not survive it
            self._pool = ProcessPoolExecutor(1, context, _begin, self._start)
            self._left = MODELS_A_PROCESS
        self._left -= 1
        try:
            return self._pool.submit(_rehearse, text, self._settings).result()
        except BrokenProcessPool:
            self.close()
            return _died(text)

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def _died(text: str) -> dict[str, Any]:
    from doconv_convert.workflows.rehearsal.result import Rehearsal, Step

    reason = "its process was killed; out of memory? Rehearse it alone, or with fewer `jobs`."
    return Rehearsal(text, [Step("process", "failed", reason, 0.0)]).to_json()


# The process' own exporting children, which live as long as it does.
_waiting: list[Child] = []


def _begin(workers: int, children: int) -> None:
    import torch

    from doconv_convert.artifacts.export.child_process import Child

    threading.Thread(target=_end_with_the_command, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    _waiting.extend(Child(reuse=True) for _ in range(children))


def _end_with_the_command() -> None:
    """A pool's process does not notice that the one it works for was killed, and would keep its memory for ever."""
    command = multiprocessing.parent_process()
    if command is not None:
        command.join()
        os._exit(1)


def _rehearse(text: str, settings: dict[str, Any]) -> dict[str, Any]:
    from doconv_convert.workflows.rehearsal.rehearse import rehearse

    return rehearse(text, **settings, waiting=_waiting).to_json()
