"""From a command's JSON document to what its report shows: texts, tables and pictures, nothing escaped yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from doconv_convert.cli.report.pictures import Bars, linear_bars, log_bars
from doconv_convert.cli.report.tables import Table, layer_rows, layer_table, matrix, output_table
from doconv_convert.words import short

Json = Mapping[str, Any]

# What a status found, line by line: a broken graph may have thousands.
SHOWN_FINDINGS = 200
# Under a picture, the things that stand out in it.
_NAMED = 5


@dataclass(frozen=True)
class Check:
    """A status: one of a proof, or a step of a rehearsal."""

    name: str
    state: str
    detail: str
    findings: Sequence[str] = ()
    hidden: int = 0


@dataclass(frozen=True)
class Picture:
    """Bars of one column of the table `table`, with the names that stand out."""

    table: str
    key: str
    title: str
    text: str
    bars: Bars
    low: str
    high: str
    named: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Page:
    """All that a report shows, from top to bottom. `subject` is the file or the network that it is about."""

    command: str
    subject: str
    verdict: Check | None = None
    checks: Sequence[Check] = ()
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()


def page_of(command: str, document: Json) -> Page:
    """The page of what `command` ("fold", "verify", "rehearse" or "to-doconv") prints with --json."""
    pages: dict[str, Callable[[Json], Page]] = {
        "fold": _fold,
        "verify": _verify,
        "rehearse": _rehearse,
        "to-doconv": _dry_run,
    }
    return pages[command](document)


def _fold(document: Json) -> Page:
    proof, export = document["proof"] or {}, document["export"] or {}
    written = document["written"]
    facts = [
        ("network", _source(document["source"])),
        ("kernels folded", str(len(document["folded"]))),
        *_export_facts(export),
        *_mac_facts(proof),
        *_inputs_fact(proof),
        ("written", ", ".join(written) or "nothing"),
    ]
    rows = layer_rows(document.get("layers"), proof)
    return Page(
        "fold",
        str(proof.get("file") or export.get("path") or ", ".join(written)),
        _verdict(document["proven"], proof),
        _checks(proof),
        facts,
        document["notes"],
        _layer_pictures(rows),
        _tables(output_table(proof.get("outputs", ())), layer_table(rows)),
    )


def _verify(document: Json) -> Page:
    rows = layer_rows(document.get("layers"), document)
    return Page(
        "verify",
        document["file"],
        _verdict(document["proven"], document),
        _checks(document),
        [*_mac_facts(document), *_inputs_fact(document)],
        pictures=_layer_pictures(rows),
        tables=_tables(output_table(document["outputs"]), layer_table(rows)),
    )


def _rehearse(document: Json) -> Page:
    models = document["models"]
    if len(models) == 1:
        return _one_rehearsal(models[0])
    states = [model["status"] for model in models]
    passed, failed = states.count("passed"), sum(state.endswith(" failed") for state in states)
    state = "failed" if failed else "passed" if passed == len(models) else "not checked"
    counts = f"{passed} of {len(models)} models passed, {failed} failed"
    others = len(models) - passed - failed
    if others:
        counts += f", {others} whose original cannot be exported"
    table, rows = matrix(models)
    pictures = [_picture("models", *one, rows) for one in _COSTS if any(row.get(one[0]) for row in rows)]
    return Page("rehearse", f"{len(models)} models", Check(counts, state, ""), pictures=pictures, tables=[table])


def _one_rehearsal(model: Json) -> Page:
    proof = model["proof"] or {}
    steps = [Check(step["name"], step["state"], step["detail"]) for step in model["steps"]]
    rows = layer_rows(model.get("layers"), proof)
    facts = [*_mac_facts(proof), *_inputs_fact(proof), ("convolutions", _counts(model["counts"]))]
    if model["exporter"] is not None:
        facts += [("exporter", model["exporter"]), ("batch", "dynamic" if model["dynamic_batch"] else "static")]
    failed = model["status"].endswith(" failed")
    return Page(
        "rehearse",
        model["source"],
        Check(model["status"], "passed" if model["status"] == "passed" else "failed" if failed else "not checked", ""),
        [
            *steps,
            *(Check(f"proof: {one.name}", one.state, one.detail, one.findings, one.hidden) for one in _checks(proof)),
        ],
        facts,
        pictures=_layer_pictures(rows),
        tables=_tables(output_table(proof.get("outputs", ())), layer_table(rows)),
    )


def _dry_run(document: Json) -> Page:
    plan, costs = document["plan"], document["cost"]
    composed = {site["name"]: site["composition_macs"] for site in costs["sites"]}
    rows = [
        {
            **row,
            "macs": None if row["macs"] is None else row["macs"] // plan["batch"],
            "composition_macs": composed.get(row["name"]),
            "action": row["action"] if row["reason"] is None else f"{row['action']}: {row['reason']}",
        }
        for row in plan["rows"]
    ]
    grown = costs["total"]
    facts = [
        ("convolutions", _counts(plan["counts"])),
        ("parameters added for training", f"{plan['added_parameters']:,}"),
        ("a checkpoint grows by", f"{grown['checkpoint_bytes']:,} bytes"),
        ("optimizer state, SGD with momentum", f"{grown['sgd_momentum_bytes']:,} bytes more"),
        ("optimizer state, Adam", f"{grown['adam_bytes']:,} bytes more"),
        ("to compose the kernels, one forward", f"{grown['composition_macs']:,} MACs"),
    ]
    if document["written"]:
        facts.append(("written", document["written"]))
    if grown["convolution_macs"]:
        facts.append((f"all convolutions at batch {costs['batch']}", f"{grown['convolution_macs']:,} MACs"))
    unseen = [f"not looked into: '{path or plan['model']}'; give --input-shape" for path in plan["not_looked_into"]]
    return Page(
        "to-doconv",
        _source(document["source"]),
        facts=facts,
        notes=[*document["notes"], *unseen],
        pictures=_layer_pictures(rows),
        tables=_tables(layer_table(rows)),
    )


def _verdict(proven: bool, proof: Json) -> Check:
    failed = proof.get("failed", False)
    if proven:
        return Check("proven: true", "passed", "every check was made and passed")
    if proof.get("equivalent"):
        return Check("equivalent on these inputs", "equivalent", "other weights; the outputs agree on these inputs")
    why = "a check failed" if failed else "not every check was made"
    return Check("proven: false", "failed" if failed else "not checked", why)


def _checks(proof: Json) -> list[Check]:
    return [
        Check(
            status["name"],
            status["state"],
            status["detail"],
            status["findings"][:SHOWN_FINDINGS],
            max(0, len(status["findings"]) - SHOWN_FINDINGS),
        )
        for status in proof.get("statuses", ())
    ]


def _source(source: Json | None) -> str:
    if source is None:
        return "not named: folded by the file's keys"
    return str(source["source"]) + (f" {json.dumps(source['args'], ensure_ascii=False)}" if source["args"] else "")


def _export_facts(export: Json) -> list[tuple[str, str]]:
    if not export:
        return []
    batch = "dynamic" if export["dynamic_batch"] else "static"
    return [("ONNX", f"opset {export['opset']}, {export['exporter']} exporter, {batch} batch")]


def _mac_facts(proof: Json) -> list[tuple[str, str]]:
    macs = proof.get("macs")
    return [] if macs is None else [("multiply-accumulates of one sample", f"{macs:,} MACs (FLOPs = 2 x MACs)")]


def _inputs_fact(proof: Json) -> list[tuple[str, str]]:
    return [("compared on", proof["compared"])] if proof.get("compared") else []


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items()) or "none"


def _tables(*tables: Table | None) -> list[Table]:
    return [table for table in tables if table is not None]


_COSTS = (
    ("macs", "Multiply-accumulates", "MACs of one sample. Folding changes none of them.", "MACs"),
    (
        "added_parameters",
        "Parameters added for training",
        "The numbers in D (and in the further slots of W). Gone after the fold.",
        "parameters",
    ),
)
_MOVED = (
    (
        "d_moved",
        "How far D moved from the identity",
        "‖D^ - [I|0]‖ / ‖[I|0]‖, Frobenius norms over all channels, the second √(C_in·K): 0 before the training.",
        "",
    ),
    (
        "kernel_changed",
        "What D made of the kernel",
        "‖k - W‖ / ‖W‖: k is the kernel that runs, W the one that the same weights give with D at the identity.",
        "",
    ),
)


def _layer_pictures(rows: Sequence[Json]) -> list[Picture]:
    known = [one for one in (*_COSTS, *_MOVED) if any(row.get(one[0]) is not None for row in rows)]
    pictures = [_picture("layers", *one, rows) for one in known]
    sensitivity = [row.get("sensitivity") for row in rows]
    if any(value is not None for value in sensitivity):
        pictures.append(_coverage(rows, sensitivity))
    return pictures


def _picture(table: str, key: str, title: str, text: str, unit: str, rows: Sequence[Json]) -> Picture:
    values = [row.get(key) for row in rows]
    bars = linear_bars(values)
    largest = _extremes(rows, key, largest=True)
    return Picture(table, key, title, text, bars, "0", f"{short(bars.high)} {unit}".strip(), largest)


def _coverage(rows: Sequence[Json], sensitivity: Sequence[float | None]) -> Picture:
    from doconv_convert.check.outputs.compare import COVERED_ABOVE

    bars = log_bars(sensitivity, COVERED_ABOVE)
    seen = sum(value is not None and value > COVERED_ABOVE for value in sensitivity)
    text = (
        f"How far a relative change of 1e-3 in a kernel would move the outputs, in units of their bounds, on a "
        f"logarithmic scale. Above the line at {COVERED_ABOVE} it would have shown: {seen} of "
        f"{sum(value is not None for value in sensitivity)} kernels. The others rest on the per-site fold check and "
        "equal initializer bytes."
    )
    least = _extremes(rows, "sensitivity", largest=False)
    return Picture("layers", "sensitivity", "Coverage", text, bars, short(bars.low), short(bars.high), least)


def _extremes(rows: Iterable[Json], key: str, *, largest: bool) -> list[tuple[str, str]]:
    known = [(row[key], row["name"]) for row in rows if row.get(key) is not None]
    known.sort(key=lambda pair: pair[0], reverse=largest)
    return [(name, short(value)) for value, name in known[:_NAMED]]
