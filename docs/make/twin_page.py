"""docs/twin.md from the rows of benchmarks/evidence/twin.py.

python docs/make/twin_page.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
ROWS = DOCS / "data/twin.jsonl"


def write_page(rows: Sequence[dict[str, Any]], path: Path) -> None:
    measured = [row for row in rows if "stopped" not in row]
    passed = [row for row in measured if row["state"] == "passed"]
    others = [row for row in measured if row["state"] != "passed"]
    weights, corrected = (sum(row[key] for row in measured) for key in ("weights", "corrected"))
    seconds = sum(row["seconds"]["fold"] for row in measured)
    lines = [
        "# The float64 twin over networks",
        "",
        "Made by `python docs/make/twin_page.py` from the rows in `docs/data/twin.jsonl`, which "
        "`python benchmarks/evidence/twin.py` leaves. Each net is converted, its D drawn at random, calibrated as "
        "`rehearse` does it, folded, and exported in float32 and float64. What is compared: [proof.md](proof.md).",
        "",
        f"- {weights:,} weights of {len(measured)} nets are the float32 numbers nearest to the exact products of D and "
        f"W; {corrected} of them were corrected, since float64 had rounded them to the other neighbor. The whole fold "
        f"took {seconds / max(weights, 1) * 1e6:.2f} s of CPU time for a million weights.",
        f"- {len(passed)} of {len(measured)} twins agree with torch's float64 run to 1e-12; the largest error is "
        f"{max((row['error'] for row in passed), default=0.0):.1e}.",
        f"- Float32 outputs cover {sum(row['covered'] for row in passed)} of "
        f"{sum(row['kernels'] for row in passed)} kernels of those, float64 ones "
        f"{sum(row['covered_in_float64'] for row in passed)}.",
        "",
        "| net | weights | corrected | twin off by | kernels | covered in float32 | in float64 |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row['source']} | {row['weights']:,} | {row['corrected']} | {row['error']:.1e} | {row['kernels']} | "
            f"{row['covered']} | {row['covered_in_float64']} |"
            for row in passed
        ),
        "",
    ]
    if others or len(measured) < len(rows):
        lines += ["## Exceptions", ""]
        lines += [f"- {row['source']}: {row['state']}: {_reason(row)}" for row in others]
        lines += [f"- {row['source']}: {row['stopped']}" for row in rows if "stopped" in row]
    path.write_text("\n".join(lines).rstrip() + "\n")


def _reason(row: dict[str, Any]) -> str:
    return "; ".join([row["detail"], *row["findings"]]).replace("|", "/")


if __name__ == "__main__":
    write_page([json.loads(line) for line in ROWS.read_text().splitlines()], DOCS / "twin.md")
