"""Every way of training, on DOConv layers and on run-time subclasses: it starts where the plain net starts, learns,
moves D, and folds exactly."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import support_training
import torch
from safetensors.torch import load_file
from support import difference, is_d, run
from support_cli import run_cli
from support_training import (
    MOVED,
    NETS,
    ROUNDING,
    STEPS,
    assert_folds,
    assert_trained,
    converted,
    images,
    least_moved_d,
    loss_of,
    sgd,
    through_pickle,
    train,
)
from support_ways import WAYS, compiled
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from doconv_convert import cached, fold, param_groups, to_doconv

SOURCE = f"{support_training.__file__}:{{}}"
both_kinds = pytest.mark.parametrize("kind", NETS)


@both_kinds
@pytest.mark.parametrize("d_mul", ["K", "K+3"])
@pytest.mark.parametrize("way", WAYS)
def test_way(way: str, kind: str, d_mul: str) -> None:
    plain = NETS[kind]()
    model = converted(plain, d_mul=d_mul)
    expected, losses = WAYS[way](plain), WAYS[way](model)
    assert_trained(model, losses, expected)
    assert_folds(model, plain)


@pytest.mark.zoo  # half a minute of a C++ compiler
def test_compiled_by_inductor() -> None:
    """The generated code rounds in its own order; otherwise as above."""
    plain = NETS["layers"]()
    model = converted(plain)
    expected, losses = train(plain), compiled(model, "inductor")
    assert torch.allclose(losses[0], expected[0], rtol=1e-5)
    assert losses[-1] < losses[0] - 0.1
    assert least_moved_d(model) > MOVED
    assert_folds(model, plain)


@both_kinds
def test_one_graph_for_training_and_for_eval(kind: str) -> None:
    """No graph breaks and no recompilations from our layers, whatever D does."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = converted(NETS[kind](norm="group"))
    fast = torch.compile(model, fullgraph=True, backend=count)
    train(fast)
    with torch.no_grad():
        outputs = fast.eval()(images()[0])
        assert difference(outputs, model(images()[0])) < 1e-6
    assert len(graphs) == 2


