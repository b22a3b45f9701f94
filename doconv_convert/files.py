"""Files that are never half written: a temporary file beside the target, fsync, one rename.

A model above 2 GiB is two files, `out.onnx` and its data. The data file carries its content's hash in its
name and is renamed first, so the old `out.onnx` keeps the data it refers to until one rename puts the new
pair in force; data files of earlier versions are deleted after that.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from doconv_convert.errors import DoconvError

try:
    import fcntl
except ImportError:  # Windows has no locks on folders
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yields an empty temporary file beside `target`: it replaces `target`, or on any exception is removed.

    Raises DoconvError where the target cannot be written.
    """
    with temporary_beside(target) as temporary:
        yield temporary
        with _refused(target, temporary):
            _replace(temporary, target)


def check_writable(target: Path) -> None:
    """Raises, before hours of work, the DoconvError that `atomic_write(target)` would raise after them."""
    with temporary_beside(target):
        pass


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Yields an empty temporary file in `target`'s folder; removes it afterwards, unless it was moved away.

    Raises DoconvError where `target` is no place for a file, or writing fails (disk full).
    """
    with _refused(target, target):
        _check_place(target)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    try:
        with _refused(target, temporary):
            # not tempfile: its files are private (0600), and the mode would survive the rename
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink()


def install_files(moves: Sequence[tuple[Path, Path]]) -> None:
    """Puts finished files in their places, in order, each by one rename within its file system.

    Files that belong together come from one writer: while it renames, others that install into these folders wait.
    Raises DoconvError where a place cannot be written.
    """
    with ExitStack() as locks:
        for folder in sorted({target.parent.resolve() for _, target in moves}):
            locks.enter_context(_locked(folder))
        for finished, target in moves:
            with _refused(target, finished):
                _replace(finished, target)


def publish_data(temporary: Path, target: Path) -> str:
    """Moves the finished data file `temporary` beside `target`, under a name made of its content: returned.

    The caller writes the name into the file it then puts at `target` by `atomic_write`, and calls
    `remove_stale_data`.
    """
    name = f"{target.name}.{content_hash(temporary)[:16]}.data"
    with _refused(target, temporary):
        _replace(temporary, target.parent / name)
    return name


def remove_stale_data(target: Path, keep: str | None = None) -> None:
    """Deletes earlier external data of `target`, `NAME.data` and `NAME.<hash>.data`, all but `keep`."""
    data_file = re.compile(re.escape(target.name) + r"(\.[0-9a-f]{16})?\.data")
    for path in target.parent.iterdir():
        if data_file.fullmatch(path.name) and path.name != keep:
            with _refused(path, path):
                path.unlink()


def content_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises DoconvError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise DoconvError(f"'{path}' cannot be read ({error.strerror or error}).") from error
    return digest.hexdigest()


def _check_place(target: Path) -> None:
    folder = target.parent
    if target.is_dir():
        raise DoconvError(f"cannot write '{target}': it is a folder; name a file in it")
    if target.exists() and not target.is_file():
        raise DoconvError(f"cannot write '{target}': it is not a regular file; name another one")
    if not folder.exists():
        raise DoconvError(f"cannot write '{target}': the folder '{folder}' does not exist; create it first")
    if not folder.is_dir():
        raise DoconvError(f"cannot write '{target}': '{folder}' is not a folder; choose another path")


@contextmanager
def _refused(target: Path, temporary: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write `temporary` into a DoconvError about `target`."""
    try:
        yield
    except OSError as error:
        # a copy that fails names its source first
        if error.filename is not None and str(temporary) not in (str(error.filename), str(error.filename2)):
            raise  # about some other file that the caller's own code opened
        reason = error.strerror or str(error)
        raise DoconvError(f"cannot write '{target}': {reason}; free the place or choose another folder") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; a kill sets the folder free."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(temporary: Path, target: Path) -> None:
    _sync(temporary)
    os.replace(temporary, target)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync(target.parent)


def _sync(path: Path) -> None:
    # Windows flushes only handles that are open for writing; POSIX opens folders only for reading
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_file(path: Path, expected: str) -> None:
    """Raises DoconvError where there is no regular file: opening a pipe or a device could wait for ever."""
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise DoconvError(f"'{path}' {what}; expected {expected}.")
