"""What a conversion is asked to do. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from doconv_convert.errors import UsageError
from doconv_convert.nn.arguments import require_composition, resolve_d_mul


@dataclass(frozen=True)
class Options:
    """What the user chose, `to_doconv`'s arguments. Globs match a site's names; `exclude` wins over `include`."""

    d_mul: int | str = "K"
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    pointwise: bool = False
    max_d_params: int = 16_000_000
    seed: int = 0
    composition: str = "kernel"

    def __post_init__(self) -> None:
        resolve_d_mul(self.d_mul, 1)
        require_composition(self.composition)
        for option in ("include", "exclude"):
            if isinstance(getattr(self, option), str):
                raise UsageError(f"{option}: got the text '{getattr(self, option)}', expected a sequence of globs.")
