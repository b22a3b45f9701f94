"""Files that are never half written: finished in a hidden folder beside the target, synced, renamed.

Files that belong together (a model, its data, its certificate) are renamed together: where one of them cannot be put in
place, all old ones come back.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.interrupts import held
from doconv_convert.workspace import workspace

try:
    import fcntl
except ImportError:  # Windows has no locks on folders
    fcntl = None  # type: ignore[assignment]

FREE = "free up disk space or choose another folder"


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yields an empty temporary file near `target`: it replaces `target` and takes its mode, or on any exception is
    removed.

    Raises DoconvError where the target cannot be written.
    """
    with temporary_beside(target) as temporary:
        yield temporary
        install_files([(temporary, target)])


def check_writable(target: Path) -> None:
    """Raises, before hours of work, the DoconvError that `atomic_write(target)` would raise after them."""
    with temporary_beside(target):
        pass


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Yields an empty temporary file of the same name in a folder beside `target`, which goes with the scope.

    Raises DoconvError where `target` is no place for a file, or writing fails (disk full).
    """
    with workspace_beside(target) as folder:
        temporary = folder / target.name
        with refused(target, temporary):
            # not tempfile: its files are private (0600), and the mode would survive the rename
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary


@contextmanager
def workspace_beside(target: Path) -> Iterator[Path]:
    """Yields a private folder beside `target`, which goes with the scope: what is finished there moves into place by
    renames.

    Raises DoconvError where `target` is no place for a file, or writing fails.
    """
    with refused(target, target):
        _check_place(target)
    with _workspace(target, target.parent, target.name) as folder:
        yield folder


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a private folder among the system's temporary files ($TMPDIR), which goes with the scope. Raises
    DoconvError where there is no room."""
    place = Path(tempfile.gettempdir())
    with _workspace(place, place, "scratch") as folder:
        yield folder


def install_files(moves: Sequence[tuple[Path, Path]], stale: Sequence[Path] = (), *, like: Path | None = None) -> None:
    """Puts finished files in their places, in order, each by one rename within its file system, and takes `stale` files
    away. All of it or nothing: after a failure, or Ctrl-C in between, the old files are back.

    A file that replaces another takes its mode; a new one that of `like`, if there is such a file. Files that belong
    together come from one writer: while it renames, others that install into these folders wait. Raises DoconvError
    where a place cannot be written.
    """
    for finished, target in moves:
        with refused(target, finished):
            mode = _mode(target) or (None if like is None else _mode(like))
            if mode is not None:
                finished.chmod(mode)
            _sync(finished)
    alone = len(moves) == 1 and not stale
    folders = sorted({target.parent.resolve() for _, target in moves})
    with ExitStack() as scope, ExitStack() as undo:
        for folder in folders:
            scope.enter_context(_locked(folder))
        scope.enter_context(held())
        backups = []
        for finished, target in moves:
            with refused(target, finished):
                if not alone:
                    backups.append(_back_up(target, finished, undo))
                os.replace(finished, target)
        for path in stale:
            with refused(path, path):
                backups.append(_set_aside(path, moves[0][0], undo))
        if os.name == "posix":  # elsewhere a folder cannot be opened
            for folder in folders:
                with refused(moves[0][1], folder):
                    _sync(folder)
        undo.pop_all()
        for backup in backups:
            if backup is not None:
                with suppress(OSError):
                    backup.unlink()


def stale_data(target: Path, keep: str | None = None) -> list[Path]:
    """Earlier external data of `target`, `NAME.data` and `NAME.<hash>.data`, all but `keep`."""
    data_file = re.compile(re.escape(target.name) + r"(\.[0-9a-f]{16})?\.data")
    return sorted(path for path in target.parent.iterdir() if data_file.fullmatch(path.name) and path.name != keep)


def data_name(finished: Path, target: Path) -> str:
    """The name of `target`'s external data, made of the content of the file `finished`: a model that names it never
    reads another version's."""
    return f"{target.name}.{content_hash(finished)[:16]}.data"


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


def require_safetensors(path: Path, argument: str) -> None:
    """Raises UsageError where the name promises another format: who loads 'x.pth' unpickles it."""
    if path.suffix.lower() != ".safetensors" and not path.is_dir():
        raise UsageError(
            f"`{argument}` names '{path}', expected a name that ends in .safetensors, the format that is written: "
            f"'{path.with_suffix('.safetensors').name}' (safetensors.torch.load_file reads it, torch.load does not)."
        )


@contextmanager
def _workspace(target: Path, beside: Path, name: str) -> Iterator[Path]:
    with ExitStack() as scope:
        with refused(target, beside):
            folder = scope.enter_context(workspace(beside, name))
        with refused(target, folder):
            yield folder


def _mode(path: Path) -> int | None:
    try:
        found = path.stat().st_mode
    except OSError:
        return None
    return stat.S_IMODE(found) if stat.S_ISREG(found) else None


def _back_up(target: Path, finished: Path, undo: ExitStack) -> Path | None:
    """A second name, near `finished`, under which the old `target` stays until all is in place; `undo` restores it."""
    if not os.path.lexists(target):
        undo.callback(target.unlink, missing_ok=True)
        return None
    backup = finished.with_name(f".{secrets.token_hex(8)}.old")
    try:
        os.link(target, backup, follow_symlinks=False)
    except (OSError, NotImplementedError):  # a file system without hard links
        shutil.copy2(target, backup, follow_symlinks=False)
    undo.callback(os.replace, backup, target)
    return backup


def _set_aside(path: Path, finished: Path, undo: ExitStack) -> Path:
    backup = finished.with_name(f".{secrets.token_hex(8)}.old")
    os.replace(path, backup)
    undo.callback(os.replace, backup, path)
    return backup


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
def refused(target: Path, temporary: Path | None = None) -> Iterator[None]:
    """Turns the operating system's refusals to write `temporary` (by default `target` itself), or in it, into a
    DoconvError about `target`."""
    try:
        yield
    except OSError as error:
        # a copy that fails names its source first
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if named and not any(name.startswith(str(temporary or target)) for name in named):
            raise  # about some other file that the caller's own code opened
        reason = error.strerror or str(error)
        raise DoconvError(f"cannot write '{target}': {reason}; {FREE}") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; a kill sets the folder free."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems do not lock folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
