"""A foreign DO-Conv checkpoint folded by its keys alone: no class, no model, one plain state dict.

Keys tell how many positions a kernel has, never its height and width (9 is 3x3 or 1x9): those come from the
user, `GLOB=1x9`, or are taken to be square, which is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from doconv_convert.artifacts.checkpoints.checkpoint import folded_tensors, with_units, write_tensors
from doconv_convert.artifacts.checkpoints.foreign_keys import Unit, find_units
from doconv_convert.artifacts.checkpoints.prefixes import without_prefixes
from doconv_convert.artifacts.checkpoints.reading import Checkpoint, read_checkpoint, require_finite
from doconv_convert.artifacts.checkpoints.recipe import Recipe
from doconv_convert.artifacts.checkpoints.unwrap import Selection
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.rewrite.fold import untrained_notes
from doconv_convert.words import listed

Size = tuple[int, ...]


@dataclass(frozen=True)
class FoldedByKeys:
    """The names of the layers that were folded, and what the user should know."""

    folded: tuple[str, ...]
    notes: tuple[str, ...]


def fold_foreign_file(path: Path, selection: Selection, kernels: Sequence[str], out: Path) -> FoldedByKeys | None:
    """Fold the foreign units of a file and write the plain state dict; None where the file has none.

    `kernels` are texts "GLOB=1x9" on the units' names. Raises UsageError for those that fit nothing, DoconvError for
    damaged units, non-square kernels without a size, and places that cannot be written.
    """
    sizes = [parse_kernel(text) for text in kernels]
    checkpoint = read_checkpoint(path, selection)
    if checkpoint.recipe is not None:
        return None
    checkpoint = without_prefixes(checkpoint)
    units = find_units(checkpoint.state, checkpoint.path)
    if not units:
        return None
    require_finite(checkpoint)
    checkpoint = with_units(checkpoint, units)
    chosen, notes = _choose_sizes(units, sizes, checkpoint)
    made = {key: tensor for unit in units for key, tensor in folded_tensors(unit, chosen[unit.name]).items()}
    # every key for itself: who loads the file knows nothing of aliases
    stored = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in (checkpoint.state | made).items()}
    write_tensors(stored, Recipe(()), out)
    notes = (*checkpoint.notes, *untrained_notes([unit.d for unit in units if unit.d is not None]), *notes)
    return FoldedByKeys(tuple(unit.name for unit in units if unit.d is not None), notes)


def parse_kernel(text: str) -> tuple[str, Size]:
    """("GLOB", (1, 9)) from "GLOB=1x9". Raises UsageError."""
    glob, _, size = text.rpartition("=")
    if not glob or not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){0,2}", size):
        raise UsageError(f"`kernels`: got '{text}', expected GLOB=HEIGHTxWIDTH such as 'stem.*=1x9'.")
    return glob, tuple(map(int, size.split("x")))


def _choose_sizes(
    units: Sequence[Unit], sizes: Sequence[tuple[str, Size]], checkpoint: Checkpoint
) -> tuple[dict[str, Size], tuple[str, ...]]:
    """Every unit's kernel size, and a sentence on what was assumed. A later `kernels` wins over an earlier one."""
    for glob, _ in sizes:
        if not any(fnmatchcase(unit.name, glob) for unit in units):
            raise UsageError(f"`kernels` '{glob}' matches no layer; the file's are {listed([u.name for u in units])}.")
    chosen: dict[str, Size] = {}
    assumed: list[str] = []
    for unit in units:
        given = [size for glob, size in sizes if fnmatchcase(unit.name, glob)]
        side = math.isqrt(unit.positions)
        if unit.d is None:
            chosen[unit.name] = tuple(unit.w.shape[2:])
        elif given and math.prod(given[-1]) == unit.positions:
            chosen[unit.name] = given[-1]
        elif given:
            wrong = "x".join(map(str, given[-1]))
            raise UsageError(f"`kernels`: '{unit.name}' has {unit.positions} kernel positions, {wrong} does not fit.")
        elif side * side == unit.positions:
            chosen[unit.name] = (side, side)
            assumed.append(f"{unit.name} {side}x{side}")
        else:
            raise DoconvError(
                f"'{checkpoint.path}': '{unit.name}' has {unit.positions} kernel positions, which are no square; give "
                f"its size, `kernels` '{unit.name}=1x{unit.positions}', or the network, `model` SOURCE."
            )
    if not assumed:
        return chosen, ()
    return chosen, (
        f"{len(assumed)} kernels are assumed to be square, since keys do not tell ({listed(assumed)}); `kernels` "
        "GLOB=1x9 or `model` SOURCE says otherwise",
    )
