"""docs/cli.md from the command line's own declarations.

    python docs/make/cli_page.py

It reads what the commands' functions declare, not typer's help: its wording changes from version to version.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from doconv_convert.cli.app import app

PAGE = Path(__file__).resolve().parents[1] / "cli.md"
PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def page() -> str:
    lines = [
        "# Every command and option",
        "",
        "Made by `python docs/make/cli_page.py` from the program. `-h` or `--help` after a command says the same;",
        "[screens.md](screens.md) shows what the commands print.",
        "",
        "```text",
        "doconv-convert COMMAND ...",
        "```",
        "",
        *_options(app.registered_callback.callback),  # type: ignore[union-attr, arg-type]
        "- `--install-completion`: Install the completion of commands and options for your shell.",
        "- `--show-completion`: Print that completion, to install it yourself.",
        "",
        str(app.info.epilog),
    ]
    for command in app.registered_commands:
        lines += ["", *_command(str(command.name), command.callback)]  # type: ignore[arg-type]
    return "\n".join(lines) + "\n"


def _command(name: str, callback: Callable[..., object]) -> Iterator[str]:
    arguments = [declared for declared in _parameters(callback) if isinstance(declared[1], ArgumentInfo)]
    usage = " ".join(_argument(*declared) for declared in arguments)
    yield from (f"## {name}", "", str(callback.__doc__), "", "```text")
    yield from (f"doconv-convert {name} {usage} [OPTIONS]", "```", "")
    for parameter, declared, kind in arguments:
        yield f"- `{parameter.name.upper()}`: {declared.help}{_default(parameter, declared, kind)}"
    yield from _options(callback)


def _options(callback: Callable[..., object]) -> Iterator[str]:
    for parameter, declared, kind in _parameters(callback):
        if isinstance(declared, OptionInfo):
            # in Annotated, what typer keeps as the default is the first flag
            flags = sorted([declared.default, *(declared.param_decls or ())], key=len)
            placeholder = "" if kind is bool else f" {declared.metavar or _placeholder(kind)}"
            yield f"- `{', '.join(flags)}{placeholder}`: {declared.help}{_default(parameter, declared, kind)}"


def _parameters(callback: Callable[..., object]) -> Iterator[tuple[inspect.Parameter, Any, type]]:
    """Each parameter, its declaration and the type of one of its values."""
    hints = get_type_hints(callback, include_extras=True)
    for parameter in inspect.signature(callback).parameters.values():
        kind, declared = get_args(hints[parameter.name])
        while inner := [one for one in get_args(kind) if one is not type(None)]:  # X | None, list[X]
            (kind,) = inner
        yield parameter, declared, kind


def _argument(parameter: inspect.Parameter, declared: ArgumentInfo, kind: type) -> str:
    several = "..." if str(parameter.annotation).startswith("Annotated[list") else ""
    text = f"{parameter.name.upper()}{several}"
    return text if parameter.default is parameter.empty else f"[{text}]"


def _placeholder(kind: type) -> str:
    return "|".join(member.value for member in kind) if issubclass(kind, Enum) else PLACEHOLDERS[kind]


def _default(parameter: inspect.Parameter, declared: Any, kind: type) -> str:
    """The range and the default, where there is one to tell."""
    told = []
    if declared.min is not None:
        told.append(f"at least {declared.min}" if declared.max is None else f"{declared.min} to {declared.max}")
    if kind is not bool and parameter.default not in (parameter.empty, None, ""):
        told.append(f"default `{parameter.default}`")
    return f" ({'; '.join(told)})" if told else ""


if __name__ == "__main__":
    PAGE.write_text(page())
