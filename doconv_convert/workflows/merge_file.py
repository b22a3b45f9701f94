"""`fold model.onnx --merge`, step by step: find the linear regions of a file, merge, prove, write. This needs no torch.

The truth is the input file itself, evaluated in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from doconv_convert.artifacts.export import onnx_file
from doconv_convert.check.certificate.paths import certificate_path, reference_path
from doconv_convert.check.float64_file import evaluate, part_of, widened
from doconv_convert.check.merged import Merged, check_merged_graph, value_hash
from doconv_convert.check.onnx_files.external_data import require_own_data
from doconv_convert.check.onnx_files.model import read_model
from doconv_convert.check.onnxruntime_run import check_outputs
from doconv_convert.check.outputs.compare import Array, relative_error
from doconv_convert.check.outputs.expected import ReferenceRun
from doconv_convert.check.outputs.session import run_onnx
from doconv_convert.check.proof import check_macs
from doconv_convert.check.status import Proof, Status
from doconv_convert.errors import UsageError
from doconv_convert.files import check_writable, workspace_beside
from doconv_convert.rewrite.linear.evaluate import check_sizes, fits_onnx, shown_macs
from doconv_convert.rewrite.linear.onnx_merge import merge_regions, weights_of
from doconv_convert.rewrite.linear.onnx_steps import read_steps
from doconv_convert.rewrite.linear.reasons import Reason
from doconv_convert.rewrite.linear.regions import find_regions
from doconv_convert.rewrite.linear.steps import DeclinedRegion, Found, LinearRegion, Merge
from doconv_convert.words import counted
from doconv_convert.workflows.onnx_samples import onnx_samples

# A region and its convolution, both in float64: sums of at most a few ten thousand terms in another order.
REGION_TOLERANCE = 1e-12
# The whole file before and after, both in float64. The largest seen is 3e-15.
FILE_TOLERANCE = 1e-10


@dataclass(frozen=True)
class MergeRequest:
    """What `fold MODEL.onnx` is asked for: the command line's options."""

    model: Path
    out: Path
    merge: Merge
    input_shapes: Sequence[str] = ()
    input_file: Path | None = None

    def __post_init__(self) -> None:
        if self.merge == "none":
            raise UsageError(f"'{self.model}' is an ONNX file: say with `merge` branches or all what to fold in it.")
        if self.out.suffix != ".onnx":
            raise UsageError(f"`plain`: got '{self.out}', expected a file that ends in .onnx.")
        if self.out.resolve() == self.model.resolve():
            raise UsageError(f"`plain` names '{self.out}', the file that is folded; expected another one.")


@dataclass(frozen=True)
class MergeResult:
    """What was merged and left, the proof, and the file that was `written`, None where a check failed."""

    merged: Merged
    proof: Proof
    nodes: tuple[int, int]
    written: Path | None

    def to_json(self) -> dict[str, Any]:
        return {
            "merged": self.merged.to_json(),
            "nodes": list(self.nodes),
            "proof": self.proof.to_json(),
            "proven": self.proof.proven,
            "written": [] if self.written is None else [str(self.written)],
        }


def merge_file(request: MergeRequest, progress: Callable[[str], None] = lambda text: None) -> MergeResult:
    """Merge, prove and write. Raises UsageError and DoconvError, before anything is written."""
    check_writable(request.out)
    read_model(request.model)
    require_own_data(request.model)
    inputs = onnx_samples(request.model, request.input_shapes, request.input_file)
    progress("folding")
    wide = widened(onnx.load(request.model))
    found, errors = checked_regions(wide, request.merge)
    merged = _facts(request.merge, found, errors)
    with workspace_beside(request.out) as folder:
        candidate = folder / request.out.name
        model = ir.load(request.model)
        merge_regions(model, found.regions)
        onnx_file.write(model, candidate)
        progress("proving")
        proof = _prove(request.model, candidate, wide, found, merged, inputs)
        proof.file = str(request.out)
        counts = len(read_model(request.model).graph.node), len(read_model(candidate).graph.node)
        if not proof.failed:
            stale = [certificate_path(request.out), reference_path(request.out)]
            onnx_file.install_model(candidate, request.out, stale=stale)
    return MergeResult(merged, proof, counts, None if proof.failed else request.out)


