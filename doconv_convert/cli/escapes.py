"""Text from files is data: how each medium is written so that no name of a node, a layer or a file can steer it.

Names, and other people's error messages, reach a command in the middle of its own sentences. So nothing is escaped
where a sentence is made: each of these functions is called at the one place where its medium is printed.

    a terminal, a log    printable             Output (console.py), tracebacks and usage errors (app.py)
    GitHub's commands    annotation            GithubReport (github.py)
    a step's summary     markdown              GithubReport (github.py)
    the HTML report      visible_document      report/render.py, and jinja2's autoescape after it
    JSON                 json_text             Output (console.py)
    a notebook           visible (words.py)    Proof (check/status.py), and markupsafe after it
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from doconv_convert.words import visible

# GitHub's runner obeys '##[command]' anywhere in a line, that of Azure '##vso[command]'.
_HASH_COMMAND = re.compile(r"#(?=#\w*\[)")
# What formats in Markdown, what makes a list or an address of the characters before it, and how lists and rules begin.
_MARKDOWN = re.compile(r"[`*_\[\]<>#|~$@&]|\\(?!\w)|:(?=\S)|(?i:www)\.|^\d+[.)]|^[-+=]")
# Mentions, references, formulas and emoji are looked for in the page that Markdown has become: only a tag stops them.
_LOOKED_FOR_LATER = "@#$:"


def printable(text: str) -> str:
    """One line for a terminal or a log, and no command to the runner that keeps the log (`::error::`, `##[group]`)."""
    return no_command(_without_hash_commands(visible(text)))


def no_command(line: str) -> str:
    """The printable line, changed where it begins with '::' and GitHub's runner would obey it."""
    return line.replace("::", r"\x3a:", 1) if line.lstrip().startswith("::") else line


def annotation(text: str) -> str:
    """One line of the data of a workflow command."""
    return _without_hash_commands(visible(text)).replace("%", "%25")


def markdown(text: str) -> str:
    """Text that GitHub's Markdown shows as it is, in a paragraph and in a table: whatever has a meaning there becomes
    a character reference."""
    return _MARKDOWN.sub(lambda mark: mark[0][:-1] + _reference(mark[0][-1]), visible(text).strip())


def json_text(document: Any) -> str:
    """The document as JSON in ASCII, every text whole, and no command to a runner."""
    return _HASH_COMMAND.sub(r"\\u0023", json.dumps(document, indent=2, default=str))


def visible_document(value: Any) -> Any:
    """The same document of JSON with all of its texts, keys too, `visible`."""
    if isinstance(value, Mapping):
        return {visible(str(key)): visible_document(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [visible_document(one) for one in value]
    return visible(value) if isinstance(value, str) else value


def _without_hash_commands(text: str) -> str:
    return _HASH_COMMAND.sub(r"\\x23", text)


def _reference(mark: str) -> str:
    reference = f"&#{ord(mark)};"
    return f"<span>{reference}</span>" if mark in _LOOKED_FOR_LATER else reference