# dynamo asks every input of a graph for its gradient
reads_no_leaf = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@both_kinds
@reads_no_leaf
def test_cached_in_a_compiled_model(kind: str) -> None:
    """One graph for every scope, and the same steps as without."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = converted(NETS[kind]())
    expected = train(copy.deepcopy(model))
    fast = torch.compile(model, fullgraph=True, backend=count)
    x, labels = images()
    optimizer = sgd(model.parameters())
    for step in range(STEPS):
        with cached(model):
            loss = loss_of(fast, x, labels)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        assert torch.allclose(loss, expected[step], rtol=1e-5)
    assert len(graphs) == 1


def wrap_one(model: nn.Module) -> nn.Module:
    name = "first" if hasattr(model, "first") else "bounded"
    setattr(model, name, checkpoint_wrapper(getattr(model, name)))
    return model


@both_kinds
@reads_no_leaf
@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), wrap_one, nn.DataParallel])
def test_wrappers_own_no_kernels(kind: str, wrap: Callable[[nn.Module], Any]) -> None:
    """They answer for attributes of what they wrap; a wrapped model folds, is grouped and cached like a bare one."""
    torch.compiler.reset()
    model = converted(NETS[kind]())
    train(model)
    x = images()[0]
    expected = run(model.eval(), x)
    wrapped = wrap(copy.deepcopy(model))
    own, other = (param_groups(one)[1]["params"] for one in (wrapped, model))
    assert [p.shape for p in own] == [p.shape for p in other]
    with cached(wrapped), torch.no_grad():
        assert torch.equal(wrapped(x), expected)
    folded = fold(wrapped)
    assert not any(is_d(name) for name, _ in folded.named_parameters())
    assert difference(run(folded, x), expected) < 1e-6


@both_kinds
def test_averaged_models(kind: str) -> None:
    """An EMA of the converted model has every D and folds as it is; it is not the EMA of folded kernels."""
    plain = NETS[kind]()
    model = converted(plain, d_mul="K+3")
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    optimizer = sgd(model.parameters())
    for _ in range(STEPS):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
    own, followed = dict(model.named_parameters()), dict(averaged.module.named_parameters())
    assert own.keys() == followed.keys()
    assert not any(torch.equal(own[name], followed[name]) for name in own)
    assert least_moved_d(averaged.module) > MOVED
    assert_folds(averaged.module, plain)


@both_kinds
def test_the_averaged_state_is_folded_as_it_is(tmp_path: Path, kind: str) -> None:
    """D W is not linear in both: the mean of two folds is another network than the fold of two means."""
    model = converted(NETS[kind]())
    averaged = AveragedModel(model)
    folds = []
    optimizer = sgd(model.parameters())
    for _ in range(2):
        train(model, optimizer)
        averaged.update_parameters(model)
        folds.append(nn.utils.parameters_to_vector(fold(model).parameters()))
    torch.save(averaged.state_dict(), tmp_path / "ema.pth")
    out = tmp_path / "out.safetensors"
    result = run_cli("fold", tmp_path / "ema.pth", "--model", SOURCE.format(kind), "-o", out, "--json")
    assert result.exit_code == 0, result.output
    assert "took the averaged weights (there is an 'n_averaged')" in json.loads(result.stdout)["notes"]
    shipped = NETS[kind]()
    shipped.load_state_dict(load_file(out))
    got = nn.utils.parameters_to_vector(shipped.parameters())
    assert torch.equal(got, nn.utils.parameters_to_vector(fold(averaged.module).parameters()))
    assert difference(got, torch.stack(folds).mean(0)) > MOVED


@both_kinds
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_train_on_alone(kind: str, how: str) -> None:
    """A deep copy, and a whole model saved by torch.save, go the original's way and share nothing with it."""
    plain = NETS[kind]()
    model = converted(plain, d_mul="K+3")
    train(model)
    other = copy.deepcopy(model) if how == "deepcopy" else through_pickle(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(*pair) for pair in zip(losses, train(model), strict=True))
    assert_folds(other, plain)


@both_kinds
def test_an_ensemble_under_vmap(kind: str) -> None:
    """Three nets in one: losses and gradients of each are those of the net alone, and it folds."""
    plain = NETS[kind](norm="group")
    models = [converted(plain, d_mul="K+3", seed=seed).double() for seed in range(3)]
    for steps, model in enumerate(models, 1):
        train(model, steps=steps)
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    x, labels = images()
    x = x.double()

    def loss_at(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(base, (parameters, buffers), (x,)), labels)

    gradients, losses = torch.vmap(torch.func.grad_and_value(loss_at))(parameters, buffers)
    for index, model in enumerate(models):
        loss = loss_of(model, x, labels)
        alone = torch.autograd.grad(loss, list(model.parameters()))
        assert difference(losses[index], loss) < ROUNDING
        for (name, _), gradient in zip(model.named_parameters(), alone, strict=True):
            assert difference(gradients[name][index], gradient) < 1e-9
        assert_folds(model, plain.double())


@both_kinds
@pytest.mark.parametrize("d_mul", ["K", "K+3"])
def test_batch_norm_fused_into_a_layer(kind: str, d_mul: str) -> None:
    """torch fuses into the attribute `weight`, which is the kernel."""
    plain = nn.Sequential(NETS[kind]().get_submodule("grouped" if kind == "layers" else "bounded"), nn.BatchNorm2d(8))
    model: Any = to_doconv(plain, d_mul=d_mul).double()
    x = torch.randn(4, 8, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = sgd(model.parameters())
    for _ in range(4):
        loss = (model(x) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert least_moved_d(model) > MOVED
    expected = model[1](unclamped(model[0], x))
    fused = fuse_conv_bn_eval(model[0], model[1])
    assert type(fused) is type(model[0])
    assert difference(unclamped(fused, x), expected) < ROUNDING


def unclamped(layer: Any, x: Tensor) -> Tensor:
    """The layer's convolution alone: batch norm moves through that, not through a clamp."""
    return F.conv2d(x, layer.weight, layer.bias, 1, 1, 1, 2)
