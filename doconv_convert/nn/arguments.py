"""The layers' own arguments: D_mul and the way to compose. Importing this needs no torch."""

from __future__ import annotations

import re

from doconv_convert.errors import UsageError

COMPOSITIONS = ("kernel", "feature", "auto")


def resolve_d_mul(d_mul: int | str, positions: int) -> int:
    """D_mul for a kernel of `positions` (K) positions, from 9, "9", "K", "2K" or "K+3".

    Raises UsageError for any other text. A result below K is the caller's to refuse: it knows the site's name.
    """
    if isinstance(d_mul, int) and not isinstance(d_mul, bool):
        return d_mul
    match = re.fullmatch(r"(\d+)|(\d*)K(?:\+(\d+))?", str(d_mul).replace(" ", ""))
    if match is None:
        raise UsageError(f"d_mul: got '{d_mul}', expected a number such as 9, or 'K', '2K', 'K+3'.")
    number, factor, extra = match.groups()
    return int(number) if number else int(factor or 1) * positions + int(extra or 0)


def require_composition(composition: str) -> None:
    """Raises UsageError for an unknown one."""
    if composition not in COMPOSITIONS:
        raise UsageError(f"composition: got '{composition}', expected one of {', '.join(COMPOSITIONS)}.")
