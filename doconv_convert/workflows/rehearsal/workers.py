"""Processes that rehearse side by side; the death of one is its model's result, not the command's end.

`python -m doconv_convert.workflows.rehearsal.workers WORKERS CHILDREN` is asked with the arguments of `rehearse`
(`json_process.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any

from doconv_convert.artifacts.export.json_process import JsonProcess, ProcessDied, serve


def rehearse_side_by_side(
    todo: Sequence[str], settings: dict[str, Any], jobs: int, children: int
) -> Iterator[dict[str, Any]]:
    """The results of `rehearse`, as JSON, in the order of their ends; `children` export for each process."""
    jobs = min(jobs, len(todo))
    workers = [JsonProcess(__name__, str(jobs), str(children)) for _ in range(jobs)]
    free: SimpleQueue[JsonProcess] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def run(text: str) -> dict[str, Any]:
        worker = free.get()
        try:
            result: dict[str, Any] = worker.ask({"source": text, **settings})
            return result
        except ProcessDied as died:
            return _failed(text, died)
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


def _failed(text: str, died: ProcessDied) -> dict[str, Any]:
    from doconv_convert.workflows.rehearsal.result import Rehearsal, Step

    hint = "; out of memory? Rehearse it alone, or with fewer `jobs`." if died.out_of_memory else ""
    return Rehearsal(text, [Step("process", "failed", f"its process {died}{hint}", 0.0)]).to_json()


def _prepare() -> Callable[[Any], dict[str, Any]]:
    import torch

    from doconv_convert.artifacts.export.child_process import Child
    from doconv_convert.workflows.rehearsal.rehearse import rehearse

    workers, children = map(int, sys.argv[1:])
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    waiting = [Child(reuse=True) for _ in range(children)]  # they live as long as this process does
    return lambda asked: rehearse(**asked, waiting=waiting).to_json()


if __name__ == "__main__":
    serve(_prepare)
