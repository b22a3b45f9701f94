"""The two fx passes alone, on graph modules of every origin, and under `to_doconv`."""

import copy
import operator
import pickle
from typing import Any

import pytest
import torch
from support import build_model, difference, equal, is_d, randomize, run, varied_images
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from doconv_convert import DOConv2d, DoconvError, FoldPass, ToDOConvPass, UsageError, fold, plan, to_doconv
from doconv_convert.nn.composition import compose_kernel

MOVED = 0.1
# float64, folded against unfolded: the largest seen was 0, one composition in both.
TOLERANCE = 1e-12


class Functional(nn.Module):
    """No convolution layer at all; `kernel` is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(6))
        self.kernel = nn.Parameter(torch.randn(6, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.conv2d(x, self.weight, self.bias, padding=1))
        return F.conv2d(x, self.kernel, groups=6) + F.conv2d(x, self.kernel, padding=1, groups=6)[..., 1:-1, 1:-1]


class Mixed(nn.Module):
    """A layer, functional calls in a child, and the layer's kernel read once more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.body = Functional()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.body(x).mean() + F.conv_transpose2d(x, self.stem.weight, padding=1)


def symbolic(model: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def exported(model: nn.Module) -> fx.GraphModule:
    return torch.export.export(model, (image(),)).module()


def decomposed(model: nn.Module) -> fx.GraphModule:
    return torch.export.export(model, (image(),)).run_decompositions().module()


def nested(model: nn.Module) -> fx.GraphModule:
    outer = nn.Module()
    outer.inner = symbolic(model)
    graph = fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    return fx.GraphModule(outer, graph)


def image() -> Tensor:
    return varied_images(2, 3, 8, 8).double()


def model_of(cls: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls().double().eval()


ORIGINS = [symbolic, exported, decomposed, nested]
MODELS = [Functional, Mixed]


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copied"])
@pytest.mark.parametrize("d_mul", ["K", "K+3"])
@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("origin", ORIGINS)
def test_the_passes_alone(origin: Any, cls: type[nn.Module], d_mul: str, copied: bool) -> None:
    graph, x = origin(model_of(cls)), image()
    state = {key: (t.shape, t.dtype) for key, t in graph.state_dict().items()}
    before = run(graph, x)
    result = ToDOConvPass(d_mul=d_mul)(graph)
    assert isinstance(result, PassResult)
    assert result.modified
    assert result.graph_module is graph
    assert sum(is_d(name) for name, _ in graph.named_parameters()) == (2 if cls is Functional else 3)
    assert equal(run(graph, x), before)
    if copied:
        graph = copy.deepcopy(graph)
        assert equal(run(graph, x), before)
    moved = run(randomize(graph, seed=0), x)
    assert difference(moved, before) > MOVED
    result = FoldPass()(graph)
    assert result.modified
    assert difference(run(graph, x), moved) <= TOLERANCE
    assert {key: (t.shape, t.dtype) for key, t in graph.state_dict().items()} == state
    assert not any(node.target is compose_kernel for node in graph.graph.nodes)
    assert not any(isinstance(module, DOConv2d) for module in graph.modules())
    result = FoldPass()(graph)
    assert not result.modified


@pytest.mark.parametrize("origin", ORIGINS)
def test_to_doconv_and_fold_serve_graph_modules(origin: Any) -> None:
    original, x = origin(model_of(Mixed)), image()
    converted = to_doconv(original)
    assert equal(run(converted, x), run(original, x))
    moved = run(randomize(converted, seed=0), x)
    assert difference(moved, run(original, x)) > MOVED
    again = to_doconv(converted)
    assert {row.action for row in plan(converted).rows} == {row.action for row in plan(again, (x,)).rows}
    assert {row.action for row in plan(converted).rows} == {"already DO-Conv"}
    assert equal(run(again, x), moved)
    folded = fold(converted)
    assert difference(run(folded, x), moved) <= TOLERANCE
    assert list(folded.state_dict()) == list(original.state_dict())


@pytest.mark.parametrize("cls", MODELS)
def test_nothing_is_modified_twice(cls: type[nn.Module]) -> None:
    graph = symbolic(model_of(cls))
    code = graph.code
    assert not FoldPass()(graph).modified
    assert graph.code == code
    assert ToDOConvPass()(graph).modified
    code = graph.code
    assert not ToDOConvPass()(graph).modified
    assert graph.code == code


def test_one_by_one_kernels_are_modified_once() -> None:
    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)
            self.kernel = nn.Parameter(torch.randn(3, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.layer(x), self.kernel)

    graph = symbolic(Pointwise())
    assert ToDOConvPass()(graph).modified
    assert not ToDOConvPass()(graph).modified
    assert FoldPass()(graph).modified
    assert not FoldPass()(graph).modified


def test_fold_leaves_dead_nodes_alone() -> None:
    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            operator.add(x, 1)
            return x * 2

    graph = symbolic(Dead())
    assert not FoldPass()(graph).modified
    assert any(node.target is operator.add for node in graph.graph.nodes)


def test_the_pass_is_what_converts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToDOConvPass, "call", lambda self, graph: PassResult(graph, False))
    for name in ("residual", "functional", "tied"):
        with pytest.raises(DoconvError, match=r"the pass left '.*' as they were"):
            to_doconv(build_model(name))


def test_options_reach_the_pass() -> None:
    graph = symbolic(model_of(Mixed))
    with pytest.raises(UsageError, match=r"'body.kernel': d_mul must be at least 9 \(3x3 kernel\), got 5"):
        ToDOConvPass(d_mul=5)(graph)
    assert not any(is_d(name) for name, _ in graph.named_parameters())
    ToDOConvPass(include=["body*"], exclude=["*.kernel"])(graph)
    assert [name for name, _ in graph.named_parameters() if is_d(name)] == ["body.D"]


def test_one_parameter_in_a_graph_and_in_a_layer_is_folded_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = symbolic(model_of(Mixed)), symbolic(model_of(Mixed))
            self.layer = nn.Conv2d(3, 3, 3, padding=1).double()
            self.layer.weight = self.second.stem.weight = self.first.stem.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x) + self.layer(x)

    original, x = Two(), image()
    converted = to_doconv(original)
    assert equal(run(converted, x), run(original, x))
    moved = run(randomize(converted, seed=0), x)
    assert difference(moved, run(original, x)) > MOVED
    folded = fold(converted)
    assert difference(run(folded, x), moved) <= TOLERANCE
    assert list(folded.state_dict()) == list(original.state_dict())


