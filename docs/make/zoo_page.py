"""docs/zoo.md from the JSON lines that benchmarks/evidence/zoo.py leaves.

python docs/make/zoo_page.py
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
# What no conversion could be meant for: the kernel is no Parameter of a plain convolution.
NOT_ELIGIBLE = ("transposed", "blur filter", "input-dependent", "computed", "already parametrized", "lazy", "quantized")
NO_D = "convert, no D (1x1)"


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    text = path.read_text().replace("parametrised", "parametrized").replace("quantised", "quantized")  # older rows
    return [json.loads(line) for line in text.splitlines()]


def write_page(data: Path, target: Path) -> None:
    lines = [
        "# The zoo",
        "",
        "Models of torchvision and timm, by their names, converted, folded, exported and proven, with random weights,",
        "calibrated. Made by `python docs/make/zoo_page.py` from the rows in `docs/data/zoo/`, which",
        "`python benchmarks/evidence/zoo.py` leaves (its help names the steps).",
        "A convolution counts as *swapped* where it got a D, as *no D* where its kernel is 1x1, else as *kept* with",
        "the reason. `worst` is the largest error of an output in units of its bound, `reach` the least movement of an",
        "output by a change of 1e-3 in a kernel, in bounds (seen above 1.75).",
        "",
    ]
    lines += _rehearsals("torchvision", data) + _rehearsals("timm", data)
    for path in sorted(data.glob("timm-folds-[0-9].jsonl")):
        lines += _folds(read(path), int(path.stem.rpartition("-")[2]), read(data / "timm-0.jsonl"))
    lines += _plans(read(data / "timm-plans.jsonl"))
    target.write_text("\n".join(lines))


def _rehearsals(library: str, data: Path) -> list[str]:
    seeds = {int(path.stem.rpartition("-")[2]): read(path) for path in sorted(data.glob(f"{library}-[0-9].jsonl"))}
    if not seeds:
        return []
    first = seeds[min(seeds)]
    lines = [f"## {library}: {len(first)} names", "", *_summary(first)]
    for seed, rows in seeds.items():
        if rows is not first:
            lines += _agreement(first, rows, seed)
    if library == "torchvision":
        lines += _starts_and_folds(first, data.parent / "benchmarks/rehearsal_cost.json")
    lines += _false_alarms(list(seeds.values()))
    lines += ["", *_head("model", "status", "exporter", "swapped", "no D", "kept", "worst", "reach", "s")]
    for row in first:
        cells = [
            row["source"].partition(":")[2],
            "proven" if row["proven"] else row["status"],
            f"{row['exporter'] or ''}{', static batch' if row['dynamic_batch'] is False else ''}",
            row["counts"].get("convert", 0),
            row["counts"].get(NO_D, 0),
            _kept(row["counts"]),
            row["worst"] if row["worst"] is not None else "",
            row["least_reach"] if row["least_reach"] is not None else "",
            round(row["seconds"]),
        ]
        lines.append(_line(cells))
    notes = [f"- {row['source']}: {row['status']}: {row['detail']}" for row in first if row["detail"]]
    notes += [f"- {row['source']}: `{name}`: {why}" for row in first for name, why in row["flat"].items()]
    return [*lines, "", *notes, *([""] if notes else [])]


def _summary(rows: Sequence[Row]) -> list[str]:
    folded = sum(row["states"].get("fold") == "passed" for row in rows)
    exporters = Counter(row["exporter"] for row in rows if row["proven"])
    by_exporter = ", ".join(f"{count} {name}" for name, count in exporters.items())
    proven = sum(row["proven"] for row in rows)
    eligible = sum(count for row in rows for what, count in row["counts"].items() if _is_eligible_kept(what))
    return [
        f"- Folds proven: {folded} of {len(rows)}. Exported and proven: {proven} of {len(rows)} ({by_exporter}).",
        f"- Eligible convolutions kept: {eligible}.",
    ]


def _false_alarms(runs: Sequence[Sequence[Row]]) -> list[str]:
    """Nothing is wrong with these networks: what fails in a proof is a false alarm."""
    rows = [row for run in runs for row in run if "prove" in row["states"]]
    alarms = [f"{row['source']} ({row['detail']})" for row in rows if row["states"].get("prove") == "failed"]
    worst = max((row["worst"] for row in rows if row["worst"] is not None), default=0.0)
    return [
        f"- False alarms: {len(alarms)} in {len(rows)} proofs at {len(runs)} seeds; the largest error of an output "
        f"was {worst:.2f} of its bound. {'; '.join(alarms)}".rstrip()
    ]


def _agreement(first: Sequence[Row], rows: Sequence[Row], seed: int) -> list[str]:
    known = {row["source"]: row["states"] for row in first}
    both = [row for row in rows if row["source"] in known]
    differing = [row["source"] for row in both if row["states"] != known[row["source"]]]
    same = f"- Seed {seed}: {len(both)} models, {len(both) - len(differing)} with the same statuses."
    return [f"{same} {', '.join(differing)}".rstrip()]


def _starts_and_folds(first: Sequence[Row], cost: Path) -> list[str]:
    """What `rehearsal_cost.py` saw at its seed, which stops after the fold."""
    if not cost.exists():
        return []
    data = json.loads(cost.read_text())
    statuses = {row["source"]: row["status"] for row in data["rows"]}
    folded = {row["source"]: row["states"].get("fold") for row in first}
    same = [source for source, state in folded.items() if (statuses.get(source) == "passed") is (state == "passed")]
    passed = sum(status == "passed" for status in statuses.values())
    return [
        f"- Start and fold alone, at seed {data['seed']}: {passed} of {len(statuses)} passed; {len(same)} models as "
        "at the first seed.",
    ]


def _folds(rows: Sequence[Row], seed: int, whole: Sequence[Row]) -> list[str]:
    passed = {row["source"] for row in rows if row["status"] == "passed"}
    failed = [f"- {row['source']}: {row['status']}: {row['detail']}" for row in rows if row["status"] != "passed"]
    folded = {row["source"]: row["states"].get("fold") == "passed" for row in whole}
    both = [row["source"] for row in rows if row["source"] in folded]
    same = sum(folded[source] is (source in passed) for source in both)
    return [
        f"## timm: exact start and fold below 100 M parameters, seed {seed}",
        "",
        f"- {len(rows)} architectures: {len(passed)} start with the same bits, and compute folded the bits that they "
        "compute unfolded.",
        f"- Of the {len(both)} rehearsed whole at seed 0, {same} have the same statuses up to the fold.",
        "",
        *failed,
        *([""] if failed else []),
    ]


def _plans(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    total = Counter[str]()
    for row in rows:
        total.update(row["counts"])
    kept = sum(count for what, count in total.items() if _is_eligible_kept(what))
    eligible = kept + total["convert"] + total[NO_D]
    lines = [
        "## timm: the plan of every architecture",
        "",
        f"{len(rows)} architectures of {len({row['family'] for row in rows})} families, planned on the meta device: "
        f"{kept} of {eligible:,} eligible convolutions kept ({kept / max(1, eligible):.2%}).",
        "",
        *_head("convolutions", "number", "architectures"),
    ]
    for what, count in total.most_common():
        lines.append(_line([what, f"{count:,}", sum(what in row["counts"] for row in rows)]))
    kept_rows = [
        (row["source"], name, why)
        for row in rows
        for name, why in row["kept"].items()
        if _is_eligible_kept(f"keep: {why}")
    ]
    return [*lines, "", *(f"- {source} `{name}`: {why}" for source, name, why in kept_rows[:60]), ""]


def _is_eligible_kept(what: str) -> bool:
    reason = what.partition("keep: ")[2]
    return bool(reason) and not reason.startswith(NOT_ELIGIBLE)


def _kept(counts: dict[str, int]) -> str:
    return "; ".join(f"{n} {what.partition('keep: ')[2]}" for what, n in counts.items() if what.startswith("keep"))


def _head(*titles: str) -> list[str]:
    return ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    write_page(DOCS / "data/zoo", DOCS / "zoo.md")
