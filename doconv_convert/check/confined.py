"""Work on files of unknown origin in a process of its own, with limits on its time and memory.

A file of a few bytes can ask for any amount of work, and onnx and onnxruntime are native code that some files crash.
`python -m doconv_convert.check.confined` calls functions of this package by name (`json_process.py`), whose arguments
and results are JSON. Importing this imports neither onnx nor onnxruntime, so that a caller can be busy while the
process starts. Where the system has no such limits (Windows), time is limited alone.
"""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from doconv_convert.artifacts.export.json_process import JsonProcess, ProcessDied, serve
from doconv_convert.errors import CheckFailedError, DoconvError, UsageError
from doconv_convert.words import clipped

# A file of 100,000 nodes takes 4 s.
SECONDS = 10.0
# Waiting (for a disk, for other processes) is no work, but has an end, too.
_WAITING = 10.0
# Python, onnx and numpy take 60 MB of these, a file while it is read three times its size.
BYTES = 800 * 2**20
_TIMES_SIZE = 3
# A run: outputs are computed with optimizations on and off, at most three times (`retry_in_float64`). No network of
# docs/zoo.md took fewer MACs a second of computing.
_RUNS, _MACS_PER_SECOND, _MOST_SECONDS = 6, 2e8, 3600.0
# Its activations: four bytes for nine products or more. Threads have stacks of their own.
_BYTES_PER_MAC, _BYTES_PER_THREAD = 0.5, 1 << 24
_KINDS = {"usage": UsageError, "failed": CheckFailedError, "error": DoconvError}
_LONGEST = 3000  # of an error, which names parts of the file
_PACKAGE = "doconv_convert."


@dataclass(frozen=True)
class Limits:
    """Of one call: seconds of computing, and bytes of memory that may be taken beyond what `files` need."""

    seconds: float = SECONDS
    bytes: int = BYTES


def run_limits(macs: int, files: Sequence[Path], timeout: float | None) -> Limits:
    """What running a model may take, by the MACs that were counted in it and the size of its files: a model that
    multiplies little ends soon."""
    size = sum(path.stat().st_size for path in files if path.is_file())
    seconds = min(SECONDS + _RUNS * macs / _MACS_PER_SECOND, _MOST_SECONDS)
    memory = BYTES + _BYTES_PER_THREAD * (os.cpu_count() or 1) + 4 * size + int(_BYTES_PER_MAC * macs)
    return Limits(timeout or seconds, min(memory, 1 << 50))


class Confined(JsonProcess):
    """The process. `call` raises what the function raised that is an error of ours, and DoconvError where the process
    came to its limits or died."""

    def __init__(self) -> None:
        super().__init__("doconv_convert.check.confined", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

    def call(self, function: str, file: Path, *arguments: Any, limits: Limits | None = None) -> Any:
        """`function` is 'check.macs.counting:counted', called with `file` and the other `arguments`. Messages name
        `file`, whose size the limit of memory follows."""
        limits = limits or Limits()
        size = file.stat().st_size if file.is_file() else 0
        question = {
            "function": function,
            "arguments": [str(file), *arguments],
            "seconds": limits.seconds,
            "bytes": limits.bytes + _TIMES_SIZE * size,
        }
        try:
            answer = self.ask(question, limits.seconds + _WAITING)
        except ProcessDied as died:
            raise DoconvError(f"'{file}' {_reason(died, limits)}") from None
        if "error" in answer:
            raise _KINDS[answer["kind"]](answer["error"])
        return answer["result"]


@contextmanager
def confined() -> Iterator[Confined]:
    """A process that starts now and is ended with the scope."""
    process = Confined()
    try:
        yield process
    finally:
        process.close()


def _reason(died: ProcessDied, limits: Limits) -> str:
    if died.timed_out or died.code == -getattr(signal, "SIGXCPU", signal.SIGTERM):
        return f"took more than {limits.seconds:.0f} s of work; if it is worth that, give it more with `timeout`"
    if died.code == -getattr(signal, "SIGXFSZ", signal.SIGTERM):
        return "made onnx print without end: it is not a usable model"
    return f"crashes the libraries that read it, so it is not a usable model (their process {died})"


def _prepare() -> Callable[[Any], dict[str, Any]]:
    importlib.import_module("doconv_convert.check.macs.counting")  # what nearly all calls need

    def answer(question: Any) -> dict[str, Any]:
        _limit(question["seconds"], question["bytes"])
        module, _, name = question["function"].partition(":")
        place = question["arguments"][0]
        try:
            function = getattr(importlib.import_module(_PACKAGE + module), name)
            return {"result": function(*question["arguments"])}
        except DoconvError as error:
            kind = next(name for name, one in _KINDS.items() if isinstance(error, one))
            return {"error": clipped(str(error), _LONGEST), "kind": kind}
        except MemoryError:
            return {"error": f"'{place}' takes more than {question['bytes'] >> 20} MiB of memory", "kind": "error"}
        except RecursionError:
            return {"error": f"'{place}' nests its parts too deeply to be read", "kind": "error"}

    return answer


def _limit(seconds: float, size: int) -> None:
    """The limits of the next call, of time from now on."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = used.ru_utime + used.ru_stime
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, int(spent + seconds) + 1),
        (resource.RLIMIT_FSIZE, 1 << 26),
        (resource.RLIMIT_DATA, size),  # not the address space: threads reserve much of it and use little
    ):
        hard = resource.getrlimit(kind)[1]
        with suppress(ValueError, OSError):  # the system's own limit is lower, or it has none of this kind
            resource.setrlimit(kind, (limit, hard))


if __name__ == "__main__":
    serve(_prepare)
