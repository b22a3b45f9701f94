"""`prove`: a model in memory, from its D to a proven file, and what is compared on the way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from support import varied_images
from support_cli import names
from torch import Tensor, nn

import doconv_convert
from doconv_convert import to_doconv
from doconv_convert.artifacts.export import exporter
from doconv_convert.check.certificate.certificate import SCHEMA
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.workflows import prove as module
from doconv_convert.workflows.prove import prove
from doconv_convert.workflows.rehearsal.randomize import randomize_and_calibrate


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 4, 3, padding=1, groups=2, bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, image: Tensor) -> Tensor:
        x: Tensor = self.head(self.second(torch.relu(self.norm(self.first(image)))).mean((2, 3)))
        return x


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = to_doconv(Net())
    randomize_and_calibrate(model, (varied_images(8, 3, 12, 12),), seed=0)
    return model.train()


@pytest.fixture(scope="module")
def samples() -> Tensor:
    return varied_images(7, 3, 12, 12)


@pytest.fixture(scope="module")
def made(trained: nn.Module, samples: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Any:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    result = prove(trained, tmp_path_factory.mktemp("made") / "net.onnx", samples)
    after = trained.state_dict()
    assert trained.training
    assert all(torch.equal(before[name], after[name]) for name in before)
    return result


def test_a_trained_model_is_proven_and_stays_as_it_is(made: Any, trained: nn.Module) -> None:
    assert made.proven, made.proof
    assert trained.first.D.abs().sum() > 0  # type: ignore[union-attr, operator]
    assert not hasattr(made.model.first, "D")
    assert names(made.certificate.parent) == ["net.certificate.json", "net.onnx", "net.reference.npz"]
    assert [status.name for status in made.proof.statuses] == ["fold", "graph", "macs", "outputs", "coverage"]


def test_its_certificate_is_as_good_as_the_command_lines(made: Any) -> None:
    content = json.loads(made.certificate.read_text())
    jsonschema.validate(content, json.loads(SCHEMA.read_text()))
    assert content["source"] == {"source": "in memory", "args": {}}
    assert str(made.certificate.parent) not in made.certificate.read_text()
    assert doconv_convert.verify(made.written[0], certificate=made.certificate).proven


def test_every_sample_is_compared_and_said(made: Any) -> None:
    """7 samples: a batch of 3, and the 4 behind it."""
    outputs = next(status for status in made.proof.statuses if status.name == "outputs")
    assert made.proof.compared == "example_inputs: 7 of 7 samples"
    assert outputs.detail.startswith("1 output, 7 samples: ")
    assert outputs.detail.endswith("argmax agrees on 7 of 7 samples")


def test_a_notebook_shows_it(made: Any) -> None:
    shown = made._repr_html_()
    assert "proven: true" in shown
    assert "example_inputs: 7 of 7 samples" in shown
    made.proof.file = "<b>net</b>.onnx"
    assert "&lt;b&gt;net&lt;/b&gt;.onnx" in made.proof._repr_html_()


def moved(path: str | Path, name: str) -> None:
    """A kernel of the file, 0.1 % larger."""
    model = onnx.load(path)
    tensor = next(one for one in model.graph.initializer if one.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), name))
    onnx.save(model, path)


def test_a_wrong_export_is_caught_and_nothing_is_written(
    trained: nn.Module, samples: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any, **options: Any) -> Any:
        report = exporter.export_onnx(*args, **options)
        if Path(args[2]).name == "net.onnx":
            moved(args[2], "second.weight")
        return report

    monkeypatch.setattr(module, "export_onnx", wrong)
    result = prove(trained, tmp_path / "net.onnx", samples[:2])
    assert not result.proven
    assert {status.name for status in result.proof.statuses if status.state == "failed"} == {"graph", "outputs"}  # type: ignore[union-attr]
    assert names(tmp_path) == []
    assert result.proof.compared == "example_inputs: 2 of 2 samples, and 1 made from them by adding noise"  # type: ignore[union-attr]


def test_the_users_own_architecture_is_what_the_graph_is_compared_with(
    trained: nn.Module, samples: Tensor, tmp_path: Path
) -> None:
    class Other(Net):
        def forward(self, image: Tensor) -> Tensor:
            return torch.relu(super().forward(image)) + 1

    assert prove(trained, tmp_path / "net.onnx", samples, original=Net()).proven
    result = prove(trained, tmp_path / "other.onnx", samples, original=Other())
    assert [status.name for status in result.proof.statuses if status.state == "failed"] == ["graph"]  # type: ignore[union-attr]
    with pytest.raises(DoconvError, match=r"first\.weight"):
        prove(trained, tmp_path / "wide.onnx", samples, original=Net(8))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"image": 1}, "got a dict"),
        ((), "got a tuple of nothing"),
        ((torch.zeros(2, 3, 12, 12), 1), "got a tuple of Tensor, int"),
        (torch.zeros(()), "expected a tensor or a tuple of tensors with the batch first"),
        (torch.zeros(2, 5, 12, 12), "does not run on inputs of shape"),
    ],
)
def test_wrong_inputs_are_refused_before_any_work(trained: nn.Module, tmp_path: Path, inputs: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        prove(trained, tmp_path / "net.onnx", inputs)
    assert names(tmp_path) == []


def test_a_sample_behind_the_first_batch_is_compared_too(
    trained: nn.Module, samples: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that is wrong on the fifth sample only."""
    from doconv_convert.check.outputs.session import OnnxSession

    right = OnnxSession.run

    def wrong(self: OnnxSession, inputs: Any) -> Any:
        outputs = right(self, inputs)
        hit = (inputs[0] == samples[4].numpy()).all(axis=(1, 2, 3))
        return [output + hit[:, None].astype(output.dtype) for output in outputs]

    monkeypatch.setattr(OnnxSession, "run", wrong)
    proof = prove(trained, tmp_path / "net.onnx", samples).proof
    assert proof is not None
    assert proof.state("outputs") == "failed"
    assert "further samples" in next(one.detail for one in proof.statuses if one.name == "outputs")


class Returns(Net):
    """A net with a second output, made of the image and the logits."""

    def __init__(self, second: Callable[[nn.Module, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.second_output = second
        self.register_buffer("classes", torch.arange(3.0))

    def forward(self, image: Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(image)
        return logits, self.second_output(self, image, logits)


def proof_of(folder: Path, second: Callable[[Any, Tensor, Tensor], Any], samples: Tensor) -> Any:
    torch.manual_seed(0)
    model = to_doconv(Returns(second))
    randomize_and_calibrate(model, (varied_images(8, 3, 12, 12),), seed=0)
    return prove(model, folder / "net.onnx", samples)


def test_a_model_that_returns_its_input(samples: Tensor, tmp_path: Path) -> None:
    """And two constants beside: a buffer, and one that has the batch's size."""
    made = proof_of(
        tmp_path, lambda net, image, logits: (image, net.classes, net.classes.expand(len(image), 3)), samples[:3]
    )
    assert made.proven, made.proof
    named = [name for name, _ in made.export.outputs]
    assert len({*named, *(name for name, _ in made.export.inputs)}) == 5
    assert "classes, expand constant" in next(one.detail for one in made.proof.statuses if one.name == "outputs")


@pytest.mark.parametrize("value", [3, "cat", 0.5])
def test_an_output_that_is_no_tensor_is_named(samples: Tensor, tmp_path: Path, value: object) -> None:
    with pytest.raises(DoconvError, match=f"the {type(value).__name__} {value!r} among its outputs"):
        proof_of(tmp_path, lambda net, image, logits: value, samples[:3])
    assert names(tmp_path) == []
