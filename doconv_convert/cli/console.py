"""What a command shows: text for people, or one JSON document; errors and exit codes.

Into a pipe or a file go plain lines without rules or colors.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from doconv_convert.cli.escapes import json_text, no_command, printable
from doconv_convert.cli.log import hide_log, show_log
from doconv_convert.cli.option_names import with_options
from doconv_convert.cli.privacy import Folders
from doconv_convert.errors import CheckFailedError, DoconvError, UsageError
from doconv_convert.interrupts import farewell

if TYPE_CHECKING:
    from rich.console import Console
    from rich.containers import Lines
    from rich.text import Text

    from doconv_convert.check.status import Proof, Status
    from doconv_convert.cli.github import GithubReport

EXIT_ERROR, EXIT_USAGE, EXIT_CHECK_FAILED = 1, 2, 3
# The first class that fits an error decides.
_EXIT_CODES = {UsageError: EXIT_USAGE, CheckFailedError: EXIT_CHECK_FAILED, DoconvError: EXIT_ERROR}
_SHOWN_FINDINGS = 8
_LEAST_WIDTH = 12
_STYLES = {
    "passed": "green",
    "failed": "bold red",
    "not checked": "yellow",
    "equivalent": "yellow",
    "not run": "yellow",
}


class Format(str, Enum):
    """How a command answers: text for people, one JSON document, or text with GitHub's annotations and summary."""

    text = "text"
    json = "json"
    github = "github"


