"""`--report out.html`: one self-contained page of a command's JSON document. Loaded only when it is asked for.

Names of models, layers and files are anybody's text: it is made visible, jinja2 escapes all of it, and the page's own
policy allows no script but ours and no network at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from doconv_convert.cli.escapes import visible_document
from doconv_convert.cli.report.page import page_of
from doconv_convert.files import atomic_write
from doconv_convert.versions import __version__

_PAGE = Path(__file__).parent


def write_report(path: Path, command: str, document: Mapping[str, Any]) -> None:
    """Write the page, whole or not at all. Raises DoconvError where it cannot be written."""
    text = render(command, document)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def render(command: str, document: Mapping[str, Any]) -> str:
    """The page of a document that `command --json` prints; the same document gives the same text."""
    page = page_of(command, visible_document(json.loads(json.dumps(document, default=str))))
    script, style = ((_PAGE / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        page=page,
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
        version=__version__,
    )


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
