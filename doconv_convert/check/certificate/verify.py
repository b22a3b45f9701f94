"""`verify --certificate`: a file against its certificate, on a machine without torch.

Nothing that can be found out here is believed: hashes are taken, MACs counted and outputs run anew. What needs torch
(the fold, the graph's comparison, coverage) is in the certificate, whose digest is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from doconv_convert.artifacts.sources.samples import in_order, read_samples
from doconv_convert.check.certificate.certificate import file_hashes, read_certificate
from doconv_convert.check.certificate.side_file import Expected, array_hash, compare_with, read_arrays
from doconv_convert.check.macs.counting import MacCount, NodeMacs, compare_counts, count_macs, describe_count
from doconv_convert.check.onnxruntime_run import known_loose, retry_in_float64
from doconv_convert.check.outputs.compare import Array
from doconv_convert.check.outputs.session import OnnxSession
from doconv_convert.check.status import Proof, Status
from doconv_convert.errors import CheckFailedError, DoconvError, UsageError
from doconv_convert.files import content_hash
from doconv_convert.words import counted

# What `fold --onnx` establishes; a file with fewer checks is not proven.
PROVEN_BY = ("fold", "graph", "macs", "outputs", "coverage")


def verify_certificate(candidate: Path, certificate: Path, input_file: Path | None = None) -> Proof:
    """Check the ONNX file `candidate` against a certificate and the side file next to that.

    `input_file` (.npy, .npz) has the inputs, where they were too large for the side file. Raises DoconvError where a
    file is missing; what does not fit fails a status.
    """
    if not candidate.is_file():
        raise DoconvError(f"'{candidate}' is no file; expected an ONNX model.")
    proof = Proof(str(candidate))
    try:
        content = read_certificate(certificate)
    except CheckFailedError as error:
        proof.statuses.append(Status("certificate", "failed", str(error)))
        return proof
    try:
        proof.statuses.append(_standing(content))
        proof.statuses.append(_tried("files", lambda: _files(candidate, certificate, content)))
        proof.statuses.append(_tried("macs", lambda: _macs(candidate, content["macs"], proof)))
        proof.statuses.append(
            _tried("outputs", lambda: _outputs(candidate, certificate, content["outputs"], input_file))
        )
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        # its digest is right, so it was written like this: by another hand than ours
        detail = f"'{certificate}' does not follow certificate.schema.json ({type(error).__name__}: {error})"
        proof.statuses.append(Status("certificate", "failed", detail))
    return proof


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
    short = [f"'{name}' {state}" for name, state in states.items() if state not in ("passed", "not run")]
    short += [f"'{name}' is missing" for name in PROVEN_BY if name not in states]
    if short or content["proven"] is not True:
        return Status("certificate", "failed", "it does not say that the file was proven", tuple(short))
    tool, torch = content["tool"]["version"], content["libraries"].get("torch", "?")
    passed = [name for name, state in states.items() if state == "passed"]
    detail = f"digest verified; {', '.join(passed)} passed with doconv-convert {tool}, torch {torch}"
    return Status("certificate", "passed", detail)


def _files(candidate: Path, certificate: Path, content: Mapping[str, Any]) -> Status:
    """The hashes of the model, of its external data and of the side file."""
    findings = []
    expected = content["onnx"]
    if content_hash(candidate) != expected["sha256"]:
        findings.append(f"'{candidate}' is not the file of this certificate: its SHA-256 is {content_hash(candidate)}")
    else:
        data = {one["name"]: one["sha256"] for one in file_hashes(candidate)["external"]}
        for one in expected["external"]:
            if data.get(one["name"]) != one["sha256"]:
                findings.append(f"its data file '{one['name']}' is another one")
    reference = _beside(certificate, content["outputs"])
    if content_hash(reference) != content["outputs"]["reference"]["sha256"]:
        findings.append(f"'{reference}' is not the side file of this certificate")
    if findings:
        return Status("files", "failed", "a file was changed or belongs to another certificate", tuple(findings))
    count = 2 + len(expected["external"])
    return Status("files", "passed", f"{counted(count, 'file')} match the certificate (SHA-256)")


def _macs(candidate: Path, expected: Mapping[str, Any], proof: Proof) -> Status:
    """A count of the file as it is, node by node."""
    nodes = tuple(NodeMacs(**node) for node in expected["nodes"])
    certified = MacCount(nodes, dict(expected["uncounted"]))
    count = count_macs(candidate, expected["dims"])
    proof.macs, proof.count = count.total, count
    findings = compare_counts(certified, count)
    if expected["total"] != certified.total:
        findings.append(f"the certificate's total is {expected['total']:,} MACs, its nodes have {certified.total:,}")
    if findings:
        return Status("macs", "failed", "MACs differ from the certificate's", tuple(findings))
    return Status("macs", "passed", f"{describe_count(count)}, equal to the certificate's")


def _outputs(candidate: Path, certificate: Path, expected: Mapping[str, Any], samples: Path | None) -> Status:
    """onnxruntime against the float64 outputs, to the proof's own bound, with optimizations on and off."""
    arrays = read_arrays(_beside(certificate, expected))
    inputs = _inputs(arrays, expected["inputs"], samples)
    outputs = [_expected(one, arrays[f"output_{index}"]) for index, one in enumerate(expected["tensors"])]

    def compare(wide: Collection[str], floor: float) -> tuple[Status, None]:
        problems, worst = [], (0.0, 0.0)
        for optimize in (True, False):
            session = OnnxSession(candidate, optimize=optimize, wide=wide)
            if session.outputs != [one.name for one in outputs]:
                detail = f"outputs are named {session.outputs}, not as in the certificate"
                return Status("outputs", "failed", detail), None
            how = "" if optimize else ", with optimizations off"
            for name, error, bound, problem in compare_with(
                outputs, session.run(inputs), expected["detections"], floor
            ):
                if problem is not None:
                    problems.append(f"'{name}' {problem}{how}")
                elif bound and error / bound >= (worst[0] / worst[1] if worst[1] else 0.0):
                    worst = error, bound
        if problems or not outputs:
            told = "other than the certificate's float64 outputs"
            return Status("outputs", "failed", told, tuple(problems)), None
        compared = f"{counted(len(outputs), 'output')}, {counted(expected['samples'], 'sample')}"
        detail = f"{compared}: relative error {worst[0]:.1e} (tolerance {worst[1]:.1e}); optimizations on and off"
        return Status("outputs", "passed", detail), None

    return retry_in_float64(compare, lambda: known_loose() | dict.fromkeys(expected.get("loose", ())))[0]


def _expected(one: Mapping[str, Any], values: Array) -> Expected:
    plain_error = float("nan") if one["plain_error"] is None else float(one["plain_error"])
    shape = tuple(int(size) for size in one["shape"])
    return Expected(one["name"], one["dtype"], shape, float(one["norm"]), one["kept"] == "whole", plain_error, values)


def _inputs(arrays: Mapping[str, Array], expected: Sequence[Mapping[str, Any]], samples: Path | None) -> list[Array]:
    names = [one["name"] for one in expected]
    if all(one["stored"] for one in expected):
        inputs = [arrays[f"input_{index}"] for index in range(len(expected))]
    elif samples is not None:
        inputs = list(in_order(read_samples(samples), names, f"'{samples}'"))
    else:
        raise UsageError("the inputs were too large for the side file; give them with `input_file` FILE.npz.")
    for one, array in zip(expected, inputs, strict=True):
        if array_hash(array) != one["sha256"] or list(array.shape) != one["shape"]:
            raise DoconvError(f"input '{one['name']}' is not the one of the certificate: its SHA-256 differs.")
    return [np.asarray(array) for array in inputs]


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
