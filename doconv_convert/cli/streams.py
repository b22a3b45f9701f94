"""stdout and stderr that may break: a full disk or a pipe that nobody reads costs the text, not the exit code."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from doconv_convert.cli.escapes import printable


class _Forgiving(io.FileIO):
    """A descriptor; what cannot be written to it is dropped, and `error` says why."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            self.error = error
            return len(data)


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """This process' stdout and stderr, of which no write raises any more; characters that their encoding lacks are
    escaped. Why stdout broke is said at the end, unless its reader went away."""
    stdout, sys.stdout = _forgiving(sys.stdout)
    _, sys.stderr = _forgiving(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        if stdout is not None and stdout.error is not None and stdout.error.errno not in (errno.EPIPE, errno.EINVAL):
            print(printable(f"warning: not all of the output could be written: {stdout.error}"), file=sys.stderr)
        sys.stderr.flush()


def _forgiving(stream: TextIO | None) -> tuple[_Forgiving | None, TextIO]:
    if stream is None:  # closed before the start
        return None, open(os.devnull, "w", encoding="utf-8")
    if stream.isatty():  # never full; Windows has a class of its own for it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        return None, stream
    raw = _Forgiving(stream.fileno(), "w", closefd=False)
    by_line = bool(getattr(stream, "line_buffering", False))
    return raw, io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=by_line)
