"""docs/published_macs.md from the results of benchmarks/evidence/published_macs.py.

python docs/make/published_macs_table.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]

GIGA = 10**9

HEAD = """\
# MACs against torchvision's published figures

Made by `python docs/make/published_macs_table.py` from `docs/data/published_macs.json`, which
`benchmarks/evidence/published_macs.py` leaves; do not edit.

For every weights entry of torchvision that publishes a figure (`meta["_ops"]`, giga-MACs, three decimals): the
architecture those weights belong to, exported to ONNX at the weights' own crop size (video: 16 frames; detectors and
RAFT at 512 x 512, as torchvision measured them) and counted by `count_macs`. *torch* is half of what
`torch.utils.flop_counter` counts in a run of the same net. Quantized entries publish the figure of the net before
quantization, which is what is counted here.

"""

EXPLAINED = """\
## Where the graph cannot say how much will run

In the R-CNNs the heads behind the proposals run once for each proposal, those for masks and keypoints once for each
detection. How many there are depends on the pixels, so the graph has no shape for them: their Conv, Gemm and
ConvTranspose nodes are listed as uncounted, never as zero. The published figures, and the runs under torch's counter
(with random weights), are the graph's MACs plus a whole number of proposals and detections:

"""


def rendered(results: Mapping[str, Any]) -> str:
    """The page. Raises AssertionError where a difference has no explanation."""
    plain = {key: row for key, row in results.items() if not row["uncounted"]}
    open_ended = {key: row for key, row in results.items() if row["uncounted"]}
    equal = [key for key, row in plain.items() if round(row["macs"] / GIGA, 3) == row["published"]]
    same = [key for key, row in plain.items() if row["macs"] == row["flop_counter_macs"]]
    lines = [
        f"Of the {len(plain)} entries whose graph is counted whole {len(equal)} equal the published figure and "
        f"{len(same)} torch's counter to the last MAC. {len(open_ended)} entries (R-CNNs) are explained below.",
        "",
        "| model | weights | input | published, GMACs | ONNX graph, MACs | torch, MACs | equal |",
        "|---|---|---|---:|---:|---:|---|",
        *(_row(key, row) for key, row in plain.items()),
        "",
        EXPLAINED.rstrip(),
        "",
        "| model | weights | uncounted | graph, MACs | a proposal | a detection | published, GMACs | torch, MACs |",
        "|---|---|---|---:|---:|---:|---|---|",
        *(_open_row(key, row) for key, row in open_ended.items()),
    ]
    unexplained = sorted((plain.keys() - set(equal)) | (plain.keys() - set(same)))
    assert not unexplained, f"no explanation for {unexplained}"
    return HEAD + "\n".join(lines) + "\n"


def _row(key: str, row: Mapping[str, Any]) -> str:
    name, weights = key.split(" ")
    published = round(row["macs"] / GIGA, 3) == row["published"]
    torch = row["macs"] == row["flop_counter_macs"]
    verdict = "both" if published and torch else "published only" if published else "torch only" if torch else "**no**"
    size = " x ".join(map(str, row["input"]))
    return (
        f"| {name} | {weights} | {size} | {row['published']:.3f} | {row['macs']:,} | {row['flop_counter_macs']:,} "
        f"| {verdict} |"
    )


def _open_row(key: str, row: Mapping[str, Any]) -> str:
    name, weights = key.split(" ")
    heads, graph = row["heads"], row["macs"]
    published = _counts(heads, lambda macs: round((graph + macs) / GIGA, 3) == row["published"])
    torch = _counts(heads, lambda macs: graph + macs == row["flop_counter_macs"])
    assert published is not None, f"{key}: no number of proposals gives {row['published']}"
    assert torch is not None, f"{key}: no number of proposals gives {row['flop_counter_macs']}"
    nodes = ", ".join(f"{count} {op}" for op, count in row["uncounted"].items())
    return (
        f"| {name} | {weights} | {nodes} | {graph:,} | {heads['proposal']:,} | {heads.get('detection', 0):,} "
        f"| {row['published']:.3f}: {_said(published)} | {row['flop_counter_macs']:,}: {_said(torch)} |"
    )


def _counts(heads: Mapping[str, int], fits: Any) -> tuple[int, int] | None:
    """The fewest detections, and then proposals, whose MACs fit; torchvision keeps 1000 and 100 at most."""
    detections = range(101 if "detection" in heads else 1)
    found = (
        (proposals, count)
        for count, proposals in product(detections, range(1001))
        if fits(proposals * heads["proposal"] + count * heads.get("detection", 0))
    )
    return next(found, None)


def _said(counts: tuple[int, int]) -> str:
    proposals, detections = counts
    return f"{proposals} proposals" + (f", {detections} detections" if detections else "")


if __name__ == "__main__":
    results = json.loads((DOCS / "data/published_macs.json").read_text())
    (DOCS / "published_macs.md").write_text(rendered(results))
