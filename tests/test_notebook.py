"""The notebook, cell by cell as Jupyter runs it: in order, in one namespace, in an empty folder."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "prove.ipynb"


def run_cell(source: str, namespace: dict[str, Any]) -> Any:
    """What the cell shows: the value of its last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NOTEBOOK.name, "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), namespace)


def test_the_notebook_runs_and_ends_in_a_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    shown = [run_cell("".join(cell["source"]), namespace) for cell in cells]
    trained = namespace["model"]
    assert trained.stack[1][0].D.abs().sum() > 0, "nothing was trained"
    result = namespace["result"]
    assert result in shown
    assert "proven: true" in result._repr_html_()
    assert result.proof.compared == "example_inputs: 360 of 360 samples"
    assert shown[-1] == "proven: true"
    # what the committed notebook shows is what it computed, but for the figures
    assert all(cell["outputs"] for cell, value in zip(cells, shown, strict=True) if value is not None)
