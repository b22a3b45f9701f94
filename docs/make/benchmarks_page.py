"""docs/benchmarks.md from the JSON files that the benchmarks leave in docs/data/benchmarks/.

python docs/make/benchmarks_page.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "docs/data/benchmarks"
HEAD = """# What it costs

Made by `python docs/make/benchmarks_page.py` from `docs/data/benchmarks/`; do not edit. Every section names the
command that measured it. Times are medians of ratios: all arms take turns in one process, round by round, and a ratio
is taken within each round; brackets hold the middle half of the rounds. The *textbook* layer
([textbook.py](../benchmarks/speed/textbook.py)) is DO-Conv as the paper's formula reads: the identity added to D and an
einsum, every forward.
"""


def ratio(r: dict[str, float]) -> str:
    return f"{r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})"


def training_step(data: dict[str, Any]) -> list[str]:
    lines = [
        "One step: forward, loss, backward, SGD with momentum; every figure is a step's time over the plain model's. "
        "RetinaNet's heads run five times in a forward and RAFT's update block twelve times: open "
        "[`cached`](training.md) there. *Excess* is DO-Conv's over plain (inside `cached`, where that was measured) as "
        "a part of the textbook's, where that has at least 5 %. *auto* is `to_doconv(model, "
        'composition="auto")`; where it is empty, no layer has so few outputs. '
        "*Without product.c* is a package built without a C compiler. Where "
        "the brackets of two columns overlap, these rounds could not tell the two apart.",
        "",
        "| model | plain, s | DO-Conv | inside `cached` | textbook | excess | auto | without product.c |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in data["rows"]:
        over = row["over_plain"]
        peer = over["textbook"]["median"] - 1
        share = f"{(over.get('cached', over['ours'])['median'] - 1) / peer:.0%}" if peer > 0.05 else ""
        ours, cached, textbook, auto, torch = (
            ratio(over[arm]) if arm in over else "" for arm in ("ours", "cached", "textbook", "auto", "torch")
        )
        cells = row["workload"], f"{row['seconds']:.2f}", ours, cached, textbook, share, auto, torch
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def eval_forward(data: dict[str, Any]) -> list[str]:
    lines = [
        "The unfolded model's forward inside `cached`, over the plain model's.",
        "",
        "| model | ratio |",
        "|---|---:|",
    ]
    return lines + [f"| {row['workload']} | {ratio(row['over_plain'])} |" for row in data["rows"]]


def training_memory(data: dict[str, Any]) -> list[str]:
    lines = [
        "Living tensors at the peak of a step over the plain model's, exact: counted from the allocations and releases "
        "that torch's profiler records. *Allowed*: the added parameters, their gradients and momentum, and one kernel "
        "per layer.",
        "",
        "| model | DO-Conv, MB | auto, MB | textbook, MB | allowed, MB |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in data["rows"]:
        extra = " | ".join(f"{row['extra'][arm] / 1e6:+.1f}" for arm in ("ours", "auto", "textbook"))
        lines.append(f"| {row['workload']} | {extra} | {row['allowed'] / 1e6:.1f} |")
    return lines


def fold_throughput(data: dict[str, Any]) -> list[str]:
    lines = [
        "`fold(model)`, with its copy of the model, the float64 composition and the check of every kernel by feature "
        "composition, against a clone of the same tensors. *Kernels alone*: composed, checked and cast into memory "
        "that is there, as the command does. The last column is `copy.deepcopy` of the model, which `fold(model)` "
        "makes first.",
        "",
        "| model | fold, ms | clone, ms | throughput of the fold, of the clone's | kernels alone | deepcopy |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in data["rows"]:
        times = row["seconds"]
        fold, clone = 1e3 * times["fold"], 1e3 * times["clone"]
        shares = " | ".join(ratio(row[arm]) for arm in ("throughput", "kernels", "deepcopy"))
        lines.append(f"| {row['model']} | {fold:.0f} | {clone:.1f} | {shares} |")
    return lines


def fold_onnx(data: dict[str, Any]) -> list[str]:
    low, high = data["ratio_min"], data["ratio_max"]
    return [
        f"`doconv-convert fold --onnx` of {data['model']} with its whole proof, over a script that builds the model, "
        "exports it once and runs it once in onnxruntime; whole processes on both sides.",
        "",
        f"**{data['ratio_median']:.2f}** ({low:.2f} to {high:.2f} over {len(data['pairs'])} pairs).",
    ]


def memory(data: dict[str, Any]) -> list[str]:
    lines = [
        "Peak memory of whole commands, in multiples of the weights with D: the largest sum over the processes alive "
        "at once. Two exports run side by side below 1 GiB of weights; above, torch's runs and the exports come one "
        "after the other, and the parent holds no weights while a child exports.",
        "",
        f"| model | weights, GB | {' | '.join(f'`{name}`, limit {most}' for name, most in data['limits'].items())} |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in data["rows"]:
        peaks = (f"{row['peaks'][name] / row['weights']:.2f}" for name in data["limits"])
        lines.append(f"| {row['source']} | {row['weights'] / 1e9:.2f} | {' | '.join(peaks)} |")
    return lines


def rehearsal_cost(data: dict[str, Any]) -> list[str]:
    rows = data["rows"]
    each = statistics.quantiles((row["rehearsal"] / row["plain"] for row in rows), n=4)
    passed = sum(row["status"] == "passed" for row in rows)
    return [
        f"`rehearse --no-export --seed {data['seed']}` of {len(rows)} torchvision names ({passed} passed) over "
        "building each and running it once at batch 2, turn by turn in one process: "
        f"**{data['ratio']:.2f}** times in sum; half of the names are between {each[0]:.1f} and {each[2]:.1f}, the "
        f"median is {each[1]:.1f}.",
    ]


def compositions(data: dict[str, Any]) -> list[str]:
    sizes = data["milliseconds"]
    lines = [
        "One dense 3x3 kernel of C channels, composition forward and backward, milliseconds. Where product.c was not "
        "compiled, or somebody follows torch's operations, one matrix product is shared between two neighboring input "
        "channels, with a block-diagonal D: rows of 18 numbers instead of 9. All others were tried and left: *identity "
        "in D* is as fast as that, but sends W itself through products that "
        "`torch.set_float32_matmul_precision` may shorten, so that a new layer would no longer start exactly; a custom "
        "autograd function (*custom*) saves the copies and loses more in the strided products; one that goes *in "
        "pieces* of a MiB gains less than a fifth.",
        "",
        "| way | " + " | ".join(f"C = {size}" for size in sizes) + " |",
        "|---|" + "---:|" * len(sizes),
    ]
    for way in next(iter(sizes.values())):
        lines.append(f"| {way} | " + " | ".join(f"{row[way]:.2f}" for row in sizes.values()) + " |")
    return [
        *lines,
        "",
        "Of product.c itself other versions were timed by hand while it was written, on this machine, with tensors "
        "that the processor's own caches did not hold. At 512 x 512 x 3 x 3: a thread with 32 channels at a time "
        "instead of half of all takes 1.9 ms for the gradients instead of 1.2; two functions for W's and D's "
        "gradient 1.8 instead of 1.3; vectors wider than the processor's, left to the compiler, 6.7 ms a "
        "composition instead of 0.7 (AVX2); fetching ahead gains nothing. At 768 depthwise kernels of 7 x 7: one "
        "row of D at a time instead of four 0.50 ms instead of 0.38, without fetching ahead 0.36 instead of 0.29; "
        "with D's gradient written through the caches 0.82 instead of 0.45.",
    ]


SECTIONS: list[tuple[str, str, Callable[[dict[str, Any]], list[str]]]] = [
    ("A training step", "training_step", training_step),
    ("Evaluation before the fold", "eval_forward", eval_forward),
    ("Memory of a training step", "training_memory", training_memory),
    ("The fold", "fold_throughput", fold_throughput),
    ("The fold with export and proof", "fold_onnx", fold_onnx),
    ("Memory of the commands", "memory", memory),
    ("A rehearsal without export", "rehearsal_cost", rehearsal_cost),
    ("The composition, and what was tried", "compositions", compositions),
]


def main() -> None:
    lines = [HEAD]
    for title, name, section in SECTIONS:
        path = DATA / f"{name}.json"
        if not path.exists():
            continue
        data = json.loads(path.read_text())
        machine = f", {data['machine']}" if "machine" in data else ""
        compiled = f", product.c for {data['vectors']}" if data.get("vectors") else ""
        where = (
            f"`python benchmarks/speed/{name}.py`; torch {data['torch']}, {data['threads']} threads{machine}{compiled}."
        )
        lines += [f"## {title}", "", where, "", *section(data), ""]
    (ROOT / "docs/benchmarks.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
