"""How fast does a fold go, against a copy of the same tensors in memory?

    python benchmarks/speed/fold_throughput.py [--rounds 9] [--json docs/data/benchmarks/fold_throughput.json]

A: `fold(model)` of a trained model, which composes every kernel in float64 and leaves the model as it is.
B: its kernels alone: composed, checked and cast into memory that is there, as a fold in place does.
C: a clone of every tensor of its state dict. D: a copy of the model (`copy.deepcopy`), which `fold(model)` makes too.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
import torchvision
from interleaved import machine, ratios, rounds_of
from torch import Tensor

from doconv_convert import fold, to_doconv
from doconv_convert.rewrite.fold_kernels import Factors, folded_rows, layer_factors
from doconv_convert.workflows.rehearsal.randomize import randomize_factors

MODELS = ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "convnext_tiny"]


def fold_into(every: list[tuple[Factors, Tensor]]) -> None:
    for factors, target in every:
        for rows, kernel in folded_rows(factors):
            target[rows].copy_(kernel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        torch.manual_seed(0)
        model = to_doconv(torchvision.models.get_model(name, weights=None))
        randomize_factors(model, torch.Generator().manual_seed(0))
        targets = [(factors, torch.empty_like(factors.weight).detach()) for factors in layer_factors(model)]
        arms = {
            "fold": lambda model=model: fold(model),
            "kernels": lambda targets=targets: fold_into(targets),
            "clone": lambda model=model: [tensor.clone() for tensor in model.state_dict().values()],
            "deepcopy": lambda model=model: copy.deepcopy(model),
        }
        seconds = rounds_of(arms, options.rounds)
        row = {"model": name, "throughput": ratios(seconds, "clone", "fold")}
        row |= {arm: ratios(seconds, "clone", arm) for arm in ("kernels", "deepcopy")}
        row["seconds"] = {arm: round(sorted(each)[options.rounds // 2], 4) for arm, each in seconds.items()}
        rows.append(row)
        told = ", ".join(f"{arm} {row[arm]['median']:.3f}" for arm in ("throughput", "kernels", "deepcopy"))
        print(f"{name:18s} of a clone: {told}; {row['seconds']}")
    if options.json:
        options.json.write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
