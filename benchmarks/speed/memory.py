r"""Peak memory of `to-doconv`, `fold` and `fold --onnx` with its proof, in multiples of the weights' size.

    python benchmarks/speed/memory.py torchvision:regnet_y_128gf torchvision:vit_h_14 \
        [--json docs/data/benchmarks/memory.json]

The peak is the largest sum of resident memory over the processes of a command that are alive at once, sampled twenty
times a second; pages that processes share are counted once each (proportional set size). Limits: 2.5, 2.2 and 4.5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from interleaved import machine

from doconv_convert import load, save
from doconv_convert.workflows.rehearsal.randomize import randomize_factors

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"to-doconv": 2.5, "fold": 2.2, "fold --onnx": 4.5}


def descendants(root: int) -> list[int]:
    found = [root]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:  # it ended meanwhile
                continue
    return found


def resident(pid: int) -> int:
    """Bytes of proportional set size; 0 for a process that ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def peak_of(command: list[str]) -> tuple[int, float, str]:
    """(peak bytes, seconds, what it printed). Raises SystemExit where the command fails."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(map(resident, descendants(process.pid))))
            time.sleep(0.05)
        said.seek(0)
        words = said.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{words}")
    return peak, time.perf_counter() - start, words


def measure(source: str) -> dict[str, Any]:
    program = [sys.executable, "-m", "doconv_convert"]
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        start, trained = folder / "start.safetensors", folder / "trained.safetensors"
        plain, onnx = folder / "plain.safetensors", folder / "out.onnx"
        runs = {"to-doconv": peak_of([*program, "to-doconv", source, "-o", str(start)])}
        model = load(start).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        randomize_factors(model, generator)
        for parameter in model.parameters():  # a head of zeros would give a constant, which shows nothing
            if not parameter.any():
                torch.nn.init.normal_(parameter.data, std=0.02, generator=generator)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        save(model, trained, source=source)
        del model
        runs["fold"] = peak_of([*program, "fold", str(trained), "-o", str(plain)])
        runs["fold --onnx"] = peak_of([*program, "fold", str(trained), "--onnx", str(onnx)])
        external = any(folder.glob("out.onnx.*data"))
    return {
        "source": source,
        "weights": weights,
        "external_data": external,
        "proven": "proven: true" in runs["fold --onnx"][2],
        "peaks": {name: peak for name, (peak, _, _) in runs.items()},
        "seconds": {name: round(seconds, 1) for name, (_, seconds, _) in runs.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for source in options.sources:
        row = measure(source)
        rows.append(row)
        print(f"{source}: {row['weights'] / 1e9:.2f} GB of weights (with D); proven: {row['proven']}")
        for name, peak in row["peaks"].items():
            ratio = peak / row["weights"]
            print(f"  {name:12s} {peak / 1e9:6.2f} GB = {ratio:.2f} x (limit {LIMITS[name]}), {row['seconds'][name]} s")
        if options.json:
            options.json.write_text(json.dumps({**machine(), "limits": LIMITS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
