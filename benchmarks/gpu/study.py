"""The study's second edition in its GPU size (docs/study_plan.md): whole Fashion-MNIST with ResNet-18, and denoising
with Fourier branches. As much as the time allows, in the plan's order; `run.sh --only study` gives it a call's whole
time.

$FASHION_MNIST is a folder with the data set's four files; where it is not there, its settings are skipped and the JSON
says so. A dry run trains two cells of the CPU size for two steps.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import data
from cells import Results
from on_device import Run

ROOT = Path(__file__).resolve().parents[2]
FIRST = 20.0  # seconds that the first cell may take: kernels are compiled


def fashion_is_here() -> bool:
    folder = Path(os.environ.get("FASHION_MNIST", ROOT / "shared/fashion-mnist"))
    if folder.is_dir():
        os.environ["FASHION_MNIST"] = str(folder)
    return folder.is_dir() or data.DEBIAN.is_dir()


def main() -> None:
    run = Run(__doc__)
    try:
        import plan
        from training import run as train
    except ModuleNotFoundError as missing:  # a GPU machine has torch, and seldom scikit-image
        run.write(reason=f"The study was not run: '{missing.name}' is not installed.")
        print(f"skipped: '{missing.name}' is not installed")
        sys.exit(0)
    if run.dry:
        chosen = [cell for cell in plan.ready({}, "cpu", "denoise") if cell.seed == 10][4:8:3]
        run.write(rows=[train(cell, steps=2) for cell in chosen], skipped=[])
        return
    results: Results = {}
    only = None if fashion_is_here() else "denoise"
    skipped = [] if only is None else ["Fashion-MNIST is not there: $FASHION_MNIST names no folder."]
    needed = FIRST
    while run.left > needed and (cell := next(plan.ready(results, "gpu", only), None)) is not None:
        row = results[cell] = train(cell, device="cuda")
        needed = 2 + 1.5 * row["seconds"]
        print(json.dumps({name: row[name] for name in ("cell", "score", "seconds")}), flush=True)
        run.write(rows=list(results.values()), skipped=skipped)
    if not results:
        run.write(rows=[], skipped=skipped)


if __name__ == "__main__":
    main()
