"""Linear regions that are left in a file: the branches that a training-time network ships, and the MACs they waste.

Importing this needs no torch. onnx-ir, which takes long to import, loads only for a file that may have a region.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from doconv_convert.check.macs.counting import count_macs
from doconv_convert.check.macs.result import MacCount, RegionLeft
from doconv_convert.check.onnx_files.external_data import require_own_data
from doconv_convert.check.onnx_files.model import read_model
from doconv_convert.errors import DoconvError

logger = logging.getLogger(__name__)

_CONVS = ("Conv", "ConvTranspose")
# What a region may consist of, next to its convolutions.
_OTHERS = ("Add", "AveragePool", "BatchNormalization", "Div", "Dropout", "Identity", "Mul", "Neg", "Pad", "Sub", "Sum")
_AFFINE = frozenset((*_CONVS, *_OTHERS))


def regions_left(
    path: Path,
    count: MacCount,
    dims: Mapping[str, int] | None = None,
    ignore: Collection[str] = (),
    *,
    required: bool = True,
) -> tuple[RegionLeft, ...]:
    """The regions that `fold --merge branches` would merge. `count` is the file's own (`count_macs`).

    Unlike the count this reads the weights. Raises DoconvError where they cannot be read, unless it is not `required`.
    """
    if not may_have_regions(read_model(path)):
        return ()
    try:
        require_own_data(path)
    except DoconvError:
        if required:
            raise
        logger.info("'%s': its weights cannot be read, so linear regions were not looked for", path)
        return ()
    try:
        import onnx_ir as ir
    except ImportError:
        if required:
            raise DoconvError("linear regions are found with onnx-ir, which is missing: pip install onnx-ir.") from None
        logger.info("'%s': without onnx-ir linear regions were not looked for", path)
        return ()
    from doconv_convert.rewrite.linear.evaluate import fits_onnx
    from doconv_convert.rewrite.linear.onnx_merge import merge_regions, region_nodes
    from doconv_convert.rewrite.linear.onnx_steps import read_steps
    from doconv_convert.rewrite.linear.regions import find_regions

    model = ir.load(path)
    regions = find_regions(read_steps(model.graph), "branches", fits_onnx).regions
    names = [tuple(node.name or node.outputs[0].name or "" for node in region_nodes(model.graph, r)) for r in regions]
    merged = merge_regions(model, regions)
    after = {node.name: node.macs for node in count_macs(ir.to_proto(model), dims, ignore).nodes}
    before = {node.name: node.macs for node in count.nodes}
    costs = [sum(before.get(name, 0) for name in nodes) for nodes in names]
    return tuple(
        RegionLeft(nodes, region.count("convolution"), cost, cost - after.get(name, 0))
        for region, nodes, name, cost in zip(regions, names, merged, costs, strict=True)
    )


def regions_as_json(
    path: str, count: Mapping[str, Any], dims: Mapping[str, int], ignore: Sequence[str], required: bool
) -> list[dict[str, Any]]:
    """`regions_left` for `check.confined`."""
    found = regions_left(Path(path), MacCount.from_json(count), dims, ignore, required=required)
    return [asdict(region) for region in found]


def may_have_regions(model: onnx.ModelProto) -> bool:
    """Whether two ways of affine nodes from one value meet again, or an affine node feeds a convolution."""
    known = {tensor.name for tensor in model.graph.initializer}
    roots: dict[str, frozenset[str]] = {}
    affine: set[str] = set()
    for node in model.graph.node:
        data = [name for name in node.input if name and name not in known]
        if node.op_type == "Constant":
            known.update(node.output)
            continue
        if node.op_type not in _AFFINE or not data:
            continue
        if node.op_type in _CONVS and data[0] in affine:
            return True
        reached = frozenset[str]().union(*(roots.get(name, frozenset((name,))) for name in data))
        if len(set(data)) > 1 and len(reached) == 1:
            return True
        affine.update(node.output)
        roots.update((name, reached) for name in node.output)
    return False
