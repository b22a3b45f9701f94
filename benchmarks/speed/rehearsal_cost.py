"""What does a rehearsal without the export cost, against building the same models and running each once?

    python benchmarks/speed/rehearsal_cost.py [--only NAME...] [--raw build/zoo/no-export.jsonl]

A: `rehearse(source, export=False)`. B: build the model, run it once in eval mode at batch 2 (detectors as a rehearsal
runs them: at 320 pixels). One after the other, model by model, in one process; the figure is the ratio of the sums.
Both at another seed than docs/zoo.md's first, which shows the statuses of start and fold at that one too.
The results of A are written as `rehearse --resume` reads them, so that the report of the whole zoo is
`doconv-convert rehearse 'torchvision:*' --no-export --resume build/zoo/no-export.jsonl --report zoo.html`.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import torch
from interleaved import machine

from doconv_convert import rehearse
from doconv_convert.artifacts.models import SourceModel, find_inputs
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.artifacts.sources.zoos import model_names
from doconv_convert.rewrite.observe import run_model
from doconv_convert.rewrite.tracing import set_eval_mode
from doconv_convert.workflows.rehearsal.detectors import rehearsal_source

ROOT = Path(__file__).resolve().parents[2]
SEED = 1
RESULT = ROOT / "docs/data/benchmarks/rehearsal_cost.json"


def build_and_run(text: str) -> float:
    """Seconds."""
    start = time.perf_counter()
    source = parse_source(text, {})
    model = build(source, seed=SEED)
    inputs = find_inputs(SourceModel(model, source), (), None)
    if inputs is None:
        raise SystemExit(f"'{text}' does not tell its input")
    if inputs.image_list:
        start = time.perf_counter()
        model = build(rehearsal_source(source), seed=SEED)
    with torch.no_grad():
        run_model(set_eval_mode(model), inputs.arguments(2))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names, instead of all of torchvision")
    parser.add_argument("--raw", type=Path, default=ROOT / "build/zoo/no-export.jsonl", help="what is there stays")
    options = parser.parse_args()
    options.raw.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    done = {row["source"] for row in rows}
    rehearse("torchvision:squeezenet1_1", export=False)  # lazy imports
    for name in options.only or model_names("torchvision"):
        text = f"torchvision:{name}"
        if text in done:
            continue
        plain = build_and_run(text)
        gc.collect()
        start = time.perf_counter()
        result = rehearse(text, export=False, seed=SEED)
        seconds = time.perf_counter() - start
        gc.collect()
        with options.raw.open("a") as file:
            file.write(json.dumps(result.to_json()) + "\n")
        rows.append({"source": text, "status": result.status, "plain": round(plain, 2), "rehearsal": round(seconds, 2)})
        ratio = sum(row["rehearsal"] for row in rows) / sum(row["plain"] for row in rows)
        result_json = {**machine(), "seed": SEED, "ratio": round(ratio, 2), "rows": rows}
        RESULT.write_text(json.dumps(result_json, indent=1) + "\n")
        print(f"{text}: {result.status}, {seconds:.1f} s, plain {plain:.1f} s; so far {ratio:.2f} times", flush=True)


if __name__ == "__main__":
    main()
