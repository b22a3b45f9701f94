"""What a command shows: text for people, or one JSON document; errors and exit codes.

rich draws for terminals. Into a pipe or a file go plain lines without frames or colors; rich, which takes a
while to import, is then not loaded.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import zip_longest
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from doconv_convert.cli.option_names import with_options
from doconv_convert.errors import CheckFailedError, DoconvError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from doconv_convert.check.status import Proof, Status
    from doconv_convert.cli.github import GithubReport

EXIT_ERROR, EXIT_USAGE, EXIT_CHECK_FAILED, EXIT_INTERRUPTED = 1, 2, 3, 130
# The first class that fits an error decides.
_EXIT_CODES = {UsageError: EXIT_USAGE, CheckFailedError: EXIT_CHECK_FAILED, DoconvError: EXIT_ERROR}
_SHOWN_FINDINGS = 8
_PACKAGE = "doconv_convert"
_LEAST_WIDTH = 12
_STYLES = {"passed": "green", "failed": "bold red", "not checked": "yellow", "equivalent": "yellow"}


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
    github: GithubReport | None = None
    step: Callable[[str], None] = lambda name: None
    """Called with what is being done now; a terminal shows it."""

    @cached_property
    def terminal(self) -> bool:
        """Whether the text goes to somebody's terminal."""
        return (sys.stderr if self.as_json else sys.stdout).isatty()

    @cached_property
    def console(self) -> Console:
        from rich.console import Console

        return Console(stderr=self.as_json)

    def say(self, text: str, indent: int = 0) -> None:
        """One paragraph; a terminal gets it broken between words, `indent` columns in from its second line on."""
        text = with_options(text)
        if self.github is not None:
            self.github.text(text)
        if self.quiet:
            return
        if self.terminal:
            self.console.print(_paragraph(text, indent), markup=False, highlight=False, soft_wrap=True)
        else:
            typer.echo(text, err=self.as_json)

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

    def annotate(self, text: str) -> None:
        if self.github is not None:
            typer.echo(self.github.error(with_options(text)))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
        """Rows under a head; the columns `right` hold numbers. On a terminal a state has its color."""
        rows = with_options(rows)
        if self.github is not None:
            self.github.table(head, rows, right)
        if self.quiet:
            return
        cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
        columns = get_terminal_size().columns
        if not self.terminal:
            typer.echo("\n".join(plain_table(head, cells, right, columns)), err=self.as_json)
            return
        from rich.rule import Rule
        from rich.text import Text

        first, *lines = _laid_out(head, cells, right, columns)
        self.console.print(Text("".join(first), style="bold"))
        self.console.print(Rule(style=""), width=sum(map(len, first)))
        for line in lines:
            text = Text.assemble(*((cell, _STYLES.get(cell.strip(), "")) for cell in line))
            text.rstrip()
            self.console.print(text)

    def proof(self, proof: Proof) -> None:
        """The statuses, a line each with what was found under it, and the verdict."""
        rows = [(status.name, status.state, _with_findings(status)) for status in proof.statuses]
        self.table(("check", "state", "what was compared"), rows)
        for name, state, lines in rows:
            if state == "failed":
                self.annotate(f"{name}: {lines}")
        self.say(f"{proof.file}: {proof.verdict}")

    def fail(self, error: BaseException, debug: bool, code: int, message: str | None = None) -> NoReturn:
        """Say what is wrong on stderr, and in the document; with --debug raise it."""
        if debug:
            raise error
        message = with_options(message or str(error))
        self.document = {"error": message, "exit_code": code}
        self.annotate(message)
        text = f"error: {message}"
        typer.echo(_paragraph(text) if sys.stderr.isatty() else text, err=True)
        raise typer.Exit(code) from error


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int], columns: int) -> list[str]:
    """Aligned lines without colors or frames; the widest texts are folded until a line fits into `columns`."""
    return ["".join(line).rstrip() for line in _laid_out(head, rows, right, columns)]


def _laid_out(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int], columns: int
) -> list[list[str]]:
    """The lines' cells, padded."""
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
            padded = (
                cell.rjust(widths[index]) if index in right else cell.ljust(widths[index])
                for index, cell in enumerate(line)
            )
            lines.append([f"  {cell}" if index else cell for index, cell in enumerate(padded)])
    return lines


def _fold(text: str, width: int) -> list[str]:
    """Lines between words; a name that is longer than a line is broken after a dot, '_' or '/' where it has one."""
    lines = [line for part in text.split("\n") for line in _words(part, width) or [""]]
    name = re.compile(rf".{{1,{width}}}$|.{{1,{width - 1}}}[._/]|.{{1,{width}}}")
    return [part for line in lines for part in (name.findall(line) if len(line) > width else [line])]


def _words(text: str, width: int, indent: int = 0) -> list[str]:
    return wrap(text, width, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False)


def _paragraph(text: str, indent: int = 0) -> str:
    columns = get_terminal_size().columns
    return "\n".join(line for part in text.split("\n") for line in _words(part, columns, indent) or [""])


def _with_findings(status: Status) -> str:
    hidden = len(status.findings) - _SHOWN_FINDINGS
    lines = [status.detail, *(f"- {finding}" for finding in status.findings[:_SHOWN_FINDINGS])]
    return "\n".join([*lines, f"- and {hidden} more"] if hidden > 0 else lines)


@contextmanager
def output(
    as_json: bool,
    quiet: bool,
    debug: bool,
    steps: Mapping[str, float] | None = None,
    *,
    github: GithubReport | None = None,
) -> Iterator[Output]:
    """Run a command's body: print its document at the end, and turn errors into messages and exit codes.

    `steps` are what it does, in order, with their usual parts of the whole time, for the time left.
    """
    out = Output(as_json, quiet, github=github)
    log = _shown_log() if debug else None
    try:
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
        out.fail(DoconvError("interrupted; nothing was written."), debug, EXIT_INTERRUPTED)
    except Exception as error:  # the last resort: no traceback without --debug
        message = f"{type(error).__name__}: {error} (unexpected; run again with --debug and please report it)"
        out.fail(error, debug, EXIT_ERROR, message)
    finally:
        if log is not None:
            _hide_log(log)
        if github is not None:
            github.publish()
        if as_json and out.document:
            sys.stdout.write(json.dumps(with_options(out.document), indent=2, default=str) + "\n")


class _PrintableFormatter(logging.Formatter):
    """A record as one line; names of layers and of files are data, and control characters in them are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _shown_log() -> logging.Handler:
    """The package's own records on stderr, with what was decided and why."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter("debug: %(name)s: %(message)s"))
    package = logging.getLogger(_PACKAGE)
    package.setLevel(logging.DEBUG)
    package.addHandler(handler)
    return handler


def _hide_log(handler: logging.Handler) -> None:
    package = logging.getLogger(_PACKAGE)
    package.removeHandler(handler)
    package.setLevel(logging.NOTSET)


def check_failed() -> NoReturn:
    """End the command with the exit code of a failed check; its document is printed all the same."""
    raise typer.Exit(EXIT_CHECK_FAILED)
