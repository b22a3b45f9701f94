"""docs/gpu.md: no figure that was not measured on a GPU."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs/make/gpu_page.py"

CARD = {"dry": False, "gpu": "Some Card", "torch": "2.11", "cuda": "13.0", "triton": "3.6"}
QUARTILES = {"median": 1.0123, "low": 1.01, "high": 1.02}
ARMS = ("plain", "ours", "textbook", "torch")
STEP = {
    "workload": "resnet50, batch 256",
    "milliseconds": dict.fromkeys(ARMS, QUARTILES),
    "over_plain": {"ours": QUARTILES, "textbook": {**QUARTILES, "median": 1.1}, "torch": QUARTILES},
    "peak_bytes": dict.fromkeys(ARMS, 10**9),
}


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_page", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_committed_data(script: Any) -> None:
    data = script.measured(ROOT / "docs/data/gpu")
    assert (ROOT / "docs/gpu.md").read_text() == script.page(data)
    assert script.limit(data) in (ROOT / "docs/limits.md").read_text()
    assert all(not one["dry"] for one in data.values())


@pytest.mark.parametrize("change", [{"dry": True}, {"gpu": None}, {"gpu": ""}], ids=str)
def test_what_was_not_measured_on_a_card_is_not_shown(script: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    result = {**CARD, **change, "rows": [STEP], "failures": []}
    (tmp_path / "training_step.json").write_text(json.dumps(result))
    (tmp_path / "gpu_tests.json").write_text(json.dumps({"dry": False, "step": "gpu_tests", "status": "exit code 1"}))
    page = script.page(script.measured(tmp_path))
    assert page == script.page({})
    assert "no figures" in page
    assert "resnet50" not in page


def test_what_was_measured_is_shown_with_its_card(script: Any, tmp_path: Path) -> None:
    (tmp_path / "training_step.json").write_text(json.dumps({**CARD, "rows": [STEP], "failures": []}))
    page = script.page(script.measured(tmp_path))
    assert "Some Card; torch 2.11" in page
    assert "| resnet50, batch 256 | 1.01 | 1.012 (1.010 to 1.020) |" in page
    assert "| 12% | 1.000 |" in page
    assert "no figures" not in page
