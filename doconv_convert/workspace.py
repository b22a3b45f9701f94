"""Hidden folders for unfinished files, beside the place where the finished ones go.

A folder is its owner's while the lock on the file in it is held, which the end of the process sets free, however it
ends. What `kill -9` left is removed by the next run that works in the same place.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from doconv_convert.interrupts import undone

try:
    import fcntl
except ImportError:  # Windows has no such locks, and nothing is swept there
    fcntl = None  # type: ignore[assignment]

_OURS = re.compile(r"\..*\.doconv-[0-9a-f]{16}\.tmp", re.DOTALL)
_LOCK = ".lock"
_LONGEST_NAME = 100  # of the target's name, in the folder's
# How often, 50 ms apart, removing is tried: a killed child may be in the middle of its last write.
_TRIES = 20


@contextmanager
def workspace(beside: Path, name: str) -> Iterator[Path]:
    """A new private folder in the folder `beside`, for what becomes `name` there; it goes with the scope and when a
    signal ends the process. What dead processes left in `beside` is removed first. Raises OSError."""
    sweep(beside)
    folder, lock = _make(beside, name)
    try:
        with undone(lambda: _remove(folder)):
            yield folder
    finally:
        _remove(folder)
        if lock is not None:
            os.close(lock)


def sweep(place: Path) -> None:
    """Removes the folders that processes of ours and this user left in `place` when they were killed."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            if _OURS.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):
                    if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                        _sweep_one(Path(entry.path))


def _sweep_one(folder: Path) -> None:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # killed before the lock was made; only an empty folder goes
        folder.rmdir()
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: somebody works there, or no locks here
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _make(beside: Path, name: str) -> tuple[Path, int | None]:
    short = os.fsdecode(os.fsencode(name)[:_LONGEST_NAME])
    while True:
        folder = beside / f".{short}.doconv-{secrets.token_hex(8)}.tmp"
        folder.mkdir(mode=0o700)
        if fcntl is None:
            return folder, None
        with suppress(FileNotFoundError):  # another run swept it before it was locked
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            with suppress(OSError):  # a file system without locks, where nobody sweeps
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / _LOCK).exists():
                return folder, lock
            os.close(lock)


def _remove(folder: Path) -> None:
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)
