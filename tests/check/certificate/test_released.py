"""Certificates of every released version stay good, and any of them can be written as an in-toto statement."""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support_cli import names, run_cli

from doconv_convert.check.certificate.attestation import PREDICATE_TYPE, STATEMENT_TYPE
from doconv_convert.check.certificate.certificate import SCHEMA, digest

# One folder a version: net.onnx and what `fold --onnx` of that version wrote beside it.
RELEASED = sorted(path for path in Path(__file__).with_name("released").iterdir() if path.is_dir())


@pytest.fixture(params=RELEASED, ids=lambda path: path.name)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for path in request.param.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path


def verify(folder: Path, certificate: str = "net.certificate.json", *options: object) -> Any:
    return run_cli("verify", folder / "net.onnx", "--certificate", folder / certificate, *options)


def content_of(path: Path) -> Any:
    return json.loads(path.read_text())


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


@pytest.fixture
def statement(files: Path) -> Path:
    result = verify(files, "net.certificate.json", "--attest", files / "net.intoto.json")
    assert result.exit_code == 0, result.stdout + result.stderr
    return files / "net.intoto.json"


def test_a_released_certificate_holds(files: Path) -> None:
    assert verify(files).exit_code == 0
    jsonschema.validate(content_of(files / "net.certificate.json"), content_of(SCHEMA))


def test_its_model_changed_by_a_byte_is_refused(files: Path) -> None:
    data = bytearray((files / "net.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (files / "net.onnx").write_bytes(data)
    assert verify(files).exit_code == 3


def test_a_statement_is_about_the_model_and_holds_the_certificate(files: Path, statement: Path) -> None:
    certificate, content = content_of(files / "net.certificate.json"), content_of(statement)
    assert content == {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": "net.onnx", "digest": {"sha256": certificate["onnx"]["sha256"]}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": certificate,
    }
    assert content_of(SCHEMA)["$id"] == PREDICATE_TYPE


def test_a_statement_is_as_good_as_its_certificate(files: Path, statement: Path) -> None:
    before = statement.read_bytes()
    assert verify(files, statement.name, "--attest", files / "again.json").exit_code == 0
    assert (files / "again.json").read_bytes() == before


def test_a_statement_about_another_file_is_refused(files: Path, statement: Path) -> None:
    content = content_of(statement)
    content["subject"][0]["digest"]["sha256"] = "0" * 64
    write(statement, content)
    result = verify(files, statement.name)
    assert result.exit_code == 3
    assert "its subjects are not the files of the certificate" in " ".join(result.stdout.split())


def test_a_statement_of_another_kind_is_refused(files: Path, statement: Path) -> None:
    write(statement, {**content_of(statement), "predicateType": "https://slsa.dev/provenance/v1"})
    assert verify(files, statement.name).exit_code == 3
    for predicate in ({}, [], {"onnx": {"name": "a"}}):
        write(statement, {**content_of(statement), "predicateType": PREDICATE_TYPE, "predicate": predicate})
        assert verify(files, statement.name).exit_code == 3


def test_an_edited_certificate_in_a_statement_is_refused(files: Path, statement: Path) -> None:
    content = content_of(statement)
    content["predicate"]["macs"]["total"] += 1
    write(statement, content)
    assert verify(files, statement.name).exit_code == 3


def test_no_statement_is_written_of_what_does_not_hold(files: Path) -> None:
    certificate = content_of(files / "net.certificate.json")
    certificate["outputs"]["tensors"][0]["norm"] *= 2
    certificate["checks"][0]["state"] = "failed"
    del certificate["digest"]
    write(files / "net.certificate.json", {**certificate, "digest": digest(certificate)})
    assert verify(files, "net.certificate.json", "--attest", files / "net.intoto.json").exit_code == 3
    assert "net.intoto.json" not in names(files)


def test_attest_goes_with_a_certificate_and_a_place_of_its_own(files: Path) -> None:
    against = run_cli("verify", files / "net.onnx", "--against", files / "net.onnx", "--attest", files / "a.json")
    assert against.exit_code == 2
    before = (files / "net.onnx").read_bytes()
    assert verify(files, "net.certificate.json", "--attest", files / "net.onnx").exit_code == 2
    assert (files / "net.onnx").read_bytes() == before