@pytest.mark.parametrize("cls", MODELS)
def test_a_trace_of_a_converted_model_is_folded_by_the_pass(cls: type[nn.Module]) -> None:
    converted, x = randomize(to_doconv(model_of(cls)), seed=0), image()
    graph = symbolic(converted)
    moved = run(graph, x)
    assert equal(moved, run(converted, x))
    retraced = symbolic(copy.deepcopy(graph))
    for one in (graph, retraced):
        assert equal(run(one, x), moved)
        assert FoldPass()(one).modified
        assert difference(run(one, x), moved) <= TOLERANCE
        assert set(one.state_dict()) == set(symbolic(model_of(cls)).state_dict())


@pytest.mark.parametrize("cls", MODELS)
def test_a_converted_graph_module_pickles(cls: type[nn.Module]) -> None:
    graph, x = symbolic(model_of(cls)), image()
    ToDOConvPass()(graph)
    moved = run(randomize(graph, seed=0), x)
    assert equal(run(pickle.loads(pickle.dumps(graph)), x), moved)


def test_an_exported_conversion_computes_the_same() -> None:
    converted, x = randomize(to_doconv(model_of(Mixed)), seed=0), image()
    program = exported(converted)
    assert difference(run(program, x), run(converted, x)) <= TOLERANCE


def test_a_damaged_kernel_stops_the_pass_before_the_first_change() -> None:
    graph = symbolic(model_of(Mixed))
    ToDOConvPass()(graph)
    randomize(graph, seed=0)
    with torch.no_grad():
        graph.body.kernel[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr, index]
    state = {key: t.clone() for key, t in graph.state_dict().items()}
    with pytest.raises(DoconvError, match=r"'body.kernel': the folded kernel has 9 of 54 values that are NaN"):
        FoldPass()(graph)
    after = graph.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key].nan_to_num(), state[key].nan_to_num()) for key in state)
