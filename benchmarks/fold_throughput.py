"""How fast does a fold go, against a copy of the same tensors in memory?

    python benchmarks/fold_throughput.py [--rounds 9] [--json docs/data/benchmarks/fold_throughput.json]

A: `fold(model)` of a trained model, which composes every kernel in float64 and leaves the model as it is.
B: a clone of every tensor of its state dict. C: a copy of the model (`copy.deepcopy`), which a fold makes too.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
import torchvision
from interleaved import machine, ratios, rounds_of

from doconv_convert import fold, to_doconv
from doconv_convert.check.lively import randomise_factors

MODELS = ["resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "convnext_tiny"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name in MODELS:
        torch.manual_seed(0)
        model = to_doconv(torchvision.models.get_model(name, weights=None))
        randomise_factors(model, torch.Generator().manual_seed(0))
        arms = {
            "fold": lambda model=model: fold(model),
            "clone": lambda model=model: [tensor.clone() for tensor in model.state_dict().values()],
            "deepcopy": lambda model=model: copy.deepcopy(model),
        }
        seconds = rounds_of(arms, options.rounds)
        throughput = ratios(seconds, "clone", "fold")
        row = {"model": name, "throughput": throughput, "deepcopy": ratios(seconds, "clone", "deepcopy")}
        row["seconds"] = {arm: round(sorted(each)[options.rounds // 2], 4) for arm, each in seconds.items()}
        rows.append(row)
        print(f"{name:18s} throughput {throughput['median']:.3f} of a copy; {row['seconds']}")
    if options.json:
        options.json.write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
