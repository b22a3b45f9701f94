"""Being told to end (SIGINT, SIGTERM, SIGHUP): what the process made for itself goes, then it ends.

An exception alone would not do: it is lost in callbacks of weak references and in `except BaseException`, executors
wait for their threads, and a native call makes it wait. So the handler itself undoes what is registered here and ends
the process. Only a command installs it (`end_on_signals`); in a library's caller Ctrl-C stays a KeyboardInterrupt.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# A main thread in a native call does not run handlers: after so many seconds another thread ends the process.
GRACE = 0.8

_processes: dict[object, Callable[[], None]] = {}
_folders: dict[object, Callable[[], None]] = {}
_farewells: list[Callable[[int], None]] = []
_ended = threading.Lock()
_held = 0
_pending: int | None = None


@contextmanager
def undone(undo: Callable[[], None], *, process: bool = False) -> Iterator[None]:
    """Within the scope a signal calls `undo`; those of a `process` come first, since it may still write into folders.

    Raises KeyboardInterrupt where the process is ending already.
    """
    if _ended.locked():
        raise KeyboardInterrupt
    registered, key = _processes if process else _folders, object()
    registered[key] = undo
    try:
        yield
    finally:
        del registered[key]


@contextmanager
def held() -> Iterator[None]:
    """A signal that arrives within the scope takes effect at its end: files that belong together are all renamed."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if _pending is not None and not _held:
            _end(_pending)


@contextmanager
def farewell(say: Callable[[int], None]) -> Iterator[None]:
    """Within the scope `say` has the last word, and is told the signal's number."""
    _farewells.append(say)
    try:
        yield
    finally:
        _farewells.remove(say)


def end_on_signals() -> None:
    """Let signals end this process, with 128 + the signal's number; those that are ignored (nohup) stay so. For the
    main thread of a command."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


def _handle(number: int, frame: object) -> None:
    global _pending
    if _held:
        _pending = number
    else:
        _end(number)


def _watch(reading: int) -> None:
    """Ends the process where the main thread does not come to it."""
    while True:
        number = os.read(reading, 1)[0]
        if number not in SIGNALS or signal.getsignal(number) is signal.SIG_IGN:
            continue
        threading.Event().wait(GRACE)
        while _held:
            threading.Event().wait(GRACE)
        _end(number)


def _end(number: int) -> None:
    if not _ended.acquire(blocking=False):
        return
    for undo in [*reversed(_processes.values()), *reversed(_folders.values())]:
        with suppress(Exception):
            undo()
    for say in reversed(_farewells[-1:]):
        with suppress(Exception):
            say(number)
    os._exit(128 + number)
