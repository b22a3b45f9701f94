"""What people put on a converted model: it works, or it is refused by name, with the fix, and nothing has changed."""

import importlib
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import difference, equal, randomize, run, signature, varied_images
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from doconv_convert import DOConv2d, DoconvError, cached, fold, plan, to_doconv
from doconv_convert.rewrite.convert import copy_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
]
MOVED = 0.1
# One composition and one convolution in float64, in two orders.
TOLERANCE = 1e-12


class Same(nn.Conv2d):
    """A forward of its own: it becomes a run-time subclass."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1)), self.weight, self.bias)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "exact class": lambda: nn.Conv2d(3, 4, 3),
    "subclass": lambda: Same(3, 4, 3),
}
both_kinds = pytest.mark.parametrize("kind", KINDS)


def plain_net(kind: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(KINDS[kind](), nn.BatchNorm2d(4), nn.ReLU()).double().eval()


def net(kind: str) -> Any:
    return randomize(to_doconv(plain_net(kind), d_mul="K+2"), seed=0)


def image() -> Tensor:
    return varied_images(2, 3, 8, 8).double()


class Absolute(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.abs()


def eager_qat(model: nn.Module) -> None:
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    torch.ao.quantization.prepare_qat(model.train(), inplace=True)


def graph_qat(model: nn.Module) -> None:
    mapping = torch.ao.quantization.get_default_qat_qconfig_mapping("x86")
    prepare_qat_fx(model.train(), mapping, (image(),))


# What is applied to a converted net, and what the error says beside the fix.
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "prune": (lambda m: prune.l1_unstructured(m[0], "weight", 0.5), "it cannot be moved to 'weight_orig'"),
    "prune, structured": (lambda m: prune.ln_structured(m[0], "weight", 0.5, 2, 0), "it cannot be moved"),
    "prune, global": (
        lambda m: prune.global_unstructured([(m[0], "weight")], prune.L1Unstructured, amount=0.5),
        "it cannot be moved",
    ),
    "weight norm": (lambda m: parametrizations.weight_norm(m[0]), "cannot be deleted or parametrized"),
    "spectral norm": (lambda m: parametrizations.spectral_norm(m[0]), "as parametrize does"),
    "orthogonal": (lambda m: parametrizations.orthogonal(m[0]), "as parametrize does"),
    "a parametrization": (
        lambda m: parametrize.register_parametrization(m[0], "weight", Absolute()),
        "as parametrize does",
    ),
    "old weight norm": (lambda m: nn.utils.weight_norm(m[0]), "cannot be split into a norm and a direction"),
    "old spectral norm": (lambda m: nn.utils.spectral_norm(m[0]), "cannot be deleted or parametrized"),
    "QAT": (eager_qat, "torch.ao's quantization does not know such a layer"),
    "QAT of a graph": (graph_qat, "torch.ao's quantization does not know such a layer"),
}


# torch.ao's tracer goes into a subclass's forward and finds an ordinary call there, with the composition before it.
WORKS = ("QAT of a graph", "subclass")


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in REFUSED for k in KINDS if (n, k) != WORKS])
def test_refused_by_name_and_nothing_has_changed(name: str, kind: str, grad: bool) -> None:
    model, x = net(kind), image()
    expected, state = run(model, x), signature(model)
    function, message = REFUSED[name]
    with torch.set_grad_enabled(grad), pytest.raises(DoconvError, match=rf"'weight' of DO.*{message}.*fold\(model\)"):
        function(model)
    assert signature(model) == state
    assert equal(run(model.eval(), x), expected)
    assert {row.action for row in plan(model).rows} == {"already DO-Conv"}
    with cached(model):
        assert equal(run(model, x), expected)
    assert difference(run(fold(model), x), expected) < TOLERANCE


@both_kinds
@pytest.mark.parametrize(
    "name", ["prune", "prune, structured", "weight norm", "spectral norm", "old weight norm", "old spectral norm"]
)
def test_the_fix_works(name: str, kind: str) -> None:
    """On the folded model, and before the conversion, where the layer is then kept."""
    folded = fold(net(kind))
    before = run(folded, image())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        REFUSED[name][0](folded)
    if "spectral" in name or "prune" in name:
        assert difference(run(folded.train(), image()), before) > MOVED
    assert {row.reason for row in plan(folded).rows} == {"already parametrized"}


@both_kinds
def test_a_parametrized_bias_is_kept_through_the_fold(kind: str) -> None:
    model, x = net(kind), image()
    parametrize.register_parametrization(model[0], "bias", Absolute())
    expected = run(model, x)
    assert {row.action for row in plan(model).rows} == {"already DO-Conv"}
    folded: Any = fold(model)
    assert difference(run(folded, x), expected) < TOLERANCE
    assert type(folded[0]).__name__ == f"Parametrized{KINDS[kind]().__class__.__name__}"
    assert sorted(folded.state_dict()) == sorted({k for k in model.state_dict() if "D" not in k and "extra" not in k})
    parametrize.remove_parametrizations(folded[0], "bias")
    assert type(folded[0]) is type(KINDS[kind]())


def test_a_class_of_the_users_own_on_top_of_ours_is_refused() -> None:
    class Own(DOConv2d):
        pass

    model = nn.Sequential(Own(3, 4, 3))
    with pytest.raises(DoconvError, match=r"'0': Own extends DOConv2d, and fold cannot tell its plain class"):
        fold(model)


@both_kinds
def test_replicas_of_data_parallel(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own `replicate`, with a broadcast for the CPU."""
    replicate: types.ModuleType = importlib.import_module("torch.nn.parallel.replicate")

    def broadcast(tensors: Any, devices: Any, detach: bool = False) -> Any:
        return [[tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, *_: 0)
    model, x = net(kind), image()
    replicas: list[Any] = replicate.replicate(model, [0, 1])
    outputs = [replica(x) for replica in replicas]
    assert all(torch.equal(output, model(x)) for output in outputs)
    assert all(torch.equal(replica[0].weight, model[0].weight) for replica in replicas)
    sum(output.sum() for output in outputs).backward()
    expected = torch.autograd.grad(2 * model(x).sum(), list(model.parameters()))
    assert all(difference(p.grad, g) < TOLERANCE for p, g in zip(model.parameters(), expected, strict=True))


@both_kinds
def test_torch_jit(kind: str) -> None:
    model, x = net(kind), image()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DoconvError, match=r"'weight' of DO.*torch\.jit\.script\(fold\(model\)\)"):
            torch.jit.script(model)
        traced = torch.jit.trace(model, x)
        scripted = torch.jit.script(fold(model))
    assert difference(traced(x), model(x)) < TOLERANCE
    assert difference(scripted(x), model(x)) < TOLERANCE
    with torch.no_grad():
        model[0].D.mul_(2)
    assert difference(traced(x), model(x)) < TOLERANCE  # it shares the Parameters


