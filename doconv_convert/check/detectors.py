"""Making torchvision's detectors find something on random weights, for rehearsals only.

Nothing passes their score thresholds at the start, and scores that are nearly tied come out in any order. So
a rehearsal builds them with thresholds of 0 and 20 detections, and draws their last layers anew, scaled so
that class logits have a standard deviation of 1.5 and box deltas one of 0.2.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from doconv_convert.artifacts.sources import Source
from doconv_convert.rewrite.measure import run_model
from doconv_convert.rewrite.modes import in_eval

LOGITS, DELTAS = 1.5, 0.2
DETECTIONS = 20
_SCORES = ("*cls_logits", "*cls_score", "*bbox_ctrness", "*mask_fcn_logits", "*kps_score_lowres")
_TARGETS = {
    **dict.fromkeys((*_SCORES, "head.classification_head.module_list.*"), LOGITS),
    **dict.fromkeys(("*bbox_pred", "*bbox_reg", "head.regression_head.module_list.*"), DELTAS),
}


def rehearsal_source(source: Source) -> Source:
    """The source of a detector that shows what it finds: thresholds 0, 20 detections."""
    prefix = "box_" if "rcnn" in source.name else ""
    shown = {f"{prefix}score_thresh": 0.0, f"{prefix}detections_per_img": DETECTIONS}
    return Source(source.text, {**shown, **source.args})


def draw_heads(model: nn.Module, inputs: Any, generator: torch.Generator) -> None:
    """Draw the heads' last layers anew and scale each by what it gives at its first call of one forward."""
    handles = []
    for name, module in model.named_modules():
        target = next((std for pattern, std in _TARGETS.items() if fnmatchcase(name, pattern)), None)
        layer = _last_layer(module)
        if target is not None and layer is not None:
            handles.append(layer.register_forward_hook(_Scale(target, generator)))
    try:
        with torch.no_grad():
            run_model(in_eval(model), inputs)
    finally:
        for handle in handles:
            handle.remove()


class _Scale:
    def __init__(self, target: float, generator: torch.Generator) -> None:
        self.target, self.generator, self.done = target, generator, False

    def __call__(self, layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.done:
            return None
        self.done = True
        weight = layer._parameters["weight"]
        drawn = torch.randn(weight.shape, generator=self.generator) / math.sqrt(max(1, weight[0].numel()))
        weight.copy_(drawn)
        if layer.bias is not None:
            layer.bias.zero_()
        scale = self.target / max(float(layer.forward(*args).std()), 1e-6)
        for name in ("weight", "weight_extra"):
            if layer._parameters.get(name) is not None:
                layer._parameters[name].mul_(scale)
        return layer.forward(*args)  # type: ignore[no-any-return]


def _last_layer(module: nn.Module) -> nn.Module | None:
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    return layers[-1] if layers else None
