"""The float64 twin and the rounding of the fold, over the networks of torchvision and timm.

    python benchmarks/evidence/twin.py [--only torchvision:resnet18 ...] [--seed 0] [--resume]
    python docs/make/twin_page.py    # the table of docs/twin.md from what has been run

Without --only: every name of torchvision that the dynamo exporter serves, and the smallest of every timm family. Each
net is converted, its D drawn at random, calibrated (as `rehearse` does), folded and exported in float32 and float64.
A row of docs/data/twin.jsonl has how many weights were correctly rounded, what the twin's status says, how many kernels
float32 outputs cover, and how many the twin's do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import zoo
from mutations import CALIBRATION_BATCH

from doconv_convert import to_doconv
from doconv_convert.artifacts.export.exporter import export_onnx, is_or_holds_a_detector
from doconv_convert.artifacts.export.job import Flags
from doconv_convert.artifacts.export.twin import export_twin
from doconv_convert.artifacts.models import SourceModel, find_inputs
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.artifacts.sources.zoos import model_names
from doconv_convert.check.outputs.compare import COVERED_ABOVE
from doconv_convert.check.torch_runs.reference_run import reference_run
from doconv_convert.check.twin.status import Twin, check_twin
from doconv_convert.errors import DoconvError
from doconv_convert.rewrite.convert import copy_model
from doconv_convert.rewrite.fold import fold_in_place
from doconv_convert.workflows.rehearsal.randomize import randomize_and_calibrate

ROWS = zoo.ROOT / "docs/data/twin.jsonl"
_T = TypeVar("_T")


def measure(source: str, seed: int) -> dict[str, Any]:
    """One net's row. A step that fails is named in 'stopped'."""
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], _T]) -> _T:
        start = time.process_time()
        try:
            return run()
        finally:
            seconds[name] = round(time.process_time() - start, 2)

    parsed = parse_source(source)
    original = build(parsed, seed=seed).eval()
    if is_or_holds_a_detector(original):
        return {"source": source, "stopped": "TorchScript's exporter"}
    inputs = find_inputs(SourceModel(original, parsed), [], None)
    assert inputs is not None
    try:
        trained = to_doconv(original, example_inputs=inputs.arguments(inputs.export_batch), seed=seed)
        randomize_and_calibrate(trained, inputs.arguments(CALIBRATION_BATCH), seed)
        trained.eval()
        fold = timed("fold", lambda: fold_in_place(copy_model(trained), check_first=False))
        folded = fold.model.eval()
        rounded = [one for one in fold.rounding.values() if one.corrected is not None]
        with tempfile.TemporaryDirectory() as text:
            candidate, twin = Path(text) / "candidate.onnx", Path(text) / "twin.onnx"
            example = inputs.arguments(inputs.export_batch)
            report = timed("export", lambda: export_onnx(folded, example, candidate))
            wide = copy_model(folded)
            missing = timed("export in float64", lambda: export_twin(wide, example, twin, Flags()))
            batch = inputs.proof_batch if report.dynamic_batch else inputs.export_batch
            reference = timed("torch", lambda: reference_run(trained, folded, inputs.arguments(batch), batch))
            given = Twin(twin) if missing is None else Twin(None, missing)
            status, error = timed("twin", lambda: check_twin(given, candidate, reference, "passed"))
    except DoconvError as error_of_step:
        return {"source": source, "stopped": " ".join(str(error_of_step).split())[:300]}
    covered = {name for name, value in reference.sensitivity.items() if value is not None and value > COVERED_ABOVE}
    sharply = {name for name, value in reference.sharp.items() if value > COVERED_ABOVE}
    return {
        "source": source,
        "weights": sum(one.weights for one in rounded),
        "corrected": sum(one.corrected or 0 for one in rounded),
        "kernels": len(reference.sensitivity),
        "covered": len(covered),
        "covered_in_float64": len(covered | sharply),
        "state": status.state,
        "error": float(f"{error:.2g}"),
        "detail": status.detail[:400],
        "findings": list(status.findings[:3]),
        "seconds": seconds,
    }


def sources() -> list[str]:
    return [*(f"torchvision:{name}" for name in model_names("torchvision")), *zoo.smallest_of_each_family()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="sources, instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has")
    options = parser.parse_args()
    rows = {row["source"]: row for row in zoo.read(ROWS)}
    for source in options.only or sources():
        if options.resume and source in rows:
            continue
        rows[source] = measure(source, options.seed)
        ROWS.write_text("".join(json.dumps(rows[name]) + "\n" for name in sorted(rows)))
        print(json.dumps(rows[source]), flush=True)


if __name__ == "__main__":
    main()
