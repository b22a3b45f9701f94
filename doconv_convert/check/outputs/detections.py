"""Detections compared box to box: nearly tied scores come out in any order, which is no fault.

A detector's output is a dict with boxes, labels and scores (and masks, keypoints) an image. Before its tensors
are compared, the detections are brought into the truth's order: greedily by label and overlap. Importing this
needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from doconv_convert.check.outputs.compare import Array

KEYS = frozenset({"boxes", "labels", "scores"})
# A tenth of what IoU 0.001 is worth: scores decide between boxes without an area only.
_SCORE_WEIGHT = 1e-4


def detection_groups(output: Any) -> list[dict[str, int]]:
    """For every image's dict of detections in a model's output: which tensors of the output are its entries."""
    from torch import Tensor
    from torch.utils._pytree import MappingKey, tree_flatten_with_path

    try:
        flattened = tree_flatten_with_path(output)[0]
    except ValueError:  # a registered class without its optional function for paths: no dict of detections
        return []
    leaves = [(path, leaf) for path, leaf in flattened if isinstance(leaf, Tensor)]
    groups: dict[str, dict[str, int]] = {}
    for index, (path, _) in enumerate(leaves):
        if path and isinstance(path[-1], MappingKey):
            groups.setdefault(str(path[:-1]), {})[str(path[-1].key)] = index
    return [group for group in groups.values() if group.keys() >= KEYS]


def in_order_of(truth: Sequence[Array], got: Sequence[Array], groups: Sequence[Mapping[str, int]]) -> list[Array]:
    """`got` with the detections of each group in the order of the truth's; where their number differs, as it is."""
    ordered = list(got)
    for group in groups:
        expected, found = ({key: arrays[index] for key, index in group.items()} for arrays in (truth, got))
        counts = {array.shape[:1] for array in (*expected.values(), *found.values())}
        if len(counts) == 1 and found["boxes"].shape[1:] == (4,):
            order = _match(expected, found)
            for key, index in group.items():
                ordered[index] = found[key][order]
    return ordered


def _match(expected: Mapping[str, Array], found: Mapping[str, Array]) -> Array:
    """For each expected detection the found one that fits best; each is taken once."""
    fit = (
        _overlaps(expected["boxes"], found["boxes"])
        + 2.0 * (expected["labels"][:, None] == found["labels"])
        - _SCORE_WEIGHT * np.abs(expected["scores"][:, None].astype(np.float64) - found["scores"])
    )
    fit = np.nan_to_num(fit, nan=-1.0)
    order = np.empty(len(fit), dtype=np.int64)
    for _ in range(len(fit)):
        row, column = np.unravel_index(fit.argmax(), fit.shape)
        order[row] = column
        fit[row, :] = fit[:, column] = -np.inf
    return order


def _overlaps(a: Array, b: Array) -> Array:
    """Intersection over union of every box with every other: (len(a), len(b))."""
    a, b = a[:, None].astype(np.float64), b[None].astype(np.float64)
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=-1)
    areas = [np.prod(box[..., 2:] - box[..., :2], axis=-1) for box in (a, b)]
    overlap: Array = common / np.maximum(areas[0] + areas[1] - common, 1e-12)
    return overlap
