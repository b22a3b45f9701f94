"""A certificate: everything a proof found about an ONNX file, in one JSON document beside it.

    out.onnx    out.certificate.json    out.reference.npz (inputs and float64 outputs: side_file.py)

Its digest covers the document's own content, so that a changed figure is noticed; it is no signature: whoever makes
a file can make its certificate. certificate.schema.json describes the format. Importing this needs no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

from doconv_convert.check.certificate.attestation import statement
from doconv_convert.check.certificate.paths import certificate_path, reference_path
from doconv_convert.check.certificate.reading import FORMAT, VERSION, digest, read_certificate, rendered
from doconv_convert.check.certificate.side_file import describe_inputs, describe_outputs, write_reference
from doconv_convert.check.macs.result import MacCount
from doconv_convert.check.merged import Merged
from doconv_convert.check.onnx_files.external_data import external_files
from doconv_convert.check.onnx_files.model import onnx_input_shapes
from doconv_convert.check.outputs.expected import ReferenceRun
from doconv_convert.check.proof import dynamic_sizes
from doconv_convert.check.status import Proof, without_nan
from doconv_convert.errors import DoconvError
from doconv_convert.files import atomic_write, content_hash
from doconv_convert.versions import __version__, library_versions

if TYPE_CHECKING:
    from doconv_convert.artifacts.sources.source import Source

SCHEMA = Path(__file__).with_name("certificate.schema.json")


@dataclass(frozen=True)
class Origin:
    """Where a file comes from: the trained checkpoint (a file or a folder), its network (None: a model in memory), how
    it was exported, and the linear regions that were merged."""

    checkpoint: Path
    source: Source | None
    opset: int
    exporter: str
    merged: Merged | None = None


def write_certificate(onnx: Path, proof: Proof, reference: ReferenceRun, origin: Origin) -> list[Path]:
    """Write the side file and the certificate of the finished file `onnx`, returned in this order; the same file and
    proof, the same bytes.

    `reference` is what the proof compared. Hashes are taken of `onnx` as it is: call this where nobody else writes, and
    move all of them to their places together. Raises DoconvError where a place cannot be written or the proof does not
    hold.
    """
    if not proof.proven or proof.count is None:
        raise DoconvError(f"'{onnx}' is not proven: no certificate is written.")
    write_reference(reference_path(onnx), reference)
    content = _content(onnx, proof, proof.count, reference, origin)
    content = {**content, "digest": digest(content)}
    path = certificate_path(onnx)
    with atomic_write(path) as temporary:
        temporary.write_bytes(rendered(content))
    return [reference_path(onnx), path]


def write_statement(certificate: Path, target: Path) -> None:
    """Write a certificate as an in-toto statement (`attestation.py`), unsigned; the same certificate, the same bytes.

    Raises what `read_certificate` raises, and DoconvError where `target` cannot be written.
    """
    content = read_certificate(certificate)
    content = {**content, "digest": digest(content)}
    with atomic_write(target) as temporary:
        temporary.write_bytes(rendered(statement(content)))


def file_hashes(onnx: Path) -> dict[str, Any]:
    """The hashes of an ONNX file and of the files with its external data, named as the file names them."""
    external = [{"name": name, "sha256": content_hash(onnx.parent / name)} for name in external_files(onnx)]
    return {"name": onnx.name, "sha256": content_hash(onnx), "external": external}


def _content(onnx: Path, proof: Proof, count: MacCount, reference: ReferenceRun, origin: Origin) -> dict[str, Any]:
    counted = asdict(count)
    names = list(onnx_input_shapes(onnx))
    described = describe_outputs([check.name for check in proof.outputs], reference)
    figures = [
        {key: getattr(check, key) for key in ("error", "plain_error", "bound", "largest", "variation", "agreeing")}
        for check in proof.outputs
    ]
    content: dict[str, Any] = without_nan(
        {
            "format": FORMAT,
            "version": VERSION,
            "tool": {"name": "doconv-convert", "version": __version__},
            "libraries": {"python": python_version(), **library_versions()},
            "source": _source(origin.source),
            "checkpoint": _checkpoint(origin.checkpoint),
            "onnx": {**file_hashes(onnx), "opset": origin.opset, "exporter": origin.exporter},
            "proven": proof.proven,
            "checks": [asdict(status) for status in proof.statuses],
            "macs": {
                "unit": "MACs",
                "total": count.total,
                "dims": dynamic_sizes(onnx, reference.inputs),
                "nodes": counted["nodes"],
                "uncounted": counted["uncounted"],
                "assumed": counted["assumed"],
            },
            "outputs": {
                "reference": {"name": reference_path(onnx).name, "sha256": content_hash(reference_path(onnx))},
                "samples": reference.samples,
                "compared": reference.compared,
                "inputs": describe_inputs(names, reference),
                "tensors": [{**one, **more} for one, more in zip(described, figures, strict=True)],
                "detections": [dict(group) for group in reference.detections],
                **({"loose": sorted(proof.loose)} if proof.loose else {}),
            },
            "coverage": dict(proof.sensitivity),
            **({} if origin.merged is None else {"merged": origin.merged.to_json()}),
        }
    )
    return content


def _source(source: Source | None) -> dict[str, Any]:
    """The source as the user wrote it; of a file its name and hash, since its folder is a matter of the machine."""
    if source is None:
        return {"source": "in memory", "args": {}}
    told = source.without_folders().to_json()
    if source.kind not in ("file", "program"):
        return told
    path = Path(source.place if source.kind == "file" else source.text)
    text = f"{path.name}:{source.name}" if source.kind == "file" else path.name
    return {**told, "source": text, "sha256": content_hash(path)}


def _checkpoint(path: Path) -> dict[str, Any]:
    files = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
    named = [(one.relative_to(path).as_posix() if path.is_dir() else one.name, one) for one in files]
    return {"name": path.name, "files": [{"name": name, "sha256": content_hash(one)} for name, one in named]}
