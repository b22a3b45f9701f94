"""The table of docs/linear_regions.md from docs/data/linear_regions.json.

python docs/make/linear_regions_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
PAGE, DATA = DOCS / "linear_regions.md", DOCS / "data" / "linear_regions.json"
HEAD = """## timm's families

timm has fuse code for these families. Both folds start from the same network in float64, with batch norms calibrated on
random images; errors are the largest difference of an output, of its scale. Made by
`python benchmarks/evidence/linear_regions.py`.
"""
START, END = "<!-- table -->\n", "<!-- end -->\n"


def table(data: dict[str, Any]) -> str:
    lines = [
        "| network | convolutions | batch norms | parameters, M | error | timm: batch norms | timm: error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(data["models"].items()):
        ours, timm = row["ours"], row["timm"]
        figures = [f"{row[key]} to {ours[key]}" for key in ("convolutions", "batch_norms")]
        millions = f"{row['parameters'] / 1e6:.2f} to {ours['parameters'] / 1e6:.2f}"
        theirs = (
            ["-", f"raises {timm['raises'].partition(':')[0]}"]
            if "raises" in timm
            else [str(timm["batch_norms"]), f"{timm['error']:.0e}"]
        )
        error = f"{ours['error']:.0e}"
        lines.append(f"| {' | '.join([name, *figures, millions, error, *theirs])} |")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(data["versions"].items()))
    return "\n".join([HEAD, *lines, "", f"With {versions}."])


def page(text: str, data: dict[str, Any]) -> str:
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{table(data)}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), json.loads(DATA.read_text())))