@both_kinds
def test_a_script_module_is_refused(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(plain_net(kind))
    with pytest.raises(DoconvError, match="is a TorchScript module already; convert the Python model"):
        to_doconv(scripted)
    with pytest.raises(DoconvError, match="'0' is a TorchScript module already"):
        to_doconv(nn.Sequential(scripted, nn.Conv2d(4, 4, 3)))


@both_kinds
def test_an_exported_program_of_a_converted_model(kind: str) -> None:
    """It computes what the model does; that its graph composes kernels is said by the fold."""
    model, x = net(kind), image()
    program = torch.export.export(model, (x,)).module()
    assert difference(run(program, x), run(model, x)) < TOLERANCE
    with pytest.raises(DoconvError, match=r"'0': this exported graph composes its kernel .* before torch.export"):
        fold(program)
    assert signature(fold(torch.export.export(plain_net(kind), (x,)).module()))


def test_the_flags_of_a_copied_graph_survive() -> None:
    """torchvision's extractors are GraphModules, whose copies come back in training mode."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    resnet = importlib.import_module("torchvision").models.resnet18(weights=None)
    body = extraction.create_feature_extractor(resnet, {"layer1": "0"})
    model = nn.ModuleDict({"body": body, "head": nn.Conv2d(64, 4, 3)}).double().eval()
    for copied in (to_doconv(model), fold(to_doconv(model)), copy_model(model)):
        assert [module.training for module in copied.modules()] == [False] * len(list(copied.modules()))
        x = varied_images(2, 3, 32, 32).double()
        assert equal(run(copied["body"], x), run(body, x))


def test_only_1x1_layers_in_sight_is_no_success() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filters, self.mix = nn.Parameter(torch.randn(8, 1, 16)), nn.Conv1d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x if x.abs().max() > 1e9 else self.mix(F.conv1d(x, self.filters, stride=8).relu())

    with pytest.raises(DoconvError, match=r"nothing to convert \(1 1x1 \(no D\)\).*pass example_inputs"):
        to_doconv(Hidden())
    assert "filters_D" in to_doconv(Hidden(), example_inputs=torch.randn(1, 1, 64)).state_dict()
