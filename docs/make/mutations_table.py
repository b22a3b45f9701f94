"""docs/mutations.md from the JSON of benchmarks/evidence/mutations.py.

python docs/make/mutations_table.py [--json docs/data/mutations.json] [--table docs/mutations.md]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
_VERSIONS = ("python", "torch", "torchvision", "onnx", "onnxruntime")
KERNEL_FAULT = "kernel times 1 + 1e-3 N(0,1)"


def covered(net: dict[str, Any], seen: float) -> list[list[Any]]:
    """The 1e-3 faults on kernels that coverage calls seen."""
    return [row for row in net["rows"] if row[0] == KERNEL_FAULT and row[2] is not None and row[2] > seen]


def write_table(result: dict[str, Any], path: Path) -> None:
    lines = [
        "# Planted faults, and what catches them",
        "",
        "Made by `python docs/make/mutations_table.py` from the rows in `docs/data/mutations.json`, which "
        "`python benchmarks/evidence/mutations.py` leaves; false alarms are counted in [zoo.md](zoo.md). "
        + ", ".join(f"{k} {result[k]}" for k in _VERSIONS if k in result)
        + f"; {result.get('machine', '')}; seed {result.get('seed')}.",
        "",
        "Every fault is planted alone in the exported ONNX file of a net that was converted, randomized, calibrated "
        "and folded as `rehearse` does it (MobileNetV2 also with torchvision's ImageNet weights on photographs), and "
        "the file then goes through the whole proof. `error` means that the file cannot be read at all (exit 1; every "
        "other failed check exits 3). `coverage` is no catch of its own where the graph failed: kernels that it names "
        "as unseen then count as unproven.",
        "",
        *_summary(result),
        *_by_kind(result["mutations"]),
    ]
    for net in result["mutations"]:
        lines += _net(net, result["seen"])
    path.write_text("\n".join(lines).rstrip() + "\n")


def _summary(result: dict[str, Any]) -> list[str]:
    nets, seen = result["mutations"], result["seen"]
    planted = [(net["net"], row) for net in nets for row in covered(net, seen)]
    missed = [(name, row) for name, row in planted if "outputs" not in row[3]]
    rows = [row for net in nets for row in net["rows"]]
    uncaught = [(net["net"], row) for net in nets for row in net["rows"] if not row[3]]
    kernels = [row for row in rows if row[0] == KERNEL_FAULT]
    controls = [net["net"] for net in nets if net["control"]]
    caught = len(planted) - len(missed)
    lines = [
        "## Summary",
        "",
        f"- {len(nets)} nets, {len(rows)} faults; the undamaged file of each is proven"
        + (f", except {', '.join(controls)}" if controls else "")
        + ".",
        f"- Faults of 1e-3 on covered kernels (predicted sensitivity above {seen:g}): {caught} of {len(planted)} "
        f"({caught / max(len(planted), 1):.1%}) caught by the outputs check alone.",
        f"- The other {len(kernels) - len(planted)} kernels are not called covered; the outputs caught "
        f"{sum('outputs' in row[3] for row in kernels) - caught} of them all the same, the graph's bytes every one.",
        f"- All faults: {len(rows) - len(uncaught)} of {len(rows)} ({(len(rows) - len(uncaught)) / len(rows):.1%}) "
        "caught by the whole proof.",
        *_without_twin(nets),
        "",
    ]
    if missed:
        lines += ["Missed by the outputs (caught by the graph's initializer bytes):", ""]
        lines += [f"- {name} `{row[1]}`: predicted {row[2]:g}, real {row[4]:g} bounds" for name, row in missed] + [""]
    lines += [f"- NOT CAUGHT: {name}: {row[0]} at `{row[1]}`" for name, row in uncaught] + [""] * bool(uncaught)
    return lines


def _without_twin(nets: list[dict[str, Any]]) -> list[str]:
    """The other road: a proof without the float64 twin, in the nets that were run both ways."""
    both = [net for net in nets if "without_twin" in net]
    if not both:
        return []
    missed = sum(net["without_twin"]["missed"] for net in both)
    refused = [net["net"] for net in both if net["without_twin"]["control"]]
    return [
        f"- Without the float64 twin, in {len(both)} nets: {missed} faults missed; undamaged files refused for "
        f"onnxruntime's rounding: {', '.join(refused) or 'none'}."
    ]


def _by_kind(nets: list[dict[str, Any]]) -> list[str]:
    rows = [row for net in nets for row in net["rows"]]
    lines = ["## By fault", "", *_head("fault", "planted", *_CHECKS, "caught")]
    for kind in dict.fromkeys(row[0] for row in rows):
        lines.append(_line(kind, [row for row in rows if row[0] == kind]))
    return [*lines, _line("all", rows), ""]


_CHECKS = ("fold", "graph", "macs", "twin", "outputs", "coverage", "error")


def _net(net: dict[str, Any], seen: float) -> list[str]:
    rows = net["rows"]
    planted = covered(net, seen)
    caught = sum("outputs" in row[3] for row in planted)
    blind = sum(row[0] == KERNEL_FAULT for row in rows) - len(planted)
    lines = [
        f"## {net['net']}",
        "",
        f"{net['kernels']} kernels, {len(planted)} covered and in the file; outputs alone caught {caught} of those. "
        + (f"{blind} not covered. " if blind else "")
        + (f"Not in the file: {len(net['not_in_file'])}. " if net["not_in_file"] else "")
        + f"{net['seconds']} s.",
        "",
        *_head("fault", "planted", *_CHECKS, "caught"),
    ]
    return [*lines, *(_line(k, [r for r in rows if r[0] == k]) for k in dict.fromkeys(r[0] for r in rows)), ""]


def _head(*titles: str) -> list[str]:
    return ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]


def _line(kind: str, rows: list[list[Any]]) -> str:
    counts = Counter(check for row in rows for check in row[3])
    cells = [kind, str(len(rows)), *(str(counts[check] or "") for check in _CHECKS), str(sum(bool(r[3]) for r in rows))]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=DOCS / "data/mutations.json")
    parser.add_argument("--table", type=Path, default=DOCS / "mutations.md")
    options = parser.parse_args()
    write_table(json.loads(options.json.read_text()), options.table)


if __name__ == "__main__":
    main()
