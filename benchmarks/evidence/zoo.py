"""The zoo: what the conversion, the fold and the whole rehearsal do on every model of torchvision and timm.

    python benchmarks/evidence/zoo.py plans                          # every timm architecture, on the meta device
    python benchmarks/evidence/zoo.py rehearse torchvision --seed 0  # the whole rehearsal of every name
    python benchmarks/evidence/zoo.py rehearse timm --seed 0         # of the smallest of every timm family
    python benchmarks/evidence/zoo.py folds --seed 1                 # exact start and fold, timm below 100 M parameters
    python docs/make/zoo_page.py                                     # docs/zoo.md from what has been run

Each run adds rows to a JSON lines file under docs/data/zoo/ and continues where it was stopped; delete the rows (and
build/zoo/) that shall be made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from doconv_convert import plan
from doconv_convert.artifacts.sources.zoos import model_names

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs/data/zoo"
PLANS = DATA / "timm-plans.jsonl"
MOST_PARAMETERS = 100_000_000


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def plans() -> None:
    """A row for every timm architecture that is not in the file yet."""
    import timm

    done = {row["source"] for row in read(PLANS)}
    for name in model_names("timm"):
        if f"timm:{name}" in done:
            continue
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = timm.create_model(name, pretrained=False)
        planned = plan(model)
        append(
            PLANS,
            {
                "source": f"timm:{name}",
                "family": type(model).__module__.rpartition(".")[2],
                "parameters": sum(p.numel() for p in model.parameters()),
                "counts": planned.counts(),
                "kept": {row.name: row.reason for row in planned.rows if row.action == "keep"},
                "not_looked_into": len(planned.not_looked_into),
            },
        )


def smallest_of_each_family() -> list[str]:
    families: dict[str, tuple[int, str]] = {}
    for row in read(PLANS):
        one = row["parameters"], row["source"]
        families[row["family"]] = min(one, families.get(row["family"], one))
    return [source for _, source in sorted(families.values())]


def small_architectures() -> list[str]:
    rows = [(row["parameters"], row["source"]) for row in read(PLANS)]
    return [source for parameters, source in sorted(rows) if parameters < MOST_PARAMETERS]


def rehearse(sources: list[str], raw: Path, options: list[str]) -> Iterator[dict[str, Any]]:
    """The command line's own rehearsal; its results, made compact."""
    command = [sys.executable, "-m", "doconv_convert", "rehearse", *sources, "--resume", str(raw), *options]
    ended = subprocess.run(command, check=False).returncode
    if ended not in (0, 3):  # 3: a model failed, which the page says
        raise SystemExit(ended)
    yield from map(compact, read(raw))


def compact(result: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of one rehearsal."""
    last, proof = result["steps"][-1], result["proof"] or {}
    outputs = [one for one in proof.get("outputs", []) if one["bound"]]
    ratios = [one["error"] / one["bound"] for one in outputs if one["error"] is not None]
    sensitivity = [value for value in proof.get("sensitivity", {}).values() if value is not None]
    return {
        "source": result["source"],
        "status": result["status"],
        "proven": result["proven"],
        "exporter": result["exporter"],
        "counts": result["counts"],
        "figures": {name: _short(value) for name, value in result["figures"].items()},
        "states": {step["name"]: step["state"] for step in result["steps"]},
        "kernels": len(proof.get("sensitivity", {})),
        "least_reach": _short(min(sensitivity, default=None)),
        "flat": proof.get("uncovered_reason", {}),
        "worst": _short(max(ratios, default=None)),
        "dynamic_batch": result.get("dynamic_batch"),
        "detail": "" if result["status"] == "passed" else last["detail"][:300],
        "seconds": round(sum(step["seconds"] for step in result["steps"]), 1),
    }


def _short(value: float | None) -> float | None:
    return None if value is None or value != value else float(f"{value:.3g}")


def run(name: str, sources: list[str], raw_folder: Path, options: list[str]) -> None:
    """Rehearses the `sources` that docs/data/zoo/ has no row of, and adds theirs."""
    raw_folder.mkdir(parents=True, exist_ok=True)
    DATA.mkdir(parents=True, exist_ok=True)
    path = DATA / f"{name}.jsonl"
    rows = {str(row["source"]): row for row in read(path)}
    todo = [source for source in sources if source not in rows]
    if todo:
        rows |= {str(row["source"]): row for row in rehearse(todo, raw_folder / f"{name}.jsonl", options)}
    path.write_text("".join(json.dumps(rows[source]) + "\n" for source in sorted(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plans", "rehearse", "folds"])
    parser.add_argument("library", nargs="?", choices=["torchvision", "timm"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="sources, instead of all")
    parser.add_argument("--raw", type=Path, default=ROOT / "build/zoo", help="folder of the full results")
    options = parser.parse_args()
    flags = ["--seed", str(options.seed), "--jobs", str(options.jobs)]
    if options.what == "plans":
        plans()
    elif options.what == "folds":
        run(f"timm-folds-{options.seed}", options.only or small_architectures(), options.raw, ["--no-export", *flags])
    else:
        torchvision = [f"torchvision:{name}" for name in model_names("torchvision")]
        sources = torchvision if options.library == "torchvision" else smallest_of_each_family()
        run(f"{options.library}-{options.seed}", options.only or sources, options.raw, flags)


if __name__ == "__main__":
    main()
