"""Exported programs (`.pt2`) as sources: the graph's own module, its inputs, and what an export loses.

torch falls back to a full pickle for parts of such a file, so loading one can run code: it is opened only where
the user names it on the command line.
"""

from __future__ import annotations

import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from doconv_convert.errors import DoconvError

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

SUFFIX = ".pt2"


def load_program(path: str) -> nn.Module:
    """The program's module, with its own weights. Raises DoconvError where the file is no exported program."""
    import torch

    if not Path(path).is_file():
        raise DoconvError(f"'{path}' is no file; expected an exported program (torch.export.save).")
    try:
        with warnings.catch_warnings(), _silenced("torch.export"):
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
    except Exception as error:  # zip, JSON and unpickling errors of many kinds
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200)
        raise DoconvError(
            f"'{path}' cannot be loaded as an exported program ({reason}); save it again with torch.export.save, by a "
            "torch like this one."
        ) from error
    if named := list(program.example_inputs[1] if program.example_inputs else ()):
        raise DoconvError(
            f"'{path}' takes '{named[0]}' by keyword, expected positional inputs only; export it with all inputs in "
            "`args`."
        )
    return program.module()


def placeholders(program: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, example) of every input; the examples are fake tensors, whose free sizes are symbols.

    [] where an input is no tensor: what it should be, only the user knows.
    """
    import torch
    from torch import fx

    if not isinstance(program, fx.GraphModule):
        return []
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    found = [(str(node.target), node.meta.get("val")) for node in nodes]
    return [] if any(not isinstance(value, torch.Tensor) for _, value in found) else found


def example_shape(example: Tensor) -> tuple[int, ...] | None:
    """The sizes the program was exported with; None where it does not say."""
    sizes = [size if isinstance(size, int) else getattr(size.node, "hint", None) for size in example.shape]
    return None if any(size is None for size in sizes) else tuple(int(size) for size in sizes)


def fixed_batch(program: nn.Module) -> int | None:
    """The batch that the program was exported for, where it runs at no other."""
    sizes = [example.shape[0] for _, example in placeholders(program) if example.dim()]
    return next((size for size in sizes if isinstance(size, int)), None)


def untied(program: nn.Module) -> list[tuple[str, str]]:
    """Pairs of weights with the same values: one weight under two names, before it was exported."""
    import torch

    parameters = [(name, p) for name, p in program.named_parameters() if p.numel() and p.min() != p.max()]
    return [
        (name, other)
        for index, (name, one) in enumerate(parameters)
        for other, two in parameters[index + 1 :]
        if one.shape == two.shape and one.dtype == two.dtype and torch.equal(one, two)
    ]


def untied_notes(program: nn.Module) -> tuple[str, ...]:
    """What became of tied weights in a program just loaded, in words."""
    read = _read_parameters(program)
    notes = []
    for one, other in untied(program):
        used = [name for name in (one, other) if name in read]
        how = f"the graph only uses '{used[0]}'" if len(used) == 1 else "they train apart from here on"
        notes.append(
            f"'{one}' and '{other}' hold the same values: tied weights come back untied from a {SUFFIX}; {how}"
        )
    return tuple(notes)


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """Its exceptions say what matters; the log repeats them with their tracebacks."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read_parameters(program: Any) -> Sequence[str]:
    graph: fx.Graph | None = getattr(program, "graph", None)
    if graph is None:
        return ()
    return [str(node.target) for node in graph.nodes if node.op == "get_attr" and node.users]
