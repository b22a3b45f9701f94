"""The tables of a report: layers, outputs, and models by steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A text; its state, which has a color; and a share of one that is drawn as a bar."""

    text: str
    state: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    text: Callable[[Any], str]
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Columns as (key, title, whether numbers), and rows of as many cells, the first of which names the row."""

    key: str
    title: str
    columns: Sequence[tuple[str, str, bool]]
    rows: Sequence[Sequence[Cell]]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _text(value: Any) -> str:
    return "-" if value is None or value == "" else str(value)


def _sizes(value: Sequence[int] | None) -> str:
    return "x".join(map(str, value)) if value else "-"


_LAYER_COLUMNS = (
    Column("name", "layer", _text, number=False),
    Column("kind", "kind", _text, number=False),
    Column("kernel", "kernel", _sizes, number=False),
    Column("groups", "groups", _number),
    Column("d_mul", "D_mul", _number),
    Column("added_parameters", "added parameters", _number),
    Column("macs", "MACs", _number),
    Column("composition_macs", "MACs to compose", _number),
    Column("d_moved", "D moved", _number),
    Column("kernel_changed", "kernel changed", _number),
    Column("sensitivity", "coverage", _number),
    Column("action", "action", _text, number=False),
)


def layer_rows(layers: Sequence[Json] | None, proof: Json) -> list[Row]:
    """The layers with their coverage; kernels that only the coverage knows come last."""
    sensitivity = dict(proof.get("sensitivity", {}))
    rows = [{**layer, "sensitivity": sensitivity.pop(layer["name"], None)} for layer in layers or ()]
    return [*rows, *({"name": name, "sensitivity": value} for name, value in sensitivity.items())]


def layer_table(rows: Sequence[Json]) -> Table | None:
    """The columns that any row has a value for; None without rows."""
    return _table("layers", "Layers", _LAYER_COLUMNS, rows)


_OUTPUT_COLUMNS = (
    Column("name", "output", _text, number=False),
    Column("shape", "shape", _sizes, number=False),
    Column("error", "error", _number),
    Column("bound", "bound", _number),
    Column("used", "error / bound", _number),
    Column("plain_error", "fp32 torch's error", _number),
    Column("largest", "largest element", _number),
    Column("variation", "differs by sample", _number),
    Column("agreeing", "argmax agrees", _number),
    Column("problem", "problem", _text, number=False),
)


def output_table(outputs: Iterable[Json]) -> Table | None:
    """Each output's error against its bound, both relative to the output's L2 norm."""
    rows = [{**one, "used": _used(one)} for one in outputs]
    return _table("outputs", "Outputs", _OUTPUT_COLUMNS, rows)


def _used(output: Json) -> float | None:
    error, bound = output["error"], output["bound"]
    if error is None or bound is None:
        return None
    return float(error / bound) if bound else None


def _table(key: str, title: str, columns: Sequence[Column], rows: Sequence[Json]) -> Table | None:
    if not rows:
        return None
    used = [column for column in columns if any(row.get(column.key) not in (None, "") for row in rows)]
    return Table(
        key,
        title,
        [(column.key, column.title, column.number) for column in used],
        [[_cell(column, row) for column in used] for row in rows],
    )


def _cell(column: Column, row: Json) -> Cell:
    value = row.get(column.key)
    if column.key == "used" and value is not None:
        return Cell(_number(value), "failed" if row.get("problem") else "", value)
    state = "failed" if column.key == "problem" and value else ""
    return Cell(column.text(value), state)


def matrix(models: Sequence[Json]) -> tuple[Table, list[Row]]:
    """Models by the steps of their rehearsal, and a row of sums for each model's pictures."""
    steps = list(dict.fromkeys(step["name"] for model in models for step in model["steps"]))
    sums = [_sums(model) for model in models]
    columns = [
        ("name", "model", False),
        ("status", "status", False),
        *((f"step {name}", name, False) for name in steps),
        ("seen", "kernels seen", True),
        ("macs", "MACs", True),
        ("added_parameters", "added parameters", True),
        ("seconds", "seconds", True),
        ("exporter", "exporter", False),
        ("detail", "what stopped it", False),
    ]
    rows = []
    for model, figures in zip(models, sums, strict=True):
        done = {step["name"]: step for step in model["steps"]}
        rows.append(
            [
                Cell(model["source"]),
                Cell(model["status"], _state(model["status"])),
                *(_step(done.get(name)) for name in steps),
                Cell(figures["seen"]),
                Cell(_number(figures["macs"])),
                Cell(_number(figures["added_parameters"])),
                Cell(f"{figures['seconds']:.1f}"),
                Cell(_text(figures["exporter"])),
                Cell(_text(figures["detail"])),
            ]
        )
    used = [index for index in range(len(columns)) if any(row[index].text != "-" for row in rows)]
    return Table("models", "Models", [columns[i] for i in used], [[row[i] for i in used] for row in rows]), sums


def _sums(model: Json) -> Row:
    from doconv_convert.check.outputs.compare import COVERED_ABOVE

    proof, layers = model["proof"] or {}, model.get("layers") or ()
    sensitivity = proof.get("sensitivity", {})
    seen = sum(value is not None and value > COVERED_ABOVE for value in sensitivity.values())
    stopped = [step["detail"] for step in model["steps"] if step["state"] != "passed"]
    batch = "dynamic" if model["dynamic_batch"] else "static"
    return {
        "name": model["source"],
        "seen": f"{seen} of {len(sensitivity)}" if sensitivity else "-",
        "macs": proof.get("macs") or total(layers, "macs"),
        "added_parameters": total(layers, "added_parameters"),
        "seconds": sum(step["seconds"] for step in model["steps"]),
        "exporter": model["exporter"] and f"{model['exporter']}, {batch} batch",
        "detail": next(iter(stopped), None),
    }


def total(rows: Iterable[Json], key: str) -> int | None:
    """The sum of a figure; None where no row has it."""
    known = [row[key] for row in rows if row.get(key) is not None]
    return sum(known) if known else None


def _step(step: Json | None) -> Cell:
    if step is None:
        return Cell("-")
    state = _state(step["state"])
    return Cell({"passed": "ok", "failed": "failed"}.get(state, "cannot"), state)


def _state(status: str) -> str:
    if status == "passed":
        return "passed"
    return "failed" if status.endswith("failed") else "not checked"
