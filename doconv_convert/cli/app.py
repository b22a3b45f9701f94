"""The command line's table of contents."""

from __future__ import annotations

import gc
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from doconv_convert.cli.demo import demo
from doconv_convert.cli.escapes import printable
from doconv_convert.cli.flops import flops
from doconv_convert.cli.fold import fold
from doconv_convert.cli.log import PrintableFormatter
from doconv_convert.cli.rehearse import rehearse
from doconv_convert.cli.streams import forgiving_streams
from doconv_convert.cli.to_doconv import to_doconv
from doconv_convert.cli.verify import verify
from doconv_convert.interrupts import end_on_signals

_Misused: Any = typer.BadParameter.__base__  # what click raises for a command line it cannot read


class _Commands(TyperGroup):
    """Click quotes arguments as they are; names of files are data here too."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _printable_misuse():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _printable_misuse():
            return super().invoke(ctx)


@contextmanager
def _printable_misuse() -> Iterator[None]:
    try:
        yield
    except _Misused as error:
        error.message = printable(error.message)
        raise


app = typer.Typer(
    name="doconv-convert",
    cls=_Commands,
    help="Train a network with over-parameterized convolutions (DO-Conv), ship exactly the network you designed.",
    epilog="Exit codes: 0 everything asked for succeeded, 1 an error, 2 wrong usage, 3 a check failed.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("to-doconv")(to_doconv)
app.command("fold")(fold)
app.command("verify")(verify)
app.command("flops")(flops)
app.command("rehearse")(rehearse)
app.command("demo")(demo)


def _print_versions(wanted: bool) -> None:
    if not wanted:
        return
    import platform

    from doconv_convert.versions import LIBRARIES, __version__, library_versions

    typer.echo(f"doconv-convert {__version__}, Python {platform.python_version()}, {platform.platform()}")
    found = library_versions()
    for package in LIBRARIES:
        typer.echo(f"{package} {found.get(package, 'not installed')}")
    raise typer.Exit


@app.callback()
def root(
    versions: Annotated[
        bool,
        typer.Option("--version", help="Versions to put in a bug report.", callback=_print_versions, is_eager=True),
    ] = False,
) -> None:
    """Train a network with over-parameterized convolutions (DO-Conv), ship exactly the network you designed."""


def main() -> None:
    # Imports make objects by the hundred thousand that all stay: looking for garbage among them takes a tenth of
    # a short command's time.
    gc.set_threshold(100_000)
    end_on_signals()
    with forgiving_streams():
        _show_others_lines_printable()
        try:
            app()
        except Exception as error:  # raised with --debug alone
            sys.stderr.write(_printable_lines("".join(traceback.format_exception(error))))
            sys.exit(1)


def _show_others_lines_printable() -> None:
    """What libraries warn of and log quotes names too."""
    formatted = warnings.formatwarning
    warnings.formatwarning = lambda *about, **more: _printable_lines(formatted(*about, **more))
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PrintableFormatter("%(message)s"))


def _printable_lines(text: str) -> str:
    return "".join(f"{printable(line)}\n" for line in text.rstrip("\n").split("\n"))
