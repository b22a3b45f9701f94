"""From every way of training to a proven ONNX file, by the command line."""

import copy
import json
from pathlib import Path

import pytest
import support_training
import torch
from support_cli import run_cli
from support_training import MOVED, NETS, converted, least_moved_d, sgd, through_pickle, train
from support_ways import WAYS
from torch import nn
from torch.optim.swa_utils import AveragedModel

SOURCE = f"{support_training.__file__}:{{}}"
# Exporting twice takes seconds: the others are long runs.
PROVEN = [("AdamW fused", "layers"), ("torch.compile", "functional")]
both_kinds = pytest.mark.parametrize("kind", NETS)


def assert_proven(model: nn.Module, kind: str, folder: Path, *options: str) -> None:
    """`fold --onnx` of the model's pickled state dict says proven."""
    torch.save(model.state_dict(), folder / "last.pth")
    source = ["--model", SOURCE.format(kind), *options]
    result = run_cli("fold", folder / "last.pth", *source, "--onnx", folder / "out.onnx", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["proven"] is True
    assert len(document["folded"]) == (3 if kind == "layers" else 2)


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        pytest.param(way, kind, marks=[] if (way, kind) in PROVEN else [pytest.mark.zoo])
        for way in WAYS
        for kind in NETS
    ],
)
def test_way(tmp_path: Path, way: str, kind: str) -> None:
    model = converted(NETS[kind](), d_mul="K+3")
    WAYS[way](model)
    assert_proven(model, kind, tmp_path)


@pytest.mark.zoo
@both_kinds
def test_averaged_model(tmp_path: Path, kind: str) -> None:
    model = converted(NETS[kind](), d_mul="K+3")
    averaged, optimizer = AveragedModel(model, use_buffers=True), sgd(model.parameters())
    for _ in range(4):
        train(model, optimizer, 2)
        averaged.update_parameters(model)
    assert least_moved_d(averaged.module) > MOVED
    assert_proven(averaged, kind, tmp_path)


@pytest.mark.zoo
@both_kinds
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copy(tmp_path: Path, kind: str, how: str) -> None:
    model = converted(NETS[kind](), d_mul="K+3")
    other = copy.deepcopy(model) if how == "deepcopy" else through_pickle(model)
    train(other)
    assert_proven(other, kind, tmp_path)


@pytest.mark.zoo
@both_kinds
def test_member_of_an_ensemble(tmp_path: Path, kind: str) -> None:
    """Three nets trained in one by vmap; the last is taken out and shipped."""
    models = [converted(NETS[kind](norm="group"), d_mul="K+3", seed=seed) for seed in range(3)]
    for steps, model in enumerate(models, 1):
        train(model, steps=steps)
    base = copy.deepcopy(models[0]).to("meta")
    x, labels = support_training.images()

    def loss_at(parameters: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> torch.Tensor:
        scores = torch.func.functional_call(base, (parameters, buffers), (x,))
        return nn.functional.cross_entropy(scores, labels)

    parameters, buffers = torch.func.stack_module_state(models)
    for _ in range(4):
        gradients = torch.vmap(torch.func.grad(loss_at))(parameters, buffers)
        parameters = {name: (p - 0.1 * gradients[name]).detach() for name, p in parameters.items()}
    models[-1].load_state_dict({name: p[-1] for name, p in parameters.items()}, strict=False)
    assert least_moved_d(models[-1]) > MOVED
    assert_proven(models[-1], kind, tmp_path, "--model-args", '{"norm": "group"}')
