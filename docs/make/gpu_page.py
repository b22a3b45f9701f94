"""docs/gpu.md, and what docs/limits.md says of GPUs, from the JSON files that benchmarks/gpu/run.sh leaves.

    OUT=docs/data/gpu benchmarks/gpu/run.sh && python docs/make/gpu_page.py

A file of a dry run, or of a step that did not come to its end, shows nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Data = dict[str, Any]

HEAD = """# On a GPU

Made by `python docs/make/gpu_page.py` from `docs/data/gpu/`; do not edit.

Where a kernel lies on a CUDA device in float32, bfloat16 or float16, contiguous or channels-last, two
[Triton](https://triton-lang.org) kernels compose it and differentiate the composition
(`doconv_convert/nn/triton_kernels.py`; Triton comes with torch on Linux). They sum in float32 in one fixed order: a
run repeats to the bit, TF32 changes nothing, and with D = 0 the kernel is W, bit for bit. `torch.compile` sees one
operator, `doconv_convert::compose`; [`cached`](training.md) composes all kernels that are alike in one launch.
Exporters, `torch.func`, dispatch modes, gradients of gradients, float64 and subclasses of torch's tensor follow torch's
own operations, as does everything where Triton is not installed. A process without a CUDA tensor never imports Triton.
The fold composes in float64 on the CPU, whatever the device.

The default test run has the kernels on a CPU, in Triton's interpreter (`tests/nn/test_cuda.py`). What needs the device
itself (`tests/gpu`) and all measurements are one call of less than eight minutes:

<!-- no-run: it needs a GPU -->
```sh
OUT=docs/data/gpu benchmarks/gpu/run.sh
```
"""
NOTHING = """## Measured

Nothing yet: no run on a GPU has been recorded, so this page has no figures.
"""


def number(r: dict[str, float], digits: int = 3) -> str:
    return f"{r['median']:.{digits}f} ({r['low']:.{digits}f} to {r['high']:.{digits}f})"


def device_limits(data: Data) -> list[str]:
    return [
        f"A large copy reaches {number(data['copy_gb_per_second'], 0)} GB/s, read and written; a bfloat16 product of "
        f"8192 x 8192 matrices {number(data['bf16_product_tflops'], 0)} TFLOP/s."
    ]


def gpu_tests(data: Data) -> list[str]:
    counts = ", ".join(f"{count} {status}" for status, count in sorted(data["counts"].items()))
    bad = [row for row in data["tests"] if row["status"] in ("failure", "error")]
    return [f"`pytest -m gpu`: {counts}.", *(f"- `{row['test']}`: {row['status']}" for row in bad)]


def training_step(data: Data) -> list[str]:
    lines = [
        "A step (forward, loss, backward, SGD with momentum) over the plain model's; all arms take turns in one "
        "process, and brackets hold the middle half of the rounds. *bf16*: autocast, channels_last; *tf32*: float32 "
        "with TF32 products. *Excess* is DO-Conv's over plain as a part of the textbook's. *Memory*: the peak over the "
        "plain model's.",
        "",
        "| model | plain, ms | DO-Conv | inside `cached` | textbook | torch's operations | excess | memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in data["rows"]:
        over, peaks = row["over_plain"], row["peak_bytes"]
        ours, cached, textbook, torch = (
            number(over[arm]) if arm in over else "" for arm in ("ours", "cached", "textbook", "torch")
        )
        peer = over["textbook"]["median"] - 1
        share = f"{(over.get('cached', over['ours'])['median'] - 1) / peer:.0%}" if peer > 0.02 else ""
        plain, memory = row["milliseconds"]["plain"]["median"], peaks["ours"] / peaks["plain"]
        cells = row["workload"], f"{plain:.2f}", ours, cached, textbook, torch, share, f"{memory:.3f}"
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def kernel_time(data: Data) -> list[str]:
    lines = [
        f"One composition, and one with its gradients, without the launch from the host; a copy reaches "
        f"{data['copy_gb_per_second']:.0f} GB/s here. *Of the limit*: the time that the bytes which must move would "
        "take at that rate, over the time taken. *Host*: what launching both costs the process.",
        "",
        "| kernel | DO-Conv, us | of the limit | torch's operations, us | textbook, us | host, us |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in data["rows"]:
        us, limit = row["microseconds"], row["limit_microseconds"]
        cells = [row["shape"]]
        cells.append(" / ".join(f"{us[f'ours {what}']['median']:.1f}" for what in ("forward", "both")))
        cells.append(" / ".join(f"{limit[what] / us[f'ours {what}']['median']:.0%}" for what in ("forward", "both")))
        for way in ("torch", "textbook"):
            cells.append(" / ".join(f"{us[f'{way} {what}']['median']:.1f}" for what in ("forward", "both")))
        cells.append(f"{row['host_microseconds']['ours']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def study(data: Data) -> list[str]:
    if "reason" in data:
        return [data["reason"]]
    cells = len(data["rows"])
    return [f"{cells} trainings of the study's GPU size ([study_plan.md](study_plan.md)).", *data["skipped"]]


SECTIONS: list[tuple[str, str, Callable[[Data], list[str]]]] = [
    ("The card", "device_limits", device_limits),
    ("Tests", "gpu_tests", gpu_tests),
    ("A training step", "training_step", training_step),
    ("The kernels", "kernel_time", kernel_time),
    ("A small study", "study", study),
]


def measured(folder: Path) -> dict[str, Data]:
    """The steps that came to figures on a card, by name."""
    found = {}
    for _, name, _ in SECTIONS:
        path = folder / f"{name}.json"
        data = json.loads(path.read_text()) if path.exists() else {}
        if data.get("gpu") and not data["dry"]:
            found[name] = data
    return found


def page(data: dict[str, Data]) -> str:
    lines = [HEAD]
    for title, name, section in SECTIONS:
        if name not in data:
            continue
        one = data[name]
        where = f"{one['gpu']}; torch {one['torch']}, CUDA {one['cuda']}, Triton {one['triton']}."
        lines += [f"## {title}", "", where, "", *section(one), ""]
        if one.get("failures"):
            lines += ["Failed there: " + "; ".join(f"{f['what']} ({f['error']})" for f in one["failures"]) + ".", ""]
    return "\n".join(lines if data else [HEAD, NOTHING]).rstrip() + "\n"


def limit(data: dict[str, Data]) -> str:
    """What docs/limits.md says."""
    cards = sorted({one["gpu"] for one in data.values()})
    if not cards:
        return (
            "- GPUs: their code is tested in Triton's interpreter alone; nothing was run on one yet ([gpu.md](gpu.md))."
        )
    return f"- GPUs: measured on {', '.join(cards)} alone ([gpu.md](gpu.md)); several at once were not tried."


def main() -> None:
    data = measured(ROOT / "docs/data/gpu")
    (ROOT / "docs/gpu.md").write_text(page(data))
    limits = ROOT / "docs/limits.md"
    text, count = re.subn(r"^- GPUs: .*$", lambda _: limit(data), limits.read_text(), flags=re.MULTILINE)
    if count != 1:
        raise SystemExit(f"docs/limits.md: expected one line '- GPUs: ...', got {count}.")
    limits.write_text(text)


if __name__ == "__main__":
    main()
