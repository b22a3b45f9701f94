"""A process of our own that answers questions: both are JSON, a line each. It does not outlive its parent.

A fresh interpreter, not a fork: OpenMP's threads do not survive forking.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Thread, Timer
from typing import Any, NoReturn

# torch gives back little memory: a fresh process takes over after so many answers.
ANSWERS_A_PROCESS = 8


class ProcessDied(Exception):
    """The process ended instead of answering, with `code` (-N: by signal N), and what it `said` on stderr. `timed_out`:
    it was ended, since it took too long."""

    def __init__(self, code: int, said: str, timed_out: bool = False) -> None:
        self.code, self.timed_out = code, timed_out
        words = [line.strip() for line in said.splitlines() if line.strip()]
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        super().__init__(f"{end}: {words[-1] if words else 'it said nothing'}")
        self.out_of_memory = (
            code == -signal.SIGKILL and not timed_out
        )  # the kernel's answer to a machine without free memory


class JsonProcess:
    """`python -m MODULE ARGUMENTS`, which calls `serve`. It starts at once, and anew when it is asked after its end."""

    def __init__(self, module: str, *arguments: str, **environment: str) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = environment
        self._start()

    def ask(self, question: Any, timeout: float | None = None) -> Any:
        """Raises ProcessDied, also after `timeout` seconds."""
        if self._process.poll() is not None:
            self._start()
        late = Event()
        clock = None if timeout is None else Timer(timeout, self._give_up, (self._process, late))
        if clock is not None:
            clock.start()
        answer = self._ask(json.dumps(question))
        if clock is not None:
            clock.cancel()
        self._answers += 1
        if not answer:
            raise ProcessDied(*self._end(), late.is_set())
        if self._answers == ANSWERS_A_PROCESS:
            self.close()
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process, in the middle of an answer too."""
        self._process.kill()
        self._end()

    @staticmethod
    def _give_up(process: subprocess.Popen[str], late: Event) -> None:
        late.set()
        process.kill()

    def _start(self) -> None:
        # the parent's import path and nothing else: a folder `timm` where the user stands must not win
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (a pipe could fill up)
        self._answers = 0
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ
            | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "utf-8"}
            | self._environment,
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


def serve(prepare: Callable[[], Callable[[Any], Any]]) -> NoReturn:
    """The process itself: answers what it reads, by what `prepare` returns. That may take seconds, in which the first
    question may still be in the making. An exception is a traceback on stderr, and the process' end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an exporter or a model prints must not get among the answers
    questions: SimpleQueue[str] = SimpleQueue()
    Thread(target=_listen, args=(questions,), daemon=True).start()
    answer = prepare()
    while True:
        print(json.dumps(answer(json.loads(questions.get()))), file=answers, flush=True)


def _listen(questions: SimpleQueue[str]) -> None:
    """Passes the lines of stdin on. Its end is the parent's: work that nobody waits for must not go on."""
    for line in sys.stdin:
        questions.put(line)
    os._exit(0)
