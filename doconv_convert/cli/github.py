"""What GitHub Actions reads: workflow commands (annotations) on stdout, and a Markdown summary of the step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from doconv_convert.cli.escapes import annotation, markdown

# A step's summary may hold 1 MiB, else GitHub shows none of it; a usual row is far below 1 KiB.
SHOWN_ROWS, TABLE_BYTES = 300, 400_000


@dataclass
class GithubReport:
    """The annotations of one command, which is about `file`, and its summary's Markdown, block by block."""

    file: str | None = None
    blocks: list[str] = field(default_factory=list)

    def error(self, *lines: str) -> str:
        """The workflow command that marks an error, of one line or several."""
        place = "" if self.file is None else f" file={_property(self.file)}"
        return f"::error{place}::{'%0A'.join(map(annotation, lines))}"

    def text(self, text: str) -> None:
        self.blocks.append(markdown(text))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int]) -> None:
        """A table, folded away where it is long."""
        rules = ["---:" if index in right else "---" for index in range(len(head))]
        lines, size = [_row(head), _row(rules)], 0
        for row in rows[:SHOWN_ROWS]:
            line = _row([_cell(cell) for cell in row])
            size += len(line.encode())
            if size > TABLE_BYTES:
                break
            lines.append(line)
        hidden = len(rows) - (len(lines) - 2)
        if len(rows) > 20:
            lines = [f"<details><summary>{len(rows)} rows</summary>", "", *lines, "", "</details>"]
        self.blocks.append("\n".join(lines) + (f"\n\nand {hidden} more" if hidden > 0 else ""))

    def publish(self) -> None:
        """Append the summary to $GITHUB_STEP_SUMMARY; outside of Actions, where there is none, do nothing. Raises
        OSError where it cannot be written."""
        place = os.environ.get("GITHUB_STEP_SUMMARY")
        if not place or not self.blocks:
            return
        # a pipe that nobody reads would be waited for
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        with os.fdopen(os.open(place, flags, 0o666), "a", encoding="utf-8") as file:
            file.write("\n\n".join(self.blocks) + "\n\n")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Any) -> str:
    """A number, a text, or several lines of text."""
    if isinstance(cell, int):
        return f"{cell:,}"
    return "<br>".join(markdown(line) for line in ([cell] if isinstance(cell, str) else cell))


def _property(text: str) -> str:
    return annotation(text).replace(":", "%3A").replace(",", "%2C")
