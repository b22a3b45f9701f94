"""Peak memory of a training step: ours and the textbook layer's over the plain model's.

    python benchmarks/training_memory.py [--json docs/data/benchmarks/training_memory.json]

Each arm trains in a fresh process; the kernel's own record of its peak is reset before the third step. Allowed on
top of the plain model: the added parameters, their gradients and their optimizer state (SGD with momentum: 3 tensors
each), and one kernel per over-parameterized layer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from interleaved import machine
from textbook import to_textbook
from workloads import Trainer, Workload

from doconv_convert import to_doconv

WORKLOADS = [
    Workload("resnet18", 16, 224),
    Workload("resnet18", 32, 64),
    Workload("resnext50_32x4d", 8, 224),
    Workload("mobilenet_v2", 8, 224),
    Workload("convnext_tiny", 8, 224),
]
ARMS = {"plain": lambda model: model, "ours": to_doconv, "textbook": to_textbook}


def peak(workload: Workload, arm: str) -> int:
    """Bytes at the peak of the third step, the process's resident memory included."""
    trainer = Trainer(ARMS[arm](workload.build()), workload.loss())
    for _ in range(2):
        trainer.step()
    Path("/proc/self/clear_refs").write_text("5")
    trainer.step()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def allowed(workload: Workload) -> int:
    model = to_doconv(workload.build())
    kept = [(m.D, m.weight) for m in model.modules() if isinstance(getattr(m, "D", None), torch.nn.Parameter)]
    return sum(4 * (3 * d.numel() + weight.numel()) for d, weight in kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(peak(WORKLOADS[int(options.child[0])], options.child[1]))
        return
    rows: list[dict[str, Any]] = []
    for index, workload in enumerate(WORKLOADS):
        peaks: dict[str, list[int]] = {arm: [] for arm in ARMS}
        for _ in range(options.runs):
            for arm in ARMS:
                command = [sys.executable, __file__, "--child", str(index), arm]
                peaks[arm].append(int(subprocess.run(command, check=True, capture_output=True).stdout))
        middle = {arm: sorted(each)[options.runs // 2] for arm, each in peaks.items()}
        row = {"workload": workload.title, "allowed": allowed(workload), "peaks": peaks}
        row["extra"] = {arm: middle[arm] - middle["plain"] for arm in ("ours", "textbook")}
        rows.append(row)
        extra = row["extra"]
        print(
            f"{workload.title:36s} plain {middle['plain'] / 1e6:7.1f} MB   ours {extra['ours'] / 1e6:+6.1f}   "
            f"textbook {extra['textbook'] / 1e6:+6.1f}   allowed {row['allowed'] / 1e6:+6.1f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
