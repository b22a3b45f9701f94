"""How messages write lists, numbers and names. Importing this needs no torch."""

from __future__ import annotations

import re
from collections.abc import Collection

UNITS = (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3))
_SHOWN, _LONGEST = 5, 80
# Words and texts above these lose their middle: no layer's name is as long, a hostile file's may have megabytes.
LONGEST_WORD, LONGEST_TEXT = 300, 10_000
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")
# Fillers, joiners and variation selectors: Python calls them printable, though they show nothing.
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


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


def visible(text: str) -> str:
    """The text with each character that shows nothing, moves the cursor or turns text around as Python's escape of it
    (`\\n`, `\\x1b`, `\\u202e`), lone surrogates too, and without the middle of what is far too long."""
    if len(text) > LONGEST_WORD:
        text = shortened(_LONG_WORD.sub(lambda word: shortened(word[0], LONGEST_WORD), text), LONGEST_TEXT)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(one) if not one.isprintable() or _BLANK.match(one) else one for one in text)


def shortened(text: str, longest: int) -> str:
    """The text, or its beginning and its end and how much was between them."""
    if len(text) <= longest:
        return text
    begin, end = longest * 2 // 3, longest // 4
    return f"{text[:begin]}...({len(text) - begin - end:,} characters)...{text[-end:]}"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
