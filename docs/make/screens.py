"""docs/screens.md and its pictures: what the commands print on a terminal of 80 columns.

    python docs/make/screens.py    (needs pyte, of the group `docs`; minutes)

The commands run one after the other in one folder, on a pseudo-terminal; pyte is the terminal that they write to.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

DOCS = Path(__file__).resolve().parents[1]
COLUMNS, ROWS = 80, 400
COLORS = {"brown": "yellow"}  # pyte's name for what everybody else calls yellow
SCREENS = {
    "demo": "doconv-convert demo .",
    "plan": "doconv-convert to-doconv torchvision:squeezenet1_1 --dry-run",
    "convert": "doconv-convert to-doconv digits.py:digits -o start.safetensors",
    "rehearse": "doconv-convert rehearse torchvision:squeezenet1_1",
    "fold": "doconv-convert fold trained.safetensors --model digits.py:digits --onnx out.onnx",
    "verify": "doconv-convert verify out.onnx --against trained.safetensors --model digits.py:digits",
    "certificate": "doconv-convert verify out.onnx --certificate out.certificate.json",
    "flops": "doconv-convert flops out.onnx --max 1M",
    "error": "doconv-convert to-doconv torchvision:resnet81 -o start.safetensors",
    "version": "doconv-convert --version",
}
SAID = {
    "demo": "The whole way, on real handwritten digits",
    "plan": "The plan, layer by layer, and what the training will cost",
    "convert": "A converted model, its start checked",
    "rehearse": "Will it work on mine?",
    "fold": "From the trained checkpoint to a proven ONNX file",
    "verify": "The whole proof again",
    "certificate": "The file against its certificate, without torch",
    "flops": "A budget that does not hold: exit code 3",
    "error": "An error: exit code 1",
    "version": "What a bug report needs",
}


def run_on_terminal(command: list[str], folder: Path, environment: dict[str, str]) -> pyte.Screen:
    """The screen after `command` has ended."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    while True:
        try:
            stream.feed(os.read(ours, 65536))
        except OSError:  # EIO: the last writer has closed the terminal
            break
    os.close(ours)
    process.wait()
    return screen


def lines_of(screen: pyte.Screen) -> list[Text]:
    """What stands on the screen, in its colors."""
    lines = []
    for row in range(screen.cursor.y):
        cells = (screen.buffer[row][column] for column in range(COLUMNS))
        line = Text()
        for (color, bold), run in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            line.append("".join(cell.data for cell in run), Style(color=COLORS.get(color, color), bold=bold))
        line.rstrip()
        lines.append(line)
    return lines


def picture(command: str, lines: list[Text]) -> str:
    """An SVG that asks no network for fonts."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {command}", style="bold"), *lines, sep="\n")
    svg = console.export_svg(title="80 columns")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("Fira Code,", "")


def main() -> None:
    target = DOCS / "screens"
    target.mkdir(exist_ok=True)
    program = str(Path(sys.executable).with_name("doconv-convert"))
    environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": ""}
    page = ["# What the commands print", "", "On a terminal of 80 columns; made by `python docs/make/screens.py`."]
    with tempfile.TemporaryDirectory() as folder:
        for name, command in SCREENS.items():
            print(command)
            screen = run_on_terminal([program, *shlex.split(command)[1:]], Path(folder), environment)
            (target / f"{name}.svg").write_text(picture(command, lines_of(screen)))
            page += ["", f"## {SAID[name]}", "", "```text", command, "```", "", f"![{SAID[name]}](screens/{name}.svg)"]
    (DOCS / "screens.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
