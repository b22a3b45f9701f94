"""Large models: exports and torch's runs one after the other, with the weights given up in between."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support_cli import ExportsHere, write_model
from torch import nn

from doconv_convert import to_doconv
from doconv_convert.artifacts.export import child_process
from doconv_convert.artifacts.export.job import Flags
from doconv_convert.artifacts.models import SourceModel, find_inputs
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.check.torch_runs import memory
from doconv_convert.check.torch_runs.memory import release_weights, restore_weights
from doconv_convert.rewrite.options import Options
from doconv_convert.workflows import exports
from doconv_convert.workflows.fold import fold_and_prove
from doconv_convert.workflows.fold_result import FoldResult
from doconv_convert.workflows.rehearsal.randomize import randomize_and_calibrate
from doconv_convert.workflows.trained_model import load_trained

NETS = """
from torch import nn

INPUT_SHAPE = (1, 3, 16, 16)


class Net(nn.Module):
    def __init__(self, center):
        super().__init__()
        self.center, self.first, self.second = center, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = self.second(self.first(x).relu()).mean((2, 3))
        return x - x.mean(0) if self.center else x


def alone():
    return Net(False)


def together():
    return Net(True)
"""


def released(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[FoldResult, nn.Module]:
    (folder / "nets.py").write_text(NETS)
    source = parse_source(f"{folder / 'nets.py'}:{name}")
    model = to_doconv(build(source))
    inputs = find_inputs(SourceModel(model, source), None, None)
    assert inputs is not None
    randomize_and_calibrate(model, inputs.arguments(4))
    write_model(model, folder / "trained.pth")
    loaded = load_trained(folder / "trained.pth", source, Options())
    monkeypatch.setattr(child_process, "Child", ExportsHere)
    monkeypatch.setattr(memory, "LARGE", 0)
    return fold_and_prove(loaded, inputs, onnx=folder / "out.onnx", **options), loaded.trained


def test_a_large_model_is_proven_without_its_weights_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, trained = released(tmp_path, "alone", monkeypatch)
    assert made.proof is not None
    assert made.proof.proven
    assert len(made.proof.sensitivity) == 2
    for model in (trained, made.model):
        assert [tensor.numel() for tensor in model.parameters()] == [0] * len(list(model.parameters()))


def test_its_weights_are_read_again_where_the_model_has_to_run_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = released(tmp_path, "together", monkeypatch)
    assert made.proof is not None
    assert made.proof.proven
    assert "samples are not independent" in next(s.detail for s in made.proof.statuses if s.name == "outputs")


@pytest.mark.parametrize("name", ["alone", "together"])
def test_a_static_export_is_compared_at_its_own_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    exported = exports.export_in_child

    def static(jobs: Any, **options: Any) -> Any:
        return exported([job.with_flags(dynamic_batch=False) for job in jobs], **options)

    monkeypatch.setattr(exports, "export_in_child", static)
    made, _ = released(tmp_path, name, monkeypatch, flags=Flags())
    assert made.proof is not None
    assert made.proof.proven
    assert made.export is not None
    assert made.export.dynamic_batch is False
    assert "2 samples" in next(s.detail for s in made.proof.statuses if s.name == "outputs")


def test_weights_given_up_come_back() -> None:
    torch.manual_seed(0)
    model = to_doconv(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    same, x = to_doconv(model), torch.randn(2, 3, 8, 8)
    same.load_state_dict(model.state_dict())
    before = model.eval()(x)
    release_weights(model)
    with pytest.raises((RuntimeError, IndexError)):
        model(x)
    restore_weights(model, same)
    assert torch.equal(model(x), before)
