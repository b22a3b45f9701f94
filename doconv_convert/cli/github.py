"""What GitHub Actions reads: workflow commands (annotations) on stdout, and a Markdown summary of the step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A step's summary may hold 1 MiB; a row is far below 1 KiB.
SHOWN_ROWS = 300


@dataclass
class GithubReport:
    """The annotations of one command, which is about `file`, and its summary's Markdown, block by block."""

    file: str | None = None
    blocks: list[str] = field(default_factory=list)

    def error(self, message: str) -> str:
        """The workflow command that marks an error."""
        place = "" if self.file is None else f" file={_property(self.file)}"
        return f"::error{place}::{_data(message)}"

    def text(self, text: str) -> None:
        self.blocks.append(_cell(text))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int]) -> None:
        """A table, folded away where it is long."""
        rules = ["---:" if index in right else "---" for index in range(len(head))]
        cells = [[f"{cell:,}" if isinstance(cell, int) else _cell(str(cell)) for cell in row] for row in rows]
        lines = [f"| {' | '.join(line)} |" for line in (head, rules, *cells[:SHOWN_ROWS])]
        hidden = len(rows) - SHOWN_ROWS
        if len(rows) > 20:
            lines = [f"<details><summary>{len(rows)} rows</summary>", "", *lines, "", "</details>"]
        self.blocks.append("\n".join(lines) + (f"\n\nand {hidden} more" if hidden > 0 else ""))

    def publish(self) -> None:
        """Append the summary to $GITHUB_STEP_SUMMARY; outside of Actions, where there is none, do nothing."""
        place = os.environ.get("GITHUB_STEP_SUMMARY")
        if place and self.blocks:
            with Path(place).open("a", encoding="utf-8") as file:
                file.write("\n\n".join(self.blocks) + "\n\n")


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _cell(text: str) -> str:
    """Text that Markdown shows as it is, also in a table."""
    for mark in "\\`*_|<[":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("\n", "<br>")
