"""How much longer does a proven export take than a bare one? Whole processes, in interleaved pairs.

    python benchmarks/speed/fold_onnx.py [--model resnet50] [--pairs 5]

A: `doconv-convert fold trained.safetensors --onnx out.onnx` (fold, two exports, graph, MACs, outputs, coverage).
B: `bare_export.py` (build, export once, onnxruntime session, one run). Both at batch 2, 224 pixels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from interleaved import machine

from doconv_convert import save, to_doconv

COMMAND = [sys.executable, "-c", "from doconv_convert.cli.app import main; main()"]


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = to_doconv(torchvision.models.get_model(options.model, weights=None))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".D"):
                    parameter.normal_(std=0.1 / parameter.shape[1] ** 0.5)
        checkpoint, onnx = Path(folder) / "trained.safetensors", Path(folder) / "out.onnx"
        save(model, checkpoint, source=f"torchvision:{options.model}")
        proven = [*COMMAND, "fold", str(checkpoint), "--onnx", str(onnx)]
        bare = [sys.executable, str(Path(__file__).with_name("bare_export.py")), options.model, str(onnx)]
        pairs = [(seconds(proven), seconds(bare)) for _ in range(options.pairs)]
    ratios = [a / b for a, b in pairs]
    result = {
        **machine(),
        "model": options.model,
        "pairs": pairs,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    for a, b in pairs:
        print(f"fold --onnx {a:6.1f} s   bare {b:6.1f} s   ratio {a / b:.2f}")
    print(f"ratio: median {result['ratio_median']:.2f}, {result['ratio_min']:.2f} to {result['ratio_max']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
