"""No output over an input of the same command, by whatever name, path or link. Importing this needs no torch."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

from doconv_convert.artifacts.checkpoints.places import checkpoint_files
from doconv_convert.check.certificate.paths import certificate_path, reference_path
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.files import stale_data
from doconv_convert.workspace import workspace

# A certificate is a few hundred KiB.
_CERTIFICATE_BYTES = 2**26

Named = Mapping[str, str | Path | None]


def refuse_overwrites(reads: Named, writes: Mapping[str, Path | None]) -> None:
    """Raises UsageError where one of the files that a command `writes`, or that comes with it (a model's certificate,
    its data), is one that it `reads`, or another that it writes. Both are named as messages name them.

    What is read is a text of the command line: a file, a folder, a SOURCE. With a folder or a file come the files that
    are read with it: shards, external data, a certificate's side file.
    """
    made = [(name, one) for name, path in writes.items() if path is not None for one in _with_companions(name, path)]
    for (name, path), (other, place) in combinations(made, 2):
        if name != other and _same_place(path, place):
            raise UsageError(f"{name} and {other} both name '{path}'; expected two files.")
    there = [(name, path) for name, path in made if os.path.lexists(path)]
    if not there:
        return  # what does not exist replaces nothing
    for what, text in reads.items():
        for source in () if text is None else _files_of(str(text)):
            for name, path in there:
                if _same_file(path, source):
                    raise UsageError(_message(name, writes[name], path, what, source))


def _message(name: str, asked: Path | None, path: Path, what: str, source: Path) -> str:
    beside = "" if path == asked else f" (with '{path.name}')"
    link = "" if os.path.abspath(path) == os.path.abspath(source) else f", the same file as '{source}'"
    return f"{name} names '{asked}'{beside}{link}, which this command reads ({what}); name another file."


def _with_companions(name: str, path: Path) -> Iterator[Path]:
    """The file, and those that are written, or deleted, together with it."""
    yield path
    if name == "`onnx`":
        yield certificate_path(path)
        yield reference_path(path)
        yield path.with_name(f"{path.name}.data")
        if path.parent.is_dir():
            yield from (one for one in stale_data(path) if one.name != f"{path.name}.data")


def _same_file(a: Path, b: Path) -> bool:
    """Whether both are one file on the disk: by links, hard links and other spellings too."""
    with suppress(OSError, ValueError):
        return os.path.samefile(a, b)
    return False


def _same_place(a: Path, b: Path) -> bool:
    """Whether two files to be written would be one."""
    if a == b or _same_file(a, b):
        return True
    if not _same_file(a.parent, b.parent):
        return False
    return a.name == b.name or (_folded(a.name) == _folded(b.name) and _folds_names(a.parent))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _folds_names(folder: Path) -> bool:
    """Whether the file system takes two spellings of a name for one, as those of Windows and macOS do."""
    with suppress(OSError), workspace(folder, "Case") as made:
        return made.with_name(made.name.swapcase()).exists()
    return False


def _files_of(text: str) -> Iterator[Path]:
    """The files that a command reads where its user wrote `text`."""
    path = Path(text)
    if path.is_dir():
        yield from checkpoint_files(path)
    elif path.is_file():
        yield from checkpoint_files(path)
        with suppress(DoconvError):  # what is wrong with the file is said when it is opened
            yield from _companions_read(path)
    elif ":" in text:
        place = text.rpartition(":")[0]
        yield from [Path(place)] if place.endswith(".py") else _module_files(place)


def _companions_read(path: Path) -> Iterator[Path]:
    if path.suffix == ".onnx":
        from doconv_convert.check.onnx_files.external_data import external_files  # imports onnx: for this alone

        yield from (path.with_name(name) for name in external_files(path))
    elif path.suffix == ".json" and path.stat().st_size <= _CERTIFICATE_BYTES:
        with suppress(ValueError, KeyError, TypeError, RecursionError, OSError):
            content: Any = json.loads(path.read_bytes())
            yield path.with_name(str(content["outputs"]["reference"]["name"]))


def _module_files(module: str) -> Iterator[Path]:
    """Where Python would find a module, without importing its packages."""
    parts = Path(*module.split("."))
    for folder in map(Path, ["", *sys.path]):
        yield from (folder / one for one in (parts.with_suffix(".py"), parts / "__init__.py"))
