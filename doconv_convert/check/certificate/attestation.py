"""A certificate as an in-toto statement, for tools that sign and store those. Importing this needs no torch.

The statement's subjects are the model and its external data, its predicate is the certificate as it is
(https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doconv_convert.errors import CheckFailedError

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:doconv-convert:certificate:1"  # the $id of certificate.schema.json


def statement(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """The in-toto statement of a certificate (its whole content, with its digest)."""
    model = certificate["onnx"]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": one["name"], "digest": {"sha256": one["sha256"]}} for one in (model, *model["external"])],
        "predicateType": PREDICATE_TYPE,
        "predicate": dict(certificate),
    }


def certified(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The certificate in a statement, or `content` itself where that is none. Raises CheckFailedError for a statement
    of another kind or about other files than its certificate's."""
    if content.get("_type") != STATEMENT_TYPE:
        return content
    kind, certificate = content.get("predicateType"), content.get("predicate")
    if kind != PREDICATE_TYPE or not isinstance(certificate, dict):
        raise CheckFailedError(
            f"'{name}' is an in-toto statement of another kind: expected the predicate type '{PREDICATE_TYPE}', "
            f"got '{kind}'."
        )
    try:
        expected = statement(certificate)
    except (KeyError, TypeError) as error:
        raise CheckFailedError(f"'{name}': its predicate is no certificate ({type(error).__name__}).") from error
    if content != expected:
        raise CheckFailedError(f"'{name}': its subjects are not the files of the certificate in it.")
    return certificate
