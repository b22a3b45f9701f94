"""The whole of `flops small.onnx` against a bare `import onnxruntime`."""

import subprocess
import sys

import pytest
from support_cli import ROOT

# Medians of 9 turns on two busy cores: 2.55; `import typer, onnx, rich.table` alone 1.56.
MOST = 3.0


@pytest.mark.zoo
def test_flops_takes_less_than_three_imports_of_onnxruntime() -> None:
    """A time: not for the default run, whose processes share the machine."""
    script = [sys.executable, ROOT / "benchmarks" / "speed" / "flops_start.py", "--rounds", "9"]
    said = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    (line,) = (line for line in said.splitlines() if line.startswith("flops small.onnx"))
    assert float(line.split()[-1]) < MOST, said
