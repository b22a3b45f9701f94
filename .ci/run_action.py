"""action.yml's own steps on this machine, against a built wheel: they must pass on a good model and fail on others.

    python .ci/run_action.py WHEEL MODEL.onnx

MODEL.onnx needs its certificate beside it. Every step of the file is run as GitHub would: its `env` with the inputs
filled in, its `run` by bash, in order, until one fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from onnx import numpy_helper

ACTION = Path(__file__).parents[1] / "action.yml"


def filled(text: str, values: Mapping[str, str]) -> str:
    """The text with ${{ inputs.NAME }} and ${{ github.NAME }} replaced."""
    return re.sub(r"\$\{\{ *([\w.-]+) *\}\}", lambda match: values[match[1]], text)


def wanted(condition: str, values: Mapping[str, str]) -> bool:
    """Whether a step runs; the only condition that the file has is an input that is not empty."""
    found = re.fullmatch(r"\$\{\{ *([\w.-]+) *!= *'' *\}\}", condition)
    if found is None:
        raise SystemExit(f"action.yml: the condition {condition!r} is not understood here")
    return values[found[1]] != ""


def run_action(inputs: Mapping[str, str], runner: Path) -> tuple[int, str, str]:
    """(exit code of the step that ended it, stdout, the step summary); `runner` is the job's temporary folder."""
    action = yaml.safe_load(ACTION.read_text())
    values = {"github.action_path": str(ACTION.parent)}
    for name, spec in action["inputs"].items():
        if spec.get("required") and name not in inputs:
            raise SystemExit(f"action.yml requires the input {name!r}")
        values[f"inputs.{name}"] = inputs.get(name, filled(str(spec.get("default", "")), values))
    if unknown := inputs.keys() - action["inputs"].keys():
        raise SystemExit(f"action.yml has no inputs {sorted(unknown)}")
    summary = runner / "summary.md"
    summary.write_text("")
    said = ""
    for step in action["runs"]["steps"]:
        if not wanted(step["if"], values) if "if" in step else False:
            continue
        if step["shell"] != "bash":
            raise SystemExit(f"action.yml: only bash is run here, got {step['shell']!r}")
        environment = {name: filled(value, values) for name, value in step.get("env", {}).items()}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", filled(step["run"], values)],
            env=_clean() | environment | {"RUNNER_TEMP": str(runner), "GITHUB_STEP_SUMMARY": str(summary)},
            capture_output=True,
            text=True,
        )
        said += done.stdout + done.stderr
        if done.returncode:
            return done.returncode, said, summary.read_text()
    return 0, said, summary.read_text()


def _clean() -> dict[str, str]:
    """The environment without ways to this clone: the wheel alone must do."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def change_kernel(path: Path) -> None:
    """One kernel a thousandth off, everything else as it was."""
    model = onnx.load(path)
    kernel = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    noise = 1 + 1e-3 * np.random.default_rng(0).standard_normal(kernel.dims)
    kernel.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(kernel) * noise).astype(np.float32), kernel.name))
    onnx.save(model, path)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_figure(path: Path) -> None:
    text = path.read_text()
    path.write_text(re.sub(r'"total": (\d)', r'"total": 1\1', text))


def main(wheel: Path, model: Path) -> None:
    nothing: Callable[[Any], None] = lambda _: None  # noqa: E731
    cases: list[tuple[str, str, Callable[[Path], None], dict[str, str], int]] = [
        ("the good model", ".onnx", nothing, {}, 0),
        ("a budget that it keeps", ".onnx", nothing, {"max-macs": "1T"}, 0),
        ("a budget that it exceeds", ".onnx", nothing, {"max-macs": "1k"}, 3),
        ("a kernel a thousandth off", ".onnx", change_kernel, {}, 3),
        ("a flipped byte in the certificate", ".certificate.json", flip_byte, {}, 3),
        ("an edited figure in the certificate", ".certificate.json", edit_figure, {}, 3),
        ("a flipped byte in the side file", ".reference.npz", flip_byte, {}, 3),
    ]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, suffix, damage, inputs, expected in cases:
            place = Path(folder) / "work"
            place.mkdir(exist_ok=True)
            for part in (".onnx", ".certificate.json", ".reference.npz"):
                shutil.copy(model.with_name(model.stem + part), place / f"m{part}")
            damage(place / f"m{suffix}")
            given = {
                "model": str(place / "m.onnx"),
                "certificate": str(place / "m.certificate.json"),
                "package": str(wheel.resolve()),
                "python": sys.executable,
                **inputs,
            }
            code, said, summary = run_action(given, Path(folder))
            good = code == expected and ("::error file=" in said) is (expected != 0) and "MACs" in summary
            wrong += not good
            print(f"{'ok  ' if good else 'FAIL'} {name}: exit code {code}, expected {expected}")
            if not good:
                print(said)
        python = Path(folder) / "doconv-convert" / "bin" / "python"
        found = subprocess.run([python, "-c", "import torch"], env=_clean(), capture_output=True).returncode == 0
        print(f"{'FAIL' if found else 'ok  '} the environment that the action made has no torch")
    sys.exit(1 if wrong or found else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
