"""mkdocs' hook: the README is the site's first page, and links to files beside docs/ lead to the repository.

The pages stay plain Markdown whose links work on a forge and in a clone.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)\s#]+")


def on_files(files: Any, config: Any) -> Any:
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    place = page.file.src_uri
    folder = "" if place == "index.md" else dirname(f"docs/{place}")

    def lead(link: re.Match[str]) -> str:
        target = normpath(join(folder, link[0]))
        if target.startswith("docs/") or target == "README.md":
            return relpath("index.md" if target == "README.md" else target.removeprefix("docs/"), dirname(place) or ".")
        return f"{config.extra['repository']}/blob/main/{target}"  # tests/test_docs.py knows that it exists

    return LINK.sub(lead, markdown)
