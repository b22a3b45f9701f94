"""timm's families with hand-written fuse code, folded by `fold(merge="all")` and by timm itself, in float64.

    python benchmarks/evidence/linear_regions.py [NAME ...]

Of each family the smallest model, with random batch-norm gains and shifts and statistics from one batch. Counted are
batch norms and convolutions before and after, and the largest difference of the outputs, of their scale; for timm's
`reparameterize_model` too. Results go to docs/data/linear_regions.json after every model;
docs/make/linear_regions_table.py puts the table into the page.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from doconv_convert.files import atomic_write
from doconv_convert.rewrite.fold import fold_in_place

RESULTS = Path(__file__).parents[2] / "docs" / "data" / "linear_regions.json"
NAMES = (
    *("repvgg_a0", "mobileone_s0", "repghostnet_050", "ghostnetv3_050", "fastvit_t8", "repvit_m0_9", "tiny_vit_5m_224"),
    *("levit_128s", "levit_conv_128s", "efficientvit_m0", "nextvit_small", "shvit_s1", "efficientvim_m1", "iformer_t"),
    "lcnetv2_small",
)


def calibrated(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model in eval mode and float64, and two samples."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
    size = model.default_cfg["input_size"]
    with torch.no_grad():
        model.train()(torch.randn(8, *size))
    return model.eval().double(), torch.randn(2, *size, dtype=torch.float64)


def count(model: nn.Module, cls: type[nn.Module]) -> int:
    return sum(isinstance(module, cls) for module in model.modules())


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple | list) else output


@torch.no_grad()
def measured(name: str) -> dict[str, Any]:
    model, x = calibrated(name)
    truth = first(model(x))
    row: dict[str, Any] = {"convolutions": count(model, _ConvNd), "batch_norms": count(model, _BatchNorm)}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    report = fold_in_place(copy.deepcopy(model), merge="all")
    row["ours"] = _row(report.model, x, truth) | {
        "regions": len(report.merged),
        "region_error": max((region.error for region in report.merged), default=0.0),
        "left": dict(Counter(region.reason for region in report.left)),
        "seconds": round(time.perf_counter() - start, 1),
    }
    row["norms_left"] = [path for path, module in report.model.named_modules() if isinstance(module, _BatchNorm)]
    try:
        row["timm"] = _row(reparameterize_model(copy.deepcopy(model)).eval(), x, truth)
    except Exception as error:  # timm's own fuse code may raise anything
        row["timm"] = {"raises": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
    return row


def _row(model: nn.Module, x: torch.Tensor, truth: torch.Tensor) -> dict[str, Any]:
    error = float((first(model(x)) - truth).abs().max() / truth.abs().max())
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "convolutions": count(model, _ConvNd),
        "batch_norms": count(model, _BatchNorm),
        "parameters": parameters,
        "error": error,
    }


def main() -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    results["versions"] = {"torch": torch.__version__, "timm": timm.__version__}
    for name in sys.argv[1:] or NAMES:
        results["models"][name] = measured(name)
        print(name, json.dumps(results["models"][name]), flush=True)
        with atomic_write(RESULTS) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
