"""DOConv layers as people use them: stored form, state dicts, copies, tracing, and what is refused."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from support import difference, equal, randomize, run
from torch import Tensor, fx, nn

from doconv_convert import DOConv1d, DOConv2d, DOConv3d, UsageError, to_doconv

MOVED = 0.1
pytestmark = pytest.mark.usefixtures("both_arithmetics")


def layer(**options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DOConv2d(4, 6, 3, padding=1, groups=2, **options)


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("cls", "plain", "kernel"), [(DOConv1d, nn.Conv1d, 3), (DOConv2d, nn.Conv2d, 3), (DOConv3d, nn.Conv3d, 2)]
)
def test_conv_arguments_keep_their_order(cls: Any, plain: Any, kernel: int) -> None:
    arguments = (4, 8, kernel, 2, 1, 1, 2, False, "replicate")
    torch.manual_seed(0)
    ours = cls(*arguments)
    torch.manual_seed(0)
    theirs = plain(*arguments)
    assert isinstance(ours, plain)
    assert torch.equal(ours.weight, theirs.weight)
    assert {name: vars(ours)[name] for name in vars(theirs) if not name.startswith("_")} == {
        name: value for name, value in vars(theirs).items() if not name.startswith("_")
    }
    x = torch.randn(2, 4, *[7] * (theirs.weight.dim() - 2))
    assert equal(run(ours, x), run(theirs, x))
    with pytest.raises(TypeError):
        cls(*arguments, None, None, 9)


def test_d_mul_below_k_is_refused_by_name() -> None:
    with pytest.raises(UsageError) as refused:
        DOConv2d.from_conv(nn.Conv2d(4, 4, 3), d_mul=5, name="layer1.0.conv2")
    assert str(refused.value) == "'layer1.0.conv2': d_mul must be at least 9 (3x3 kernel), got 5."
    with pytest.raises(UsageError, match=r"^d_mul must be at least 10 \(2x5 kernel\), got 9\.$"):
        DOConv2d(4, 4, (2, 5), d_mul=9)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, (1, 7)), nn.Conv2d(4, 4, 2))
    with pytest.raises(UsageError) as refused:
        to_doconv(model, d_mul=5)
    for sentence in (
        "'0': d_mul must be at least 9 (3x3 kernel), got 5",
        "'1': d_mul must be at least 7 (1x7 kernel), got 5",
    ):
        assert sentence in str(refused.value)
    assert "'2'" not in str(refused.value)
    with pytest.raises(UsageError, match="composition: got 'both', expected one of kernel, feature"):
        layer(composition="both")


@pytest.mark.parametrize("d_mul", ["K", "K+3"])
def test_stored_form(d_mul: str) -> None:
    ours = layer(d_mul=d_mul)
    assert ours.weight.shape == (6, 2, 3, 3)
    assert ours.D.shape == (4, 9, 9 if d_mul == "K" else 12)
    assert not ours.D.any()
    assert (ours.weight_extra is None) == (d_mul == "K")
    if d_mul == "K+3":
        assert ours.weight_extra.shape == (6, 2, 3)
        assert ours.weight_extra.all()
    ours(image()).square().sum().backward()
    assert ours.D.grad[..., -3:].any()
    if d_mul == "K+3":
        assert not ours.weight_extra.grad.any()


def test_one_by_one_kernels_have_no_d_unless_pointwise() -> None:
    plain = nn.Conv2d(4, 6, 1)
    without = DOConv2d.from_conv(plain)
    assert without.D is None
    assert list(without.state_dict()) == ["weight", "bias"]
    assert without.effective_kernel() is without.weight
    assert equal(run(without, image()), run(plain, image()))
    within = DOConv2d.from_conv(plain, pointwise=True, d_mul=3)
    assert within.D is not None
    assert within.D.shape == (4, 1, 3)
    assert equal(run(within, image()), run(plain, image()))
    moved = run(randomize(within, seed=0), image())
    assert difference(moved, run(plain, image())) > MOVED
    assert difference(run(within.to_conv(), image()), moved) < 1e-6
    assert type(without.to_conv()) is nn.Conv2d
    assert not isinstance(to_doconv(nn.Sequential(plain), pointwise=True)[0].D, type(None))


@pytest.mark.parametrize("d_mul", ["K", "K+3"])
def test_a_plain_state_dict_loads_strictly(d_mul: str) -> None:
    ours = randomize(layer(d_mul=d_mul), seed=0)
    plain = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    assert difference(run(ours, image()), run(plain, image())) > MOVED
    extra = copy.deepcopy(ours.weight_extra)
    ours.load_state_dict(plain.state_dict())
    assert equal(run(ours, image()), run(plain, image()))
    assert extra is None or torch.equal(ours.weight_extra, extra)


@pytest.mark.parametrize("lost", ["D", "weight_extra", "weight", "bias"])
def test_what_is_lost_is_missing(lost: str) -> None:
    ours = layer(d_mul="K+3")
    state = ours.state_dict()
    del state[lost]
    result = ours.load_state_dict(state, strict=False)
    assert result.missing_keys == [lost]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{lost}"'):
        ours.load_state_dict(state)


def test_an_empty_state_dict_misses_every_key_and_changes_nothing() -> None:
    ours = randomize(layer(d_mul="K+3"), seed=0)
    before = ours.D.clone()
    assert ours.load_state_dict({}, strict=False).missing_keys == ["weight", "bias", "D", "weight_extra"]
    assert torch.equal(ours.D, before)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_round_trip(assign: bool) -> None:
    first, second = randomize(layer(d_mul="K+3"), seed=0), layer(d_mul="K+3")
    assert difference(run(first, image()), run(second, image())) > MOVED
    second.load_state_dict(first.state_dict(), assign=assign)
    assert equal(run(first, image()), run(second, image()))


def test_a_plain_state_dict_is_assigned_to_a_meta_layer() -> None:
    plain = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    ours = layer(device="meta")
    ours.load_state_dict(plain.state_dict(), assign=True)
    assert equal(run(ours, image()), run(plain, image()))


def test_weight_decay_pulls_d_toward_zero() -> None:
    ours = randomize(layer(), seed=0)
    before = {name: float(p.detach().norm()) for name, p in ours.named_parameters()}
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, weight_decay=0.5)
    for parameter in ours.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in ours.named_parameters():
        assert float(parameter.detach().norm()) == pytest.approx(0.95 * before[name], rel=1e-5)


def test_reset_parameters_starts_anew() -> None:
    ours = randomize(layer(d_mul="K+3"), seed=0)
    ours.reset_parameters()
    assert not ours.D.any()
    assert torch.equal(ours.weight_extra, layer(d_mul="K+3").weight_extra)


def by_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_are_the_same_and_apart(duplicate: Any) -> None:
    ours = randomize(layer(d_mul="K+3"), seed=0)
    other = duplicate(ours)
    assert type(other) is DOConv2d
    assert equal(run(other, image()), run(ours, image()))
    with torch.no_grad():
        other.D.zero_()
    assert difference(run(other, image()), run(ours, image())) > MOVED


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_to_conv_composes_in_float64_and_casts_once(dtype: torch.dtype) -> None:
    ours = randomize(layer(d_mul="K+3"), seed=0).to(dtype)
    exact = copy.deepcopy(ours).double().effective_kernel()
    conv = ours.to_conv()
    assert type(conv) is nn.Conv2d
    assert list(conv.state_dict()) == ["weight", "bias"]
    assert torch.equal(conv.weight, exact.to(dtype))
    assert not torch.equal(conv.weight, ours.weight_first_slots)
    assert repr(conv) == repr(nn.Conv2d(4, 6, 3, padding=1, groups=2))
    with torch.no_grad():
        ours.weight.zero_()
    assert conv.weight.any()


def test_default_tracing_sees_a_leaf() -> None:
    model = nn.Sequential(randomize(layer(), seed=0), nn.ReLU())
    graph = fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0", "1"]
    assert equal(run(graph, image()), run(model, image()))


@pytest.mark.parametrize("composition", ["kernel", "feature"])
def test_a_layer_can_be_the_root_of_a_trace(composition: str) -> None:
    ours = randomize(layer(composition=composition, d_mul="K+3"), seed=0)
    assert equal(run(fx.symbolic_trace(ours), image()), run(ours, image()))


@pytest.mark.parametrize("composition", ["kernel", "feature"])
def test_unbatched_meta_and_vmapped_inputs(composition: str) -> None:
    ours = randomize(layer(composition=composition), seed=0)
    x = image()
    assert difference(run(ours, x[0]), run(ours, x)[0]) < 1e-6
    assert copy.deepcopy(ours).to("meta")(x.to("meta")).shape == (2, 6, 6, 6)
    assert difference(torch.vmap(ours)(x.unsqueeze(1)).flatten(0, 1), ours(x)) < 1e-6


def test_per_sample_gradients_and_functional_call() -> None:
    ours = randomize(layer(d_mul="K+3"), seed=0)
    doubled = {name: 2 * p.detach() for name, p in ours.named_parameters()}
    changed = torch.func.functional_call(ours, doubled, (image(),))
    assert difference(changed, ours(image())) > MOVED

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        result = torch.func.functional_call(ours, parameters, (x.unsqueeze(0),))
        assert isinstance(result, Tensor)
        return result.square().sum()

    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, image())
    ours(image()).square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert difference(each[name].sum(0), parameter.grad) < 1e-5, name


def test_from_conv_takes_the_plain_class_only() -> None:
    class Custom(nn.Conv2d):
        pass

    with pytest.raises(UsageError, match=r"'stem': DOConv2d.from_conv takes exactly Conv2d, got Custom; use to_doconv"):
        DOConv2d.from_conv(Custom(4, 4, 3), name="stem")


@pytest.mark.parametrize("composition", ["kernel", "feature"])
def test_autocast_runs_the_convolution_in_half(composition: str) -> None:
    ours = randomize(layer(composition=composition), seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        result = run(ours, image())
    assert result.dtype == torch.bfloat16
    assert 0 < difference(result, run(ours, image())) < 0.05