def checked_regions(wide: onnx.ModelProto, merge: Merge) -> tuple[Found, list[tuple[float, list[tuple[int, ...]]]]]:
    """The regions of a widened model that pass their own check, each with the error and the sizes of that check."""
    found = find_regions(read_steps(ir.from_proto(wide).graph), merge, fits_onnx)
    kept, errors = [], []
    for region in found.regions:
        sizes = check_sizes(region)
        error = region_error(wide, region, sizes)
        if error <= REGION_TOLERANCE:
            kept.append(region)
            errors.append((error, sizes))
        else:
            found.declined.append(DeclinedRegion(region.steps, region.entry, Reason.NOT_EQUAL))
    return Found(kept, found.declined), errors


def region_error(wide: onnx.ModelProto, region: LinearRegion, sizes: Sequence[tuple[int, ...]]) -> float:
    """The largest relative difference, at several sizes, between a region's own nodes and its convolution."""
    part = part_of(wide, {step.name for step in region.steps}, region.entry, region.output)
    generator, worst = np.random.default_rng(0), 0.0 if sizes else np.inf
    for size in sizes:
        x = generator.standard_normal((2, region.conv.in_channels, *size))
        (expected,), got = evaluate(part, [x]), region.conv(x)
        worst = max(worst, relative_error(got, expected) if got.shape == expected.shape else np.inf)
        if np.isnan(worst):
            return float("inf")
    return worst


def _prove(
    before: Path, after: Path, wide: onnx.ModelProto, found: Found, merged: Merged, inputs: Sequence[Array]
) -> Proof:
    exact = ir.from_proto(wide)
    merge_regions(exact, found.regions)
    truth = evaluate(wide, inputs)
    error = max(
        (relative_error(a, b) if a.shape == b.shape else np.inf)
        for a, b in zip(evaluate(ir.to_proto(exact), inputs), truth, strict=True)
    )
    worst = max((float(region["error"]) for region in merged.regions), default=0.0)
    detail = (
        f"{counted(len(found.regions), 'linear region')}, each equal to its own nodes in float64 at several sizes, "
        f"borders included (at most {worst:.1e}); in float64 the file's outputs before and after differ by {error:.1e}"
    )
    fold = Status("fold", "passed" if error <= FILE_TOLERANCE else "failed", detail)
    proof = Proof(str(after), [fold, check_merged_graph(before, after, merged)])
    status, count = check_macs(before, after, inputs, fewer=True)
    proof.macs, proof.count = count.total, count
    _, plain = run_onnx(before, inputs)
    samples = inputs[0].shape[0] if inputs and inputs[0].ndim else 1
    outputs, proof.outputs = check_outputs(after, ReferenceRun(inputs, truth, plain, samples, {}))
    # the comparison's own words are about a network that torch runs
    said = outputs.detail.replace("fp32 torch", "the file before")
    proof.statuses += [status, replace(outputs, detail=said)]
    return proof


def _facts(merge: Merge, found: Found, errors: Sequence[tuple[float, list[tuple[int, ...]]]]) -> Merged:
    regions, values = [], set()
    for region, (error, sizes) in zip(found.regions, errors, strict=True):
        conv = region.conv
        values |= {value_hash(array) for array in weights_of(conv) if array is not None}
        regions.append(
            {
                "name": f"{region.output}.merged",
                "nodes": [step.name for step in region.steps],
                "convolutions": region.count("convolution"),
                "batch_norms": region.count("batch norm"),
                "kernel": list(conv.kernel.shape),
                "groups": conv.groups,
                "macs_before": region.macs,
                "macs": shown_macs(conv),
                "parameters_before": region.parameters,
                "parameters": conv.parameters,
                "error": error,
                "sizes": [list(size) for size in sizes],
            }
        )
    left = [
        {"module": "", "nodes": [step.name for step in one.steps], "reason": one.reason.value} for one in found.declined
    ]
    return Merged(merge, regions, left, frozenset(values))
