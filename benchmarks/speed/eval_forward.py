"""Does an unfolded model cost anything in evaluation inside `cached`? Its forward over the plain model's.

    python benchmarks/speed/eval_forward.py [--rounds 15] [--json docs/data/benchmarks/eval_forward.json]

Both without gradients, turn by turn in one process; the scope is opened once, outside of what is timed.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from interleaved import machine, ratios, rounds_of
from workloads import Workload

from doconv_convert import cached, to_doconv

WORKLOADS = [
    Workload("resnet18", 8, 224),
    Workload("resnet18", 32, 64),
    Workload("mobilenet_v2", 8, 224),
    Workload("resnext50_32x4d", 8, 224),
    Workload("convnext_tiny", 8, 224),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for workload in WORKLOADS:
        plain = workload.build().eval()
        ours = to_doconv(plain)
        x = torch.randn(workload.batch, 3, workload.size, workload.size)
        with torch.no_grad(), cached(ours):
            seconds = rounds_of({"plain": partial(plain, x), "cached": partial(ours, x)}, options.rounds)
        over = ratios(seconds, "cached", "plain")
        rows.append({"workload": workload.title, "over_plain": over})
        print(f"{workload.title:36s} {over['median']:.3f} ({over['low']:.3f}-{over['high']:.3f})", flush=True)
    if options.json:
        options.json.write_text(json.dumps({**machine(), "rounds": options.rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
