"""Peak memory of a training step: ours and the textbook layer's over the plain model's.

    python benchmarks/speed/training_memory.py [--json docs/data/benchmarks/training_memory.json]

Each arm trains in a fresh process under torch's profiler, which records every allocation and release of torch's
allocator from the model's building on. The figure is the largest sum of living bytes in the third step: exact, where a
process's resident memory scatters by more than what is measured. Allowed on top of the plain model: the added
parameters, their gradients and their optimizer state (SGD with momentum: 3 tensors each), and one kernel per
over-parameterized layer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import machine
from textbook import to_textbook
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from workloads import Trainer, Workload

from doconv_convert import to_doconv

WORKLOADS = [
    Workload("resnet18", 16, 224),
    Workload("resnet18", 32, 64),
    Workload("resnext50_32x4d", 8, 224),
    Workload("mobilenet_v2", 8, 224),
    Workload("convnext_tiny", 8, 224),
]
ARMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "ours": to_doconv,
    "auto": lambda model: to_doconv(model, composition="auto"),
    "textbook": to_textbook,
}


def peak(workload: Workload, arm: str) -> int:
    """Bytes of living tensors at the peak of the third step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = Trainer(ARMS[arm](workload.build()), workload.loss())
        for _ in range(2):
            trainer.step()
        with record_function("third step"):
            trainer.step()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    start = next(event["ts"] for event in events if event["name"] == "third step")
    living = most = 0
    for event in sorted((one for one in events if one["name"] == "[memory]"), key=lambda one: one["ts"]):
        living += event["args"]["Bytes"]
        most = max(most, living) if event["ts"] >= start else 0
    return most


def allowed(workload: Workload) -> int:
    model = to_doconv(workload.build())
    layers = [m for m in model.modules() if isinstance(getattr(m, "D", None), torch.nn.Parameter)]
    kept = [(layer.D, layer.weight_first_slots) for layer in layers]
    return sum(4 * (3 * d.numel() + weight.numel()) for d, weight in kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(peak(WORKLOADS[int(options.child[0])], options.child[1]))
        return
    rows: list[dict[str, Any]] = []
    for index, workload in enumerate(WORKLOADS):
        peaks = {}
        for arm in ARMS:
            command = [sys.executable, __file__, "--child", str(index), arm]
            peaks[arm] = int(subprocess.run(command, check=True, capture_output=True).stdout)
        row = {"workload": workload.title, "allowed": allowed(workload), "peaks": peaks}
        row["extra"] = {arm: peaks[arm] - peaks["plain"] for arm in ARMS if arm != "plain"}
        rows.append(row)
        extra = row["extra"]
        print(
            f"{workload.title:36s} plain {peaks['plain'] / 1e6:7.1f} MB   ours {extra['ours'] / 1e6:+6.1f}   auto "
            f"{extra['auto'] / 1e6:+6.1f}   textbook {extra['textbook'] / 1e6:+6.1f}   "
            f"allowed {row['allowed'] / 1e6:+6.1f}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
