"""The same file with optimizations off and at other batches: what must pass there, and what must not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from support import wrong_where
from torch import Tensor, nn

from doconv_convert.artifacts.export.exporter import export_onnx
from doconv_convert.check.onnxruntime_run import check_outputs
from doconv_convert.check.outputs import reruns
from doconv_convert.check.outputs.expected import ReferenceRun
from doconv_convert.check.outputs.session import OnnxSession
from doconv_convert.check.status import Status
from doconv_convert.check.torch_runs.reference_run import reference_run
from doconv_convert.errors import DoconvError

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
RUNS = "optimizations on and off, batches of 1, 2, 3"


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def exported(folder: Path, function: Callable[[Tensor], Any], dynamic: bool = True) -> tuple[Path, ReferenceRun]:
    model = Apply(function).eval()
    export_onnx(model, (X[:2] if dynamic else X,), folder / "m.onnx", dynamic_batch=dynamic)
    return folder / "m.onnx", reference_run(model, model, (X,), 3)


def checked(folder: Path, function: Callable[[Tensor], Any], dynamic: bool = True) -> Status:
    return check_outputs(*exported(folder, function, dynamic))[0]


def test_a_dynamic_file_is_run_at_three_batches_and_a_static_one_at_its_own(tmp_path: Path) -> None:
    status = checked(tmp_path, torch.sin)
    assert status.state == "passed"
    assert f"; {RUNS}; argmax agrees on 3 of 3 samples" in status.detail
    assert status.detail.count("not independent") == 0
    assert "optimizations on and off; argmax" in checked(tmp_path, torch.sin, dynamic=False).detail


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(0),
        lambda x: x.mean() * torch.ones(2),  # no output dimension is the batch
        lambda x: (x.sin(), x.mean()),
    ],
)
def test_samples_that_depend_on_each_other_are_said_to_and_pass(
    tmp_path: Path, function: Callable[[Tensor], Any]
) -> None:
    status = checked(tmp_path, function)
    assert status.state == "passed", status
    assert "samples are not independent" in status.detail


def test_flattened_batches_are_no_damage(tmp_path: Path) -> None:
    assert checked(tmp_path, lambda x: x.sin().reshape(-1, 2)).state == "passed"


def test_a_batch_baked_into_the_file_is_damage(tmp_path: Path) -> None:
    """Zeros of the batch compared first are added: at that batch nothing shows."""
    path, reference = exported(tmp_path, torch.sin)
    assert check_outputs(path, reference)[0].state == "passed"
    model = onnx.load(path)
    (output,) = model.graph.output
    model.graph.node[-1].output[0] = "inner"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((3, 4), np.float32), "zeros"))
    model.graph.node.append(helper.make_node("Add", ["inner", "zeros"], [output.name]))
    onnx.save(model, path)
    status, _ = check_outputs(path, reference)
    assert status.state == "failed"
    assert any("has shape (3, 4), expected (1, 4), at batch 1" in finding for finding in status.findings)
    assert any("at batch 2" in finding for finding in status.findings)


def test_a_model_that_does_not_run_at_a_batch_is_not_asked_for_it(tmp_path: Path) -> None:
    path, reference = exported(tmp_path, lambda x: x - x.mean(0))

    def refuses(count: int) -> list[Any]:
        raise DoconvError("two or more")

    status, _ = check_outputs(path, replace(reference, alone=refuses))
    assert status.state == "passed"
    assert "the model itself does not run at batch 1; the model itself does not run at batch 2" in status.detail
    assert check_outputs(path, replace(reference, alone=None))[0].state == "failed"


@pytest.mark.parametrize("optimized", [True, False])
def test_onnxruntime_itself_is_told_to_leave_its_optimizations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimized: bool
) -> None:
    """A fault of onnxruntime's at one optimization level is found at that level, so both were really run."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", wrong_where(optimized))
    status = checked(tmp_path, torch.sin)
    assert status.state == "failed"
    assert len(status.findings) == 1
    assert ("with optimizations off" in status.findings[0]) is not optimized


def test_what_onnxruntime_computes_with_optimizations_off_must_agree_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Off(OnnxSession):
        def run(self, inputs: Any) -> Any:
            return [value * np.float32(1.001) for value in super().run(inputs)]

    monkeypatch.setattr(reruns, "OnnxSession", Off)
    status = checked(tmp_path, torch.sin)
    assert status.state == "failed"
    assert "with optimizations off" in status.findings[0]
    assert len(status.findings) == 1
