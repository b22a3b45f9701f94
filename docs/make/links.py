"""mkdocs' hook: the README is the site's first page, and links to files beside docs/ lead to the repository.

The pages stay plain Markdown whose links work on a forge and in a clone. Where the repository is, only its host knows:
REPOSITORY_URL says so (https://host/owner/name). Without it such a link becomes the file's path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[(?P<text>[^\]\[]*)\]\((?P<path>(?!\w+:|#)[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    place, repository = page.file.src_uri, os.environ.get("REPOSITORY_URL", "").rstrip("/")
    folder = "" if place == "index.md" else dirname(f"docs/{place}")

    def lead(link: re.Match[str]) -> str:
        target = normpath(join(folder, link["path"]))
        if target.startswith("docs/") or target == "README.md":
            path = "index.md" if target == "README.md" else target.removeprefix("docs/")
            return f"[{link['text']}]({relpath(path, dirname(place) or '.')}{link['anchor'] or ''})"
        if not repository:
            return f"{link['text']} (`{target}`)"
        return f"[{link['text']}]({repository}/blob/main/{target})"  # tests/test_docs.py knows that it exists

    return LINK.sub(lead, markdown)
