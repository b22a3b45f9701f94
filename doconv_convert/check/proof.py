"""The proof of one file: every check, in order. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from doconv_convert.check.coverage import check_coverage, with_branches
from doconv_convert.check.macs.counting import count_macs
from doconv_convert.check.macs.figures import compare_counts, describe_count
from doconv_convert.check.macs.files import count_macs as count_with_limits
from doconv_convert.check.macs.result import MacCount
from doconv_convert.check.merged import Merged, check_merged_graph
from doconv_convert.check.onnx_files.graph_diff import GraphComparison, compare_graphs
from doconv_convert.check.onnx_files.leftovers import leftover_composition
from doconv_convert.check.onnx_files.model import onnx_input_shapes
from doconv_convert.check.onnxruntime_run import check_outputs, check_resized
from doconv_convert.check.outputs.compare import ONNX_BOUND, Array
from doconv_convert.check.outputs.expected import FoldRun, ReferenceRun
from doconv_convert.check.status import Proof, Status
from doconv_convert.check.twin.runtime import LooseOperators
from doconv_convert.check.twin.status import MERGED, Twin, check_twin, settled
from doconv_convert.errors import DoconvError
from doconv_convert.words import counted


def prove(
    candidate: Path,
    baseline: Path,
    reference: ReferenceRun,
    fold: Status,
    resized: ReferenceRun | None = None,
    min_coverage: float = 0.0,
    merged: Merged | None = None,
    timeout: float | None = None,
    twin: Twin | None = None,
) -> Proof:
    """Every check of one file; `resized` are the same models at other sizes of their dynamic dimensions, `twin` is the
    network's export in float64. Where linear regions were `merged`, the baseline is the network from before. `timeout`
    ends each run of a file that need not be ours."""
    fold, reference = with_function(fold, reference.fold), with_branches(reference, candidate)
    graph = check_graph(baseline, candidate) if merged is None else check_merged_graph(baseline, candidate, merged)
    proof = Proof(str(candidate), [fold, graph], compared=reference.compared)
    ours, fewer = proof.state("graph") == "passed", merged is not None
    status, count = check_macs(baseline, candidate, reference.inputs, ours=ours, fewer=fewer)
    proof.statuses.append(status)
    proof.macs, proof.count = count.total, count
    if twin is not None and merged is not None:
        twin = Twin(None, MERGED)
    exact, error = (None, 0.0) if twin is None else check_twin(twin, candidate, reference, proof.state("graph"))
    # only what is the exported file, bit for bit, may be off by the runtime's own rounding
    faithful = exact is not None and {exact.state, proof.state("graph")} == {"passed"}
    loose = LooseOperators(candidate, reference.inputs, twin.path if twin is not None and faithful else None)
    try:
        status, proof.outputs = check_outputs(candidate, reference, loose, timeout)
    except DoconvError as error_of_outputs:
        status = Status("outputs", "failed", str(error_of_outputs))
    proof.loose = tuple(loose.found)
    if exact is not None:
        exact = settled(exact, error, status, proof.outputs)
        proof.statuses.append(exact)
    proof.statuses.append(status)
    if resized is not None:
        proof.statuses.append(check_resized(candidate, resized, loose, timeout))
    proof.sensitivity, proof.uncovered_reason = reference.sensitivity, reference.uncovered_reason
    twin_state = "not run" if exact is None else exact.state
    proof.statuses.append(check_coverage(reference, proof.state("graph"), fold.state, min_coverage, twin_state))
    return proof


def with_function(fold: Status, run: FoldRun | None) -> Status:
    """The fold's status, from its per-site check and from the whole network's runs in float64 before and after it."""
    if run is None or run.random is not None or fold.state != "passed":
        return fold
    if run.findings:
        detail = (
            "the folded network does not compute what the trained one does, both run in float64: it uses a kernel in "
            "more ways than one layer's convolution; keep that layer out of the conversion with exclude"
        )
        return replace(fold, state="failed", detail=detail, findings=(*fold.findings, *run.findings))
    detail = f"{fold.detail}; in float64 the outputs before and after it differ by {run.error:.1e}"
    if run.float32_error is not None and run.float32_error > ONNX_BOUND:
        detail += f"; the trained network itself, in float32, is off by {run.float32_error:.1e}"
    return replace(fold, detail=detail)


def check_graph(baseline: Path, candidate: Path, *, values: bool = True) -> Status:
    """Nodes, attributes, wiring, shapes and (`values`) initializer bytes; nothing of the composition is left."""
    comparison: GraphComparison = compare_graphs(baseline, candidate, values=values)
    expected = set(leftover_composition(baseline))
    findings = [*comparison.differences, *(left for left in leftover_composition(candidate) if left not in expected)]
    if findings:
        return Status("graph", "failed", "the graph differs from the original's", tuple(findings))
    nodes, initializers = counted(comparison.nodes, "node"), counted(comparison.initializers, "initializer")
    detail = f"{nodes} and {initializers} identical to the original's{'' if values else ', values aside'}"
    return Status("graph", "passed", detail)


def check_weights(baseline: Path, candidate: Path) -> Status:
    """Initializer bytes, of two files whose graphs are the same otherwise: what outputs on some inputs cannot tell."""
    comparison = compare_graphs(baseline, candidate)
    if comparison.equal:
        return Status("weights", "passed", f"{counted(comparison.initializers, 'initializer')} equal, byte for byte")
    detail = "initializers hold other values: where the outputs agree, they do so on these inputs"
    return Status("weights", "equivalent", detail, comparison.differences)


def check_macs(
    baseline: Path | MacCount,
    candidate: Path,
    inputs: Sequence[Array] = (),
    *,
    ours: bool = True,
    fewer: bool = False,
) -> tuple[Status, MacCount]:
    """MACs as exact integers, per node and in total, of one sample (of the whole batch that a static file fixes);
    `inputs` have the sizes for other dynamic dimensions. A candidate that is not `ours` is counted with limits. With
    `fewer` they need not be equal, but never more."""
    expected = baseline if isinstance(baseline, MacCount) else count_macs(baseline, dynamic_sizes(baseline, inputs))
    count = (count_macs if ours else count_with_limits)(candidate, dynamic_sizes(candidate, inputs))
    differences = _more(expected, count) if fewer else compare_counts(expected, count)
    figure = describe_count(count)
    if count.uncounted:
        figure += f"; not counted: {', '.join(f'{n} {op}' for op, n in count.uncounted.items())}"
    if differences:
        return Status("macs", "failed", "MACs differ from the original's", tuple(differences)), count
    if fewer:
        return Status("macs", "passed", f"{figure}; {expected.total:,} MACs before the merge"), count
    return Status("macs", "passed", f"{figure}, equal to the original's"), count


def _more(expected: MacCount, count: MacCount) -> list[str]:
    found = []
    if count.total > expected.total:
        found.append(f"{count.total:,} MACs, {expected.total:,} before the merge")
    if count.uncounted != expected.uncounted:
        found.append(f"not counted: {count.uncounted or 'nothing'}, before the merge {expected.uncounted or 'nothing'}")
    return found


def dynamic_sizes(path: Path, inputs: Sequence[Array]) -> dict[str, int]:
    """The sizes that the file's dynamic dimensions, all but the batch, have in `inputs`."""
    shapes = onnx_input_shapes(path)
    return {
        f"{name}[{axis}]" if dim == "?" else dim: array.shape[axis]
        for (name, shape), array in zip(shapes.items(), inputs, strict=False)
        for axis, dim in enumerate(shape[: array.ndim])
        if axis and isinstance(dim, str)
    }
