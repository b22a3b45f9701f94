"""`verify A.onnx --against B.onnx`: both files are of unknown origin, and read and run in a process with limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from doconv_convert.check.confined import confined, run_limits
from doconv_convert.check.status import Proof, Status
from doconv_convert.files import require_file


def compare_pair(
    baseline: Path, candidate: Path, shapes: Sequence[str], file: Path | None, timeout: float | None = None
) -> Proof:
    """`compare_files` on the samples in `file`, or on random ones of these `shapes`. It ends after `timeout` seconds of
    work; by default that follows the MACs counted."""
    for path in (candidate, baseline):
        require_file(path, "an ONNX model")
    arguments = (str(baseline), list(shapes), None if file is None else str(file))
    with confined() as process:
        macs = process.call("workflows.onnx_pair:sampled_macs", candidate, *arguments)
        limits = run_limits(macs, [candidate, baseline, *([] if file is None else [file])], timeout)
        found = process.call("workflows.onnx_pair:proof_as_json", candidate, *arguments, limits=limits)
    return Proof(str(candidate), [Status(**one) for one in found["statuses"]], found["macs"])


def sampled_macs(candidate: str, baseline: str, shapes: Sequence[str], file: str | None) -> int:
    """The MACs that running both files on the samples takes."""
    from doconv_convert.check.macs.counting import count_macs
    from doconv_convert.check.proof import dynamic_sizes
    from doconv_convert.workflows.onnx_samples import onnx_samples

    inputs = onnx_samples(Path(baseline), shapes, None if file is None else Path(file))
    samples = max((array.shape[0] for array in inputs if array.ndim), default=1)
    return samples * sum(count_macs(path, dynamic_sizes(Path(path), inputs)).total for path in (baseline, candidate))


def proof_as_json(candidate: str, baseline: str, shapes: Sequence[str], file: str | None) -> dict[str, Any]:
    from doconv_convert.check.compare_files import compare_files
    from doconv_convert.workflows.onnx_samples import onnx_samples

    inputs = onnx_samples(Path(baseline), shapes, None if file is None else Path(file))
    proof = compare_files(Path(baseline), Path(candidate), inputs)
    return {"statuses": [asdict(one) for one in proof.statuses], "macs": proof.macs}
