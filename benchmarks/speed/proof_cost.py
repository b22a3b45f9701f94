"""What the proof costs after the exports, against one fp32 eval forward and one onnxruntime session start.

    python benchmarks/speed/proof_cost.py [--model resnet50] [--rounds 5]

The proof is torch's part (a float64 and an fp32 run, one backward pass; `fold` hides it behind the exports), the
comparison of the graphs, the MACs, and every run in onnxruntime. Forward and session at batch 2, one thread each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from doconv_convert.artifacts.models import SourceModel, find_inputs
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.check.outputs.session import OnnxSession
from doconv_convert.check.proof import prove
from doconv_convert.check.torch_runs.reference_run import reference_run
from doconv_convert.rewrite.convert import copy_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "evidence"))

from mutations import exported, trained_model


def seconds(work: Callable[[], object]) -> float:
    """CPU time of this process: other work on the machine does not count."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = parse_source(f"torchvision:{options.model}")
    original = build(source).eval()
    inputs = find_inputs(SourceModel(original, source), [], None)
    assert inputs is not None
    with tempfile.TemporaryDirectory() as text:
        trained = trained_model(options.model, original, inputs, 0)
        case = exported(source, trained, inputs, Path(text), 0)
        batch, two = case.reference.samples, inputs.arguments(2)

        def forward() -> None:
            with torch.no_grad():
                original(*two)

        works: dict[str, Callable[[], object]] = {
            "forward": forward,
            "session": lambda: OnnxSession(case.candidate),
            "torch side": lambda: reference_run(trained, copy_model(case.folded), inputs.arguments(batch), batch),
            "prove": lambda: prove(case.candidate, case.baseline, case.reference, case.fold),
        }
        forward()
        rounds = [{name: seconds(work) for name, work in works.items()} for _ in range(options.rounds)]
    median = {name: statistics.median(one[name] for one in rounds) for name in works}
    unit = median["forward"] + median["session"]
    for name, value in median.items():
        print(f"{name:12s} {value:6.2f} s of CPU time")
    whole = (median["torch side"] + median["prove"]) / unit
    print(f"after the exports {median['prove'] / unit:.1f} x (forward + session); with torch's part {whole:.1f} x")
    if options.json:
        result = {
            "model": options.model,
            "median": median,
            "ratio": whole,
            "ratio_after_exports": median["prove"] / unit,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
