"""What a command shows: text for people, or one JSON document; errors and exit codes.

rich draws for terminals. Into a pipe or a file go plain lines without frames or colours; rich, which takes a
while to import, is then not loaded.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import zip_longest
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from doconv_convert.errors import CheckFailedError, DoconvError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status as Spinner

    from doconv_convert.check.proof import Proof, Status
    from doconv_convert.cli.github import GithubReport

EXIT_ERROR, EXIT_USAGE, EXIT_CHECK_FAILED, EXIT_INTERRUPTED = 1, 2, 3, 130
# The first class that fits an error decides.
_EXIT_CODES = {UsageError: EXIT_USAGE, CheckFailedError: EXIT_CHECK_FAILED, DoconvError: EXIT_ERROR}
_SHOWN_FINDINGS = 8
_LEAST_WIDTH = 12
_STYLES = {"passed": "green", "failed": "bold red", "not checked": "yellow"}


class Format(str, Enum):
    """How a command answers: text for people, one JSON document, or text with GitHub's annotations and summary."""

    text = "text"
    json = "json"
    github = "github"


@dataclass
class Output:
    """One command's output. Text goes to stdout, or to stderr where stdout carries the JSON document; with
    `github` all of it goes into the step's summary too."""

    as_json: bool
    quiet: bool
    document: dict[str, Any] = field(default_factory=dict)
    spinner: Spinner | None = None
    github: GithubReport | None = None

    @cached_property
    def terminal(self) -> bool:
        """Whether the text goes to somebody's terminal."""
        return (sys.stderr if self.as_json else sys.stdout).isatty()

    @cached_property
    def console(self) -> Console:
        from rich.console import Console

        return Console(stderr=self.as_json)

    def say(self, text: str) -> None:
        if self.github is not None:
            self.github.text(text)
        if self.quiet:
            return
        if self.terminal:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            typer.echo(text, err=self.as_json)

    @contextmanager
    def counting(self, doing: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar with the time left, on a terminal; what it yields is called once a finished part."""
        if self.quiet or not self.terminal or not total:
            yield lambda: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(doing, total=total)
            yield lambda: bar.advance(task)

    def problem(self, text: str) -> None:
        """Say what a check found; GitHub shows it beside the file."""
        self.say(text)
        self.annotate(text)

    def annotate(self, text: str) -> None:
        if self.github is not None:
            typer.echo(self.github.error(text))

    def step(self, text: str) -> None:
        """What is being done now, on a terminal."""
        if self.spinner is not None:
            self.spinner.update(f"{text} ...")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
        """Rows under a head; the columns `right` hold numbers. On a terminal a state has its colour."""
        if self.github is not None:
            self.github.table(head, rows, right)
        if self.quiet:
            return
        cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
        if not self.terminal:
            for line in plain_table(head, cells, right, get_terminal_size().columns):
                typer.echo(line, err=self.as_json)
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for index, title in enumerate(head):
            table.add_column(title, justify="right" if index in right else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        self.console.print(table)

    def proof(self, proof: Proof) -> None:
        """The statuses, a line each with what was found under it, and the verdict."""
        rows = [(status.name, status.state, _with_findings(status)) for status in proof.statuses]
        self.table(("check", "state", "what was compared"), rows)
        for name, state, lines in rows:
            if state == "failed":
                self.annotate(f"{name}: {lines}")
        verdict = "proven: true" if proof.proven else "proven: false"
        self.say(f"{proof.file}: {verdict}")

    def fail(self, error: BaseException, debug: bool, code: int, message: str | None = None) -> NoReturn:
        """Say what is wrong on stderr, and in the document; with --debug raise it."""
        if debug:
            raise error
        self.document = {"error": message or str(error), "exit_code": code}
        self.annotate(message or str(error))
        typer.echo(f"error: {message or error}", err=True)
        raise typer.Exit(code) from error


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int], columns: int) -> list[str]:
    """Aligned lines without colours or frames; the widest texts are folded until a line fits into `columns`."""
    widths = [max(len(line) for row in (head, *rows) for line in row[index].split("\n")) for index in range(len(head))]
    texts = [index for index in range(len(head)) if index not in right]
    while (excess := sum(widths) + 2 * (len(widths) - 1) - columns) > 0:
        widest = max(texts, key=lambda index: widths[index])
        if widths[widest] <= _LEAST_WIDTH:
            break
        widths[widest] = max(widths[widest] - excess, _LEAST_WIDTH)
    lines = []
    for row in (head, *rows):
        folded = [_fold(cell, width) for cell, width in zip(row, widths, strict=True)]
        for line in zip_longest(*folded, fillvalue=""):
            cells = [
                cell.rjust(widths[index]) if index in right else cell.ljust(widths[index])
                for index, cell in enumerate(line)
            ]
            lines.append("  ".join(cells).rstrip())
    return lines


def _fold(text: str, width: int) -> list[str]:
    parts = (wrap(line, width, break_on_hyphens=False) or [""] for line in text.split("\n"))
    return [line for part in parts for line in part]


def _with_findings(status: Status) -> str:
    hidden = len(status.findings) - _SHOWN_FINDINGS
    lines = [status.detail, *(f"- {finding}" for finding in status.findings[:_SHOWN_FINDINGS])]
    return "\n".join([*lines, f"- and {hidden} more"] if hidden > 0 else lines)


@contextmanager
def output(
    as_json: bool, quiet: bool, debug: bool, doing: str = "", *, github: GithubReport | None = None
) -> Iterator[Output]:
    """Run a command's body: print its document at the end, and turn errors into messages and exit codes."""
    out = Output(as_json, quiet, github=github)
    try:
        if doing and out.terminal and not quiet:
            with out.console.status(f"{doing} ...") as out.spinner:
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
        if github is not None:
            github.publish()
        if as_json and out.document:
            sys.stdout.write(json.dumps(out.document, indent=2, default=str) + "\n")


def check_failed() -> NoReturn:
    """End the command with the exit code of a failed check; its document is printed all the same."""
    raise typer.Exit(EXIT_CHECK_FAILED)
