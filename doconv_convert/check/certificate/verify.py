"""`verify --certificate`: a file against its certificate, on a machine without torch.

Nothing that can be found out here is believed: hashes are taken, MACs counted and outputs run anew. What needs torch
(the fold, the graph's comparison, coverage) is in the certificate, whose digest is checked. Only a file whose hash is
right is opened, in a process with limits: whoever makes a file can make its certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from doconv_convert.check.certificate.reading import read_certificate
from doconv_convert.check.confined import SECONDS, Confined, confined, run_limits
from doconv_convert.check.macs.figures import compare_counts, describe_count
from doconv_convert.check.macs.files import count_file
from doconv_convert.check.macs.result import MacCount, NodeMacs
from doconv_convert.check.status import Proof, Status
from doconv_convert.errors import CheckFailedError, DoconvError, UsageError
from doconv_convert.files import content_hash, require_file
from doconv_convert.words import counted

# What `fold --onnx` establishes; a file with fewer checks is not proven.
PROVEN_BY = ("fold", "graph", "macs", "outputs", "coverage")


def verify_certificate(
    candidate: Path, certificate: Path, input_file: Path | None = None, timeout: float | None = None
) -> Proof:
    """Check the ONNX file `candidate` against a certificate and the side file next to that.

    `input_file` (.npy, .npz) has the inputs, where they were too large for the side file. The count and the runs end
    after `timeout` seconds of work each; by default that follows the MACs counted. Raises DoconvError where a file is
    missing; what does not fit fails a status, and what lies behind a wrong hash is not opened.
    """
    require_file(candidate, "an ONNX model")
    proof = Proof(str(candidate))
    try:
        content = read_certificate(certificate)
    except CheckFailedError as error:
        proof.statuses.append(Status("certificate", "failed", str(error)))
        return proof
    try:
        with confined() as process:
            proof.statuses += _checks(process, proof, content, certificate, input_file, timeout)
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        # its digest is right, so it was written like this: by another hand than ours
        detail = f"'{certificate}' does not follow certificate.schema.json ({type(error).__name__}: {error})"
        proof.statuses.append(Status("certificate", "failed", detail))
    return proof


def _checks(
    process: Confined,
    proof: Proof,
    content: Mapping[str, Any],
    certificate: Path,
    input_file: Path | None,
    timeout: float | None,
) -> list[Status]:
    candidate = Path(proof.file)
    standing = _standing(content)
    files = _tried("files", lambda: _files(process, candidate, certificate, content))
    if files.state != "passed":
        why = "what is not the certificate's file is not opened"
        return [standing, files, *(Status(name, "not checked", why) for name in ("macs", "outputs"))]
    macs = _tried("macs", lambda: _macs(process, candidate, content["macs"], proof, timeout))
    run = partial(_outputs, process, candidate, certificate, content, proof.macs or 0, input_file, timeout)
    return [standing, files, macs, _tried("outputs", run)]


def _tried(name: str, check: Callable[[], Status]) -> Status:
    try:
        return check()
    except UsageError:
        raise
    except DoconvError as error:
        return Status(name, "failed", str(error))


def _standing(content: Mapping[str, Any]) -> Status:
    """What the certificate itself claims: every check was made and passed."""
    states = {check["name"]: check["state"] for check in content["checks"]}
    short = [f"'{name}' {state}" for name, state in states.items() if state != "passed"]
    short += [f"'{name}' is missing" for name in PROVEN_BY if name not in states]
    if short or content["proven"] is not True:
        return Status("certificate", "failed", "it does not say that the file was proven", tuple(short))
    tool, torch = content["tool"]["version"], content["libraries"].get("torch", "?")
    detail = f"digest verified; {', '.join(states)} passed with doconv-convert {tool}, torch {torch}"
    return Status("certificate", "passed", detail)


def _files(process: Confined, candidate: Path, certificate: Path, content: Mapping[str, Any]) -> Status:
    """The hashes of the model, of the side file and of the model's external data; the first wrong one ends it."""
    model, reference = content["onnx"], _beside(certificate, content["outputs"])
    found = content_hash(candidate)
    if found != model["sha256"]:
        return _another(f"'{candidate}' is not the file of this certificate: its SHA-256 is {found}")
    if content_hash(reference) != content["outputs"]["reference"]["sha256"]:
        return _another(f"'{reference}' is not the side file of this certificate")
    names = process.call("check.onnx_files.external_data:external_files", candidate)
    hashes = {one["name"]: one["sha256"] for one in model["external"]}
    if sorted(hashes) != names:
        return _another(f"the model's data files are {names}, the certificate's {sorted(hashes)}")
    for name in names:
        require_file(candidate.parent / name, "the model's external data")
        if content_hash(candidate.parent / name) != hashes[name]:
            return _another(f"its data file '{name}' is another one")
    return Status("files", "passed", f"{counted(2 + len(names), 'file')} match the certificate (SHA-256)")


def _another(finding: str) -> Status:
    return Status("files", "failed", "a file was changed or belongs to another certificate", (finding,))


def _macs(
    process: Confined, candidate: Path, expected: Mapping[str, Any], proof: Proof, timeout: float | None
) -> Status:
    """A count of the file as it is, node by node."""
    nodes = tuple(NodeMacs(**node) for node in expected["nodes"])
    certified = MacCount(nodes, dict(expected["uncounted"]))
    count = count_file(process, candidate, dict(expected["dims"]), (), timeout or SECONDS)
    proof.macs, proof.count = count.total, count
    findings = compare_counts(certified, count)
    if expected["total"] != certified.total:
        findings.append(f"the certificate's total is {expected['total']:,} MACs, its nodes have {certified.total:,}")
    if findings:
        return Status("macs", "failed", "MACs differ from the certificate's", tuple(findings))
    return Status("macs", "passed", f"{describe_count(count)}, equal to the certificate's")


def _outputs(
    process: Confined,
    candidate: Path,
    certificate: Path,
    content: Mapping[str, Any],
    macs: int,
    input_file: Path | None,
    timeout: float | None,
) -> Status:
    expected, side_file = content["outputs"], _beside(certificate, content["outputs"])
    files = [candidate, side_file, *(candidate.parent / one["name"] for one in content["onnx"]["external"])]
    files += [] if input_file is None else [input_file]
    limits = run_limits(macs * int(expected["samples"]), files, timeout)
    samples = None if input_file is None else str(input_file)
    function = "check.certificate.outputs:outputs_as_json"
    found = process.call(function, candidate, str(side_file), expected, samples, limits=limits)
    if "malformed" in found:
        raise ValueError(found["malformed"])
    return Status(found["name"], found["state"], found["detail"], tuple(found["findings"]))


def _beside(certificate: Path, outputs: Mapping[str, Any]) -> Path:
    """The side file, in the certificate's own folder: renamed with it, or under the name it was written with.

    Raises DoconvError where there is none.
    """
    stem = certificate.name.removesuffix(".certificate.json")
    written = certificate.with_name(Path(outputs["reference"]["name"]).name)
    path = next((one for one in (certificate.with_name(f"{stem}.reference.npz"), written) if one.is_file()), None)
    if path is None:
        raise DoconvError(f"the certificate's side file '{written}' is missing: keep it beside the certificate.")
    return path
