"""How messages write lists and numbers. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Collection

UNITS = (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3))
_SHOWN, _LONGEST = 5, 80


def listed(names: Collection[object]) -> str:
    """The first five names; a comma and three dots stand for the rest.

    >>> listed(["'a'", "'b'"]), listed(range(7))
    ("'a', 'b'", '0, 1, 2, 3, 4, ...')
    """
    shown = ", ".join(str(name)[:_LONGEST] for name in list(names)[:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown


def clipped(name: str, longest: int = 300) -> str:
    """A name of which only the start is shown where it is longer.

    >>> clipped("conv"), clipped("a" * 9, 4)
    ('conv', 'aaaa...')
    """
    return name if len(name) <= longest else f"{name[:longest]}..."


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "output"), counted(1200, "kernel")
    ('1 output', '1,200 kernels')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def short(value: float, digits: int = 3, between: str = " ") -> str:
    """A number in a few digits, with its unit's prefix.

    >>> short(1_234_567), short(0.04567), short(1_234_567, 4, "")
    ('1.23 M', '0.0457', '1.235M')
    """
    for unit, size in UNITS:
        if value >= size:
            return f"{value / size:.{digits}g}{between}{unit}"
    return f"{value:.{digits}g}"
