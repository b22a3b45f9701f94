"""The package's own log on stderr, with --debug."""

from __future__ import annotations

import logging

from doconv_convert.cli.escapes import printable

_PACKAGE = "doconv_convert"


class PrintableFormatter(logging.Formatter):
    """A record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def show_log() -> logging.Handler:
    """The package's own records on stderr, with what was decided and why."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("debug: %(name)s: %(message)s"))
    package = logging.getLogger(_PACKAGE)
    package.setLevel(logging.DEBUG)
    package.addHandler(handler)
    return handler


def hide_log(handler: logging.Handler) -> None:
    package = logging.getLogger(_PACKAGE)
    package.removeHandler(handler)
    package.setLevel(logging.NOTSET)
