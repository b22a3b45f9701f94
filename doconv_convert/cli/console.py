"""What a command shows: text for people, or one JSON document; errors and exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from doconv_convert.errors import CheckFailedError, DoconvError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status as Spinner

    from doconv_convert.check.proof import Proof

EXIT_ERROR, EXIT_USAGE, EXIT_CHECK_FAILED, EXIT_INTERRUPTED = 1, 2, 3, 130
# The first class that fits an error decides.
_EXIT_CODES = {UsageError: EXIT_USAGE, CheckFailedError: EXIT_CHECK_FAILED, DoconvError: EXIT_ERROR}
_SHOWN_FINDINGS = 8
_STYLES = {"passed": "green", "failed": "bold red", "not checked": "yellow"}


@dataclass
class Output:
    """One command's output. Text goes to stdout, or to stderr where stdout carries the JSON document."""

    as_json: bool
    quiet: bool
    console: Console
    document: dict[str, Any] = field(default_factory=dict)
    spinner: Spinner | None = None

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, text: str) -> None:
        """What is being done now, on a terminal."""
        if self.spinner is not None:
            self.spinner.update(f"{text} ...")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for index, title in enumerate(head):
            table.add_column(title, justify="right" if index in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else str(cell)) for cell in row))
        if not self.quiet:
            self.console.print(table)

    def proof(self, proof: Proof) -> None:
        """The statuses, a line each with what was found under it, and the verdict."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for title in ("check", "state", "what was compared"):
            table.add_column(title, overflow="fold")
        for status in proof.statuses:
            hidden = len(status.findings) - _SHOWN_FINDINGS
            lines = [status.detail, *(f"- {finding}" for finding in status.findings[:_SHOWN_FINDINGS])]
            lines += [f"- and {hidden} more"] if hidden > 0 else []
            table.add_row(status.name, Text(status.state, style=_STYLES[status.state]), Text("\n".join(lines)))
        if not self.quiet:
            self.console.print(table)
        verdict = "proven: true" if proof.proven else "proven: false"
        self.say(f"{proof.file}: {verdict}")

    def fail(self, error: BaseException, debug: bool, code: int, message: str | None = None) -> NoReturn:
        """Say what is wrong on stderr, and in the document; with --debug raise it."""
        if debug:
            raise error
        self.document = {"error": message or str(error), "exit_code": code}
        typer.echo(f"error: {message or error}", err=True)
        raise typer.Exit(code) from error


@contextmanager
def output(as_json: bool, quiet: bool, debug: bool, doing: str = "") -> Iterator[Output]:
    """Run a command's body: print its document at the end, and turn errors into messages and exit codes."""
    from rich.console import Console

    console = Console(stderr=as_json)
    out = Output(as_json, quiet, console)
    try:
        if doing and console.is_terminal and not quiet:
            with console.status(f"{doing} ...") as out.spinner:
                yield out
        else:
            yield out
    except typer.Exit:
        raise
    except DoconvError as error:
        out.fail(error, debug, next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)))
    except (KeyboardInterrupt, typer.Abort):
        out.fail(DoconvError("interrupted; nothing was written."), debug, EXIT_INTERRUPTED)
    except Exception as error:  # the last resort: no traceback without --debug
        message = f"{type(error).__name__}: {error} (unexpected; run again with --debug and please report it)"
        out.fail(error, debug, EXIT_ERROR, message)
    finally:
        if as_json and out.document:
            sys.stdout.write(json.dumps(out.document, indent=2, default=str) + "\n")


def check_failed() -> NoReturn:
    """End the command with the exit code of a failed check; its document is printed all the same."""
    raise typer.Exit(EXIT_CHECK_FAILED)