@dataclass
class Output:
    """One command's output. Text goes to stdout, or to stderr where stdout carries the JSON document; with
    `github` all of it goes into the step's summary too. What others may read, the summary and the report, names files
    without their `folders`."""

    as_json: bool
    quiet: bool
    document: dict[str, Any] = field(default_factory=dict)
    github: GithubReport | None = None
    folders: Folders = field(default_factory=Folders)
    step: Callable[[str], None] = lambda name: None
    """Called with what is being done now; a terminal shows it."""

    @cached_property
    def terminal(self) -> bool:
        """Whether the text goes to somebody's terminal."""
        return (sys.stderr if self.as_json else sys.stdout).isatty()

    @cached_property
    def console(self) -> Console:
        from rich.console import Console

        forced = None if self.terminal else False
        return Console(stderr=self.as_json, force_terminal=forced, markup=False, emoji=False, highlight=False)

    def say(self, text: str, indent: int = 0) -> None:
        """One paragraph; a terminal gets it broken between words, `indent` columns in from its second line on."""
        text = with_options(text)
        if self.github is not None:
            self.github.text(self.folders.left_out(text))
        if self.quiet:
            return
        if self.terminal:
            self.console.print(_paragraph(printable(text), indent), soft_wrap=True)
        else:
            typer.echo(printable(text), err=self.as_json)

    @contextmanager
    def counting(self, doing: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar with the time left, on a terminal; what it yields is called once a finished part."""
        if self.quiet or not self.terminal or not total:
            yield lambda: None
            return
        from doconv_convert.cli import progress

        with progress.counting(self.console, doing, total) as advance:
            yield advance

    def problem(self, text: str) -> None:
        """Say what a check found; GitHub shows it beside the file."""
        self.say(text)
        self.annotate(text)

    def annotate(self, *lines: str) -> None:
        if self.github is not None:
            typer.echo(self.github.error(*with_options(lines)))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
        """Rows under a head; the columns `right` hold numbers, and a sequence of texts is as many lines. On a terminal
        a state has its color."""
        rows = with_options(rows)
        if self.github is not None:
            self.github.table(head, self.folders.left_out(rows), right)
        if self.quiet:
            return
        for line in _laid_out(self.console, head, rows, right):
            self.console.print(line, soft_wrap=True)

    def proof(self, proof: Proof) -> None:
        """The statuses, a line each with what was found under it, and the verdict."""
        rows = [(status.name, status.state, _with_findings(status)) for status in proof.statuses]
        self.table(("check", "state", "what was compared"), rows)
        for name, state, lines in rows:
            if state == "failed":
                self.annotate(f"{name}: {lines[0]}", *lines[1:])
        if proof.compared:
            self.say(f"compared on {proof.compared}")
        self.say(f"{proof.file}: {proof.verdict}")

    def fail(self, error: BaseException, debug: bool, code: int, message: str | None = None) -> NoReturn:
        """Say what is wrong on stderr, and in the document; with --debug raise it."""
        if debug:
            raise error
        message = with_options(message or str(error))
        self.document = {"error": message, "exit_code": code}
        self.annotate(message)
        text = printable(f"error: {message}")
        typer.echo(_paragraph(text) if sys.stderr.isatty() else text, err=True)
        raise typer.Exit(code) from error


def _laid_out(
    console: Console, head: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int]
) -> Iterator[Text]:
    """Columns two spaces apart; the widest texts are folded until a line fits, numbers never are."""
    from rich.box import SIMPLE_HEAD
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text

    class Cell(Text):
        """A name that is longer than a line is broken after a dot, '_' or '/' where it has one."""

        def wrap(self, console: Console, width: int, **options: Any) -> Lines:
            part = rf".{{1,{width}}}$|.{{1,{width - 1}}}[._/]|.{{1,{width}}}"
            folded = re.sub(rf"\S{{{width + 1},}}", lambda name: "\n".join(re.findall(part, name[0])), self.plain)
            return Text(folded, self.style).wrap(console, width, **options)

    ruled = console.is_terminal
    table = Table(
        box=SIMPLE_HEAD if ruled else None, show_edge=False, pad_edge=False, padding=(0, 1 if ruled else 2, 0, 0)
    )
    cells = [[_cell(cell) for cell in row] for row in rows]
    least = 2 * (len(head) - 1)
    for index, column in enumerate(zip(head, *cells, strict=True)):
        number = index in right
        table.add_column(column[0], justify="right" if number else "left", no_wrap=number, overflow="fold")
        width = max(len(line) for cell in column for line in cell.split("\n"))
        least += width if number else min(width, _LEAST_WIDTH)
    styles = [_STYLES if name == "state" else {} for name in head]
    for row in cells:
        table.add_row(*(Cell(cell, style.get(cell, "")) for cell, style in zip(row, styles, strict=True)))
    # rich would cut what does not fit into a console that is narrower than this
    for line in Segment.split_lines(console.render(table, console.options.update(width=max(console.width, least)))):
        text = Text.assemble(*((piece.text, piece.style or "") for piece in line))
        text.rstrip()
        yield text if (safe := no_command(text.plain)) == text.plain else Text(safe)


def _cell(cell: Any) -> str:
    if isinstance(cell, int):
        return f"{cell:,}"
    return "\n".join(printable(line) for line in ([cell] if isinstance(cell, str) else cell))


def _paragraph(text: str, indent: int = 0) -> str:
    """A printable text, broken between words for a terminal."""
    width = get_terminal_size().columns
    broken = wrap(text, width, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)
    return "\n".join(map(no_command, broken))


def _with_findings(status: Status) -> list[str]:
    hidden = len(status.findings) - _SHOWN_FINDINGS
    lines = [status.detail, *(f"- {finding}" for finding in status.findings[:_SHOWN_FINDINGS])]
    return [*lines, f"- and {hidden} more"] if hidden > 0 else lines


@contextmanager
def output(
    as_json: bool,
    quiet: bool,
    debug: bool,
    steps: Mapping[str, float] | None = None,
    *,
    github: GithubReport | None = None,
    files: Iterable[object] = (),
) -> Iterator[Output]:
    """Run a command's body: print its document at the end, and turn errors into messages and exit codes.

    `steps` are what it does, in order, with their usual parts of the whole time, for the time left; `files` what the
    user named, paths and sources.
    """
    out = Output(as_json, quiet, github=github, folders=Folders.of(files))
    log = show_log() if debug else None
    try:
        with farewell(lambda number: _say_farewell(out, number)):
            if steps and out.terminal and not quiet:
                from doconv_convert.cli.progress import stepping

                with stepping(out.console, steps) as out.step:
                    yield out
            else:
                yield out
    except typer.Exit:
        raise
    except DoconvError as error:
        out.fail(error, debug, next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)))
    except (KeyboardInterrupt, typer.Abort):
        out.fail(DoconvError(_interrupted(signal.SIGINT)), debug, 128 + signal.SIGINT)
    except Exception as error:  # the last resort: no traceback without --debug
        message = f"{type(error).__name__}: {error} (unexpected; run again with --debug and please report it)"
        out.fail(error, debug, EXIT_ERROR, message)
    finally:
        if log is not None:
            hide_log(log)
        if github is not None:
            _publish(github)
        if as_json and out.document:
            sys.stdout.write(json_text(with_options(out.document)) + "\n")


def _interrupted(number: int) -> str:
    return f"interrupted by {signal.Signals(number).name}; every output is complete or as it was before."


def _say_farewell(out: Output, number: int) -> None:
    """The last words of a process that a signal ends, past the streams: the signal may have come while one of them
    was in use."""
    if out.terminal:
        os.write(2 if out.as_json else 1, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
    os.write(2, f"error: {_interrupted(number)}\n".encode())
    if out.as_json:
        document = {"error": _interrupted(number), "exit_code": 128 + number}
        os.write(1, (json_text(document) + "\n").encode())


def _publish(github: GithubReport) -> None:
    """A summary that cannot be written is no reason for another exit code."""
    try:
        github.publish()
    except OSError as error:
        typer.echo(printable(f"warning: the step's summary cannot be written: {error}"), err=True)


def check_failed() -> NoReturn:
    """End the command with the exit code of a failed check; its document is printed all the same."""
    raise typer.Exit(EXIT_CHECK_FAILED)
