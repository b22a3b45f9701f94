"""`demo`: one short run of the whole way, and one in which onnxruntime disagrees."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support_cli import names, run_cli

from doconv_convert.workflows import demo

FILES = ["digits.LICENSE.md", "digits.npz", "digits.onnx", "digits.py", "plain.safetensors", "start.safetensors"]


def test_the_whole_way(tmp_path: Path) -> None:
    result = run_cli("demo", tmp_path, "--epochs", "1", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert names(tmp_path) == [*FILES, "trained.safetensors"]
    assert 0 < said["loss"] < 2.3  # less than chance, the logarithm of 10
    trained, folded, exported = said["models"]
    assert trained["parameters"] > folded["parameters"] == exported["parameters"]
    assert trained["macs"] > folded["macs"] == exported["macs"]
    assert len({model["correct"] for model in said["models"]}) == 1
    assert trained["accuracy"] == f"{trained['correct'] / 360:.2%}"
    assert said["agree"] is True
    assert said["proof"]["proven"] is True
    steps = [line[:2] for line in result.stderr.splitlines() if line[1:3] == ". "]
    assert steps == ["1.", "2.", "3.", "4."]


def test_forms_that_disagree_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = demo.run_onnx

    def one_class_further(path: Path, inputs: list[np.ndarray]) -> Any:
        ran, (scores,) = run(path, inputs)
        return ran, [np.roll(scores, 1, axis=1)]

    monkeypatch.setattr(demo, "_train", lambda *_: 0.0)
    monkeypatch.setattr(demo, "run_onnx", one_class_further)
    result = run_cli("demo", tmp_path, "--epochs", "1")
    assert result.exit_code == 3
    assert "the three do NOT agree on every image" in result.stdout


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run_cli("demo", tmp_path / "file" / "inside")
    assert result.exit_code == 1
    assert "cannot write" in result.stderr
    assert "choose another folder" in result.stderr
