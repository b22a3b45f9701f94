"""The mutation table's own script on two small nets: every fault is caught, the undamaged file is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support_cli import ROOT

from doconv_convert.check.outputs.compare import COVERED_ABOVE

SCRIPT = ROOT / "benchmarks/evidence/mutations.py"


def test_every_kernel_counted_as_covered_really_moved_its_outputs_out_of_bounds() -> None:
    """COVERED_ABOVE allows for the least of what was predicted that a change of 1e-3 moved, over the table."""
    result = json.loads((ROOT / "docs/data/mutations.json").read_text())
    rows = [row for net in result["mutations"] for row in net["rows"] if row[0].startswith("kernel times")]
    ratios = [moved / predicted for _, _, predicted, _, moved in rows if predicted]
    assert len(ratios) > 500
    assert min(ratios) < 0.75  # the prediction is one random direction's
    assert COVERED_ABOVE * min(ratios) > 1
    assert result["seen"] == COVERED_ABOVE


@pytest.mark.zoo
def test_every_planted_fault_is_caught(tmp_path: Path) -> None:
    files = ["--json", tmp_path / "m.json"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, "--nets", "residual", "grouped", *files]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "m.json").read_text())
    assert [net["net"] for net in result["mutations"]] == ["residual", "grouped"]
    for net in result["mutations"]:
        assert net["control"] == net["not_in_file"] == []
        assert net["without_twin"] == {"control": [], "missed": 0}
        rows = net["rows"]
        assert all(row[3] for row in rows), [row for row in rows if not row[3]]
        covered = [row for row in rows if row[0].startswith("kernel times")]
        assert len(covered) == net["kernels"]
        assert all(row[2] > result["seen"] and "outputs" in row[3] for row in covered)
        assert len({row[0] for row in rows}) >= 18
    page = [sys.executable, ROOT / "docs/make/mutations_table.py", *files, "--table", tmp_path / "m.md"]
    subprocess.run(page, check=True)
    assert "(100.0%) caught by the outputs check alone" in (tmp_path / "m.md").read_text()
