"""The graph of a file whose linear regions were merged: against the one from before, whose branches must be gone.

Importing this needs no torch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from doconv_convert.check.onnx_files.external_data import require_own_data
from doconv_convert.check.onnx_files.leftovers import leftover_composition
from doconv_convert.check.onnx_files.model import read_model
from doconv_convert.check.onnx_files.tensors import elements
from doconv_convert.check.status import Status
from doconv_convert.rewrite.linear.steps import Found, Merge
from doconv_convert.words import counted

# Operators that a region may consist of: others must be as many as before, these at most.
_KINDS = ("Conv", "ConvTranspose", "BatchNormalization")
_OTHERS = ("Add", "AveragePool", "Constant", "Div", "Dropout", "Identity", "Mul", "Neg", "Pad", "Sub", "Sum")
AFFINE = frozenset((*_KINDS, *_OTHERS))
_SHOWN = 5


@dataclass(frozen=True)
class Merged:
    """What was merged: each region as JSON, with its name; what looked like one and was left, with the reason; and the
    new convolutions' values, as `value_hash` has them."""

    merge: Merge
    regions: Sequence[Mapping[str, Any]]
    left: Sequence[Mapping[str, Any]] = ()
    values: frozenset[str] = field(default=frozenset())

    def to_json(self) -> dict[str, Any]:
        return {"merge": self.merge, "regions": list(self.regions), "left": list(self.left)}


def check_merged_graph(baseline: Path, candidate: Path, merged: Merged) -> Status:
    """Nothing of the branches is left; every other node is there, as often as before; every weight is one of the
    original's or of a merged convolution, bit for bit. `baseline` is the network from before the merge."""
    before, after = Counter(_operators(baseline)), Counter(_operators(candidate))
    findings = [
        f"{counted(after[op], 'node')} {op}, expected {'at most ' if op in AFFINE else ''}{before[op]}"
        for op in sorted(before | after)
        if after[op] > before[op] or (op not in AFFINE and after[op] < before[op])
    ]
    remaining = regions_of(candidate, merged.merge).regions
    if len(remaining) > len(merged.left):
        findings += [
            f"a linear region is left: {', '.join(step.name for step in region.steps)}" for region in remaining[:_SHOWN]
        ]
    expected = set(leftover_composition(baseline))
    findings += [left for left in leftover_composition(candidate) if left not in expected]
    known = {*_weight_hashes(baseline), *merged.values}
    weights = list(_weight_hashes(candidate).items())
    foreign = [name for value, name in weights if value not in known]
    findings += [f"initializer '{name}' is neither the original's nor a merged kernel" for name in foreign[:_SHOWN]]
    if findings:
        return Status("graph", "failed", "the graph is not the original's with its regions merged", tuple(findings))
    kinds = ", ".join(f"{op} {before[op]} to {after[op]}" for op in _KINDS if before[op] or after[op])
    detail = (
        f"merged: {counted(len(merged.regions), 'linear region')} of the original's graph, {kinds}; none of their "
        f"branches is left; {counted(len(weights), 'weight')} equal to the original's or a merged kernel's, bit for bit"
    )
    if merged.left:
        reasons = Counter(str(one["reason"]) for one in merged.left)
        detail += "; left: " + "; ".join(f"{count} ({reason})" for reason, count in sorted(reasons.items()))
    return Status("graph", "passed", detail)


def regions_of(path: Path, merge: Merge) -> Found:
    """The linear regions of a file's main graph. Raises DoconvError where its weights are not its own."""
    require_own_data(path)
    # certificates of ordinary files are checked where onnx-ir is not installed
    import onnx_ir as ir

    from doconv_convert.rewrite.linear.evaluate import fits_onnx
    from doconv_convert.rewrite.linear.onnx_steps import read_steps
    from doconv_convert.rewrite.linear.regions import find_regions

    return find_regions(read_steps(ir.load(path).graph), merge, fits_onnx)


def value_hash(values: np.ndarray[Any, Any]) -> str:
    """Of the bits of float32 values; their shape does not count, which exporters change."""
    return hashlib.sha256(np.ascontiguousarray(values, np.float32).tobytes()).hexdigest()


def _weight_hashes(path: Path) -> dict[str, str]:
    """{hash: name} of the float initializers of more than one value."""
    return {
        value_hash(elements(tensor, path.parent)): tensor.name
        for tensor in read_model(path).graph.initializer
        if tensor.data_type == TensorProto.FLOAT and prod(tensor.dims) > 1
    }


def _operators(path: Path) -> Iterator[str]:
    model = read_model(path)
    yield from _of(model.graph.node)
    for function in model.functions:
        yield from _of(function.node)


def _of(nodes: Sequence[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _of(attribute.g.node)
