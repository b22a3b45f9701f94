"""Making torchvision's detectors find something on random weights, for rehearsals only.

Nothing passes their score thresholds at the start, and scores that are nearly tied come out in any order. So
a rehearsal builds them with thresholds of 0 and 20 detections, and draws their last layers anew, scaled so
that class logits have a standard deviation of 1.5 and box deltas one of 0.5. SSD has a head a level: each is
scaled so that its share of the detections (60 then) comes from it, and deltas, which count a tenth there, to 3.
RetinaNet and FCOS have one head for five levels, and show the best 12 of each; their scores are sigmoids, whose best
of a hundred thousand would be saturated at 1.5: 0.4.
Images keep the size they are given as: enlarged to 800 pixels they are so smooth that batch norms calibrated on
them amplify rounding (Faster R-CNN MobileNet: fp32 off by 8e-5 of the scores, at 320 pixels by 3e-6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from doconv_convert.artifacts.sources.inputs import DETECTION_SIZE
from doconv_convert.artifacts.sources.source import Source
from doconv_convert.rewrite.observe import run_model
from doconv_convert.rewrite.tracing import set_eval_mode
from doconv_convert.workflows.rehearsal.rescale import Factor, Rescale, rescaling, to_deviation

LOGITS, SIGMOID_LOGITS, DELTAS, LEVEL_DELTAS = 1.5, 0.4, 0.5, 3.0
DETECTIONS, LEVEL_DETECTIONS = 20, 60
_SCORES = ("*cls_logits", "*cls_score", "*mask_fcn_logits", "*kps_score_lowres")
_SIGMOID_SCORES = ("*classification_head.cls_logits", "*bbox_ctrness")
_SCORE_LEVELS = "*classification_head.module_list.[0-9]"
_DELTAS = ("*bbox_pred", "*bbox_reg")
_DELTA_LEVELS = "*regression_head.module_list.[0-9]"
# The score that the last shown detection of a level has.
_SHOWN = 0.2


def rehearsal_source(source: Source) -> Source:
    """The source of a detector that shows what it finds: thresholds 0, few detections, images not enlarged."""
    prefix, levels = "box_" if "rcnn" in source.name else "", "ssd" in source.name
    count = LEVEL_DETECTIONS if levels else DETECTIONS
    shown: dict[str, Any] = {f"{prefix}score_thresh": 0.0, f"{prefix}detections_per_img": count}
    if source.name.startswith(("retinanet", "fcos")):  # one head for all levels: the best few of each, all shown
        shown |= {"topk_candidates": LEVEL_DETECTIONS // 5, "detections_per_img": LEVEL_DETECTIONS}
    if not levels:
        shown |= {"min_size": DETECTION_SIZE, "max_size": 2 * DETECTION_SIZE}
    return Source(source.text, {**shown, **source.args})


def draw_heads(model: nn.Module, inputs: Any, generator: torch.Generator) -> None:
    """Draw the heads' last layers anew and scale each by what it gives at its first call of one forward."""
    levels = sum(fnmatchcase(name, _SCORE_LEVELS) for name, _ in model.named_modules())
    factors: Mapping[str, Factor] = {  # the first that fits counts
        **dict.fromkeys(_SIGMOID_SCORES, to_deviation(SIGMOID_LOGITS)),
        **dict.fromkeys(_SCORES, to_deviation(LOGITS)),
        **dict.fromkeys(_DELTAS, to_deviation(DELTAS)),
        _SCORE_LEVELS: _to_show(_classes(model), LEVEL_DETECTIONS // max(1, levels)),
        _DELTA_LEVELS: to_deviation(LEVEL_DELTAS),
    }
    hooks = {}
    for name, module in model.named_modules():
        factor = next((one for pattern, one in factors.items() if fnmatchcase(name, pattern)), None)
        layer = _last_layer(module)
        if factor is not None and layer is not None:
            hooks[layer] = Rescale(factor, generator)
    with rescaling(hooks):
        run_model(set_eval_mode(model), inputs)


def _to_show(classes: int, count: int) -> Factor:
    """The factor of SSD class logits (N, anchors x classes, H, W) with which the first image's `count` best scores, of
    any class but the background (0), are _SHOWN or more; fewer where there are few anchors."""

    def factor(output: Tensor) -> float:
        logits = output[0].reshape(-1, classes, *output.shape[2:]).movedim(1, -1)
        shown = max(1, min(count, logits[..., 0].numel() // 2))  # one anchor has few classes above _SHOWN
        low, high = 1e-6, 1e6
        for _ in range(60):  # halving the interval on a logarithmic scale
            middle = math.sqrt(low * high)
            scores = (middle * logits).softmax(-1)[..., 1:].flatten()
            last = float(scores.topk(shown).values[-1])
            low, high = (low, middle) if last >= _SHOWN else (middle, high)
        return high

    return factor


def _classes(model: nn.Module) -> int:
    """How many classes an SSD head has (1 for other detectors, which are not asked)."""
    from torchvision.models.detection.ssd import SSDScoringHead  # type: ignore[import-untyped]

    heads = [m for name, m in model.named_modules() if name.endswith("classification_head")]
    return next((head.num_columns for head in heads if isinstance(head, SSDScoringHead)), 1)


def _last_layer(module: nn.Module) -> nn.Module | None:
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    return layers[-1] if layers else None
