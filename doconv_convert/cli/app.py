"""The command line's table of contents."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from doconv_convert.cli.demo import demo
from doconv_convert.cli.flops import flops
from doconv_convert.cli.fold import fold
from doconv_convert.cli.rehearse import rehearse
from doconv_convert.cli.to_doconv import to_doconv
from doconv_convert.cli.verify import verify
from doconv_convert.interrupts import end_on_signals

app = typer.Typer(
    name="doconv-convert",
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
    app()
