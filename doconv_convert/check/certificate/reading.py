"""A certificate as a file: its JSON and the digest of its content. Importing this imports neither onnx nor torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from doconv_convert.check.certificate.attestation import certified
from doconv_convert.errors import CheckFailedError, DoconvError

FORMAT = "doconv-convert certificate"
VERSION = 1
# A network of 10,000 layers has one of 10 MiB.
MOST_BYTES = 1 << 26
MOST_DIGITS = 40


def read_certificate(path: Path) -> dict[str, Any]:
    """The content, without its digest, of a certificate whose digest is right; of one in an in-toto statement too.

    Raises CheckFailedError where the document is damaged or was edited, DoconvError where there is none or it is
    of a later version.
    """
    try:
        if path.exists() and not path.is_file():
            raise DoconvError(f"the certificate '{path}' cannot be read: it is not a regular file.")
        if path.stat().st_size > MOST_BYTES:
            raise DoconvError(f"'{path}' is no certificate: it has more than {MOST_BYTES >> 20} MiB.")
        data = path.read_bytes()
    except OSError as error:
        raise DoconvError(f"the certificate '{path}' cannot be read ({error.strerror}).") from error
    try:
        content = json.loads(
            data.decode("utf-8"),
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_integer,
            object_pairs_hook=_without_doubles,
        )
    except (ValueError, RecursionError) as error:
        raise CheckFailedError(f"'{path}' is not JSON: it was changed after it was written ({error}).") from error
    if not isinstance(content, dict):
        raise CheckFailedError(f"'{path}' is no certificate of doconv-convert: expected a JSON object.")
    document, content = content, dict(certified(content, str(path)))
    if content.get("format") != FORMAT:
        raise CheckFailedError(f'\'{path}\' is no certificate of doconv-convert: expected "format": "{FORMAT}".')
    unchanged = data.replace(b"\r\n", b"\n") == rendered(document)  # as git checks text out on Windows
    found, expected = content.pop("digest", None), digest(content)
    if found != expected:
        raise CheckFailedError(
            f"'{path}' was changed after it was written: its content has the digest {expected}, it says {found}."
        )
    if not unchanged:
        raise CheckFailedError(f"'{path}' was changed after it was written, in the spelling of a value.")
    if content.get("version") != VERSION:
        raise DoconvError(
            f"'{path}' is a certificate of version {content.get('version')}, expected {VERSION}: "
            "use the doconv-convert that wrote it."
        )
    return content


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content's canonical JSON: keys in order, no spaces, ASCII."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"sha256:{hashlib.sha256(canonical.encode('ascii')).hexdigest()}"


def _no_number(text: str) -> NoReturn:
    """NaN and Infinity, which JSON does not have, and what Python makes of 1e999."""
    raise ValueError(f"'{text}' is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _integer(text: str) -> int:
    """No MACs, sizes or versions have so many digits, and Python refuses to print a number of some thousands."""
    return int(text) if len(text) <= MOST_DIGITS else _no_number(f"{text[:10]}...")


def _without_doubles(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Readers of JSON differ in which of two values of one name they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has '{next(name for name in names if names.count(name) > 1)}' twice")
    return found


def rendered(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode("ascii")
