"""`check_optimizer`, the groups of `param_groups`, and other people's optimizers and rules on a converted model."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import is_d, is_factor
from support_training import MOVED, NETS, Functional, converted, images, least_moved_d, loss_of, sgd, train
from timm import create_model
from timm.optim import Lars, Lookahead, Muon, param_groups_layer_decay, param_groups_weight_decay
from timm.utils.agc import adaptive_clip_grad
from torch import fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from doconv_convert import (
    DOConv2d,
    DoconvError,
    ToDOConvPass,
    UsageError,
    check_optimizer,
    fold,
    param_groups,
    to_doconv,
)

# What timm's adaptive gradient clipping leaves of the gradient of a row whose weights are zero: clip_factor * eps.
CLIP_FACTOR, EPS = 0.01, 1e-3


def factors(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if is_factor(name)]


def complaint(model: nn.Module, *optimizers: Any) -> str:
    with pytest.raises(DoconvError) as raised:
        check_optimizer(model, *optimizers)
    return str(raised.value)


@pytest.mark.parametrize("d_mul", ["K", "K+3"])
@pytest.mark.parametrize("kind", NETS)
def test_an_optimizer_of_the_converted_model_is_right(kind: str, d_mul: str) -> None:
    model = converted(NETS[kind](), d_mul=d_mul)
    check_optimizer(model, sgd(model.parameters()))
    check_optimizer(model, torch.optim.SGD(param_groups(model), lr=0.1))


@pytest.mark.parametrize("kind", NETS)
def test_built_before_a_conversion_in_place(kind: str) -> None:
    model = NETS[kind]()
    early = sgd(model.parameters())
    to_doconv(model, inplace=True, d_mul="K+3")
    said = complaint(model, early)
    assert all(f"'{name}'" in said for name in factors(model))
    assert said.count("'") == 2 * len(factors(model))
    assert "does not have" not in said
    assert said.endswith("Build it after the conversion, from model.parameters() or param_groups(model).")
    early.add_param_group({"params": [p for name, p in model.named_parameters() if is_factor(name)]})
    check_optimizer(model, early)


@pytest.mark.parametrize("kind", NETS)
def test_built_from_the_original_of_a_copy(kind: str) -> None:
    plain = NETS[kind]()
    early = sgd(plain.parameters())
    model = converted(plain)
    count = len(list(plain.parameters()))
    said = complaint(model, early)
    assert f"It holds {count} other parameters that the model does not have" in said
    assert ("'first.weight', 'first.bias', 'first.D'" if kind == "layers" else "'kernel', 'kernel_D'") in said
    assert complaint(copy.deepcopy(model), sgd(model.parameters())).count("'") == said.count("'")


@pytest.mark.parametrize("kind", NETS)
def test_what_is_frozen_need_not_be_held(kind: str) -> None:
    model = converted(NETS[kind]())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_d(name))
    trained = [p for p in model.parameters() if p.requires_grad]
    check_optimizer(model, sgd(trained))
    next(p for name, p in model.named_parameters() if is_d(name)).requires_grad_(True)
    assert complaint(model, sgd(trained)).count("'") == 2


def test_a_layer_without_d_and_what_is_no_convolution() -> None:
    model = to_doconv(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(8, 2)))
    assert isinstance(model[1], DOConv2d)
    every = dict(model.named_parameters())
    check_optimizer(model, sgd([p for name, p in every.items() if not name.startswith("3.")]))
    said = complaint(model, sgd([p for name, p in every.items() if not name.startswith("1.")]))
    assert "2 of 5 trainable parameters of the converted layers: '1.weight', '1.bias'." in said


def test_many_names_are_counted() -> None:
    model = to_doconv(nn.Sequential(*[nn.Conv2d(2, 2, 3) for _ in range(11)]))
    said = complaint(model, sgd([p for name, p in model.named_parameters() if not is_d(name)]))
    assert "11 of 33" in said
    assert "'7.D' and 3 more." in said


def test_a_graph_module_with_functional_kernels() -> None:
    gm = ToDOConvPass()(fx.symbolic_trace(Functional("batch"))).graph_module
    d = {id(p) for name, p in gm.named_parameters() if is_d(name)}
    groups = param_groups(gm, d_lr=1.0)
    assert len(d) == 2
    assert {id(p) for p in groups[1]["params"]} == d
    check_optimizer(gm, torch.optim.SGD(groups, lr=0.1))
    assert "'kernel_D', 'bounded.D'." in complaint(gm, torch.optim.SGD(groups[:1], lr=0.1))


class Wrapper:
    """As accelerate, Lightning and apex wrap one: the groups are there, the class is no Optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups


@pytest.mark.parametrize("wrap", [Wrapper, Lookahead])
def test_wrappers_of_optimizers_and_of_models(wrap: Callable[[Any], Any]) -> None:
    plain = NETS["layers"]()
    early = wrap(sgd(plain.parameters()))
    model = converted(plain)
    compiled = torch.compile(model, backend="eager")
    for whole in (model, compiled, nn.DataParallel(model)):
        check_optimizer(whole, wrap(sgd(whole.parameters())))
        assert "first.D" in complaint(whole, early)


@pytest.mark.parametrize("kind", NETS)
def test_shards(tmp_path: Path, kind: str, loopback: Callable[..., Any]) -> None:
    """The optimizer comes after `fully_shard`, which replaces every parameter."""
    start = partial(loopback, torch.distributed.init_process_group)
    start("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = converted(NETS[kind]())
        early = sgd(model.parameters())
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        check_optimizer(model, sgd(model.parameters()))
        assert "does not hold" in complaint(model, early)
    finally:
        torch.distributed.destroy_process_group()


def test_wrong_arguments() -> None:
    plain = NETS["layers"]()
    with pytest.raises(UsageError, match="'Layers' has no DO-Conv layer; pass the model that to_doconv returned"):
        check_optimizer(plain, sgd(plain.parameters()))
    model = converted(plain)
    schedule = torch.optim.lr_scheduler.ConstantLR(sgd(model.parameters()))
    with pytest.raises(UsageError, match="got ConstantLR, expected an optimizer"):
        check_optimizer(model, schedule)


def rates(**options: Any) -> list[float | None]:
    return [group.get("lr") for group in param_groups(converted(NETS["layers"]()), **options)]


def test_learning_rates() -> None:
    assert rates() == [None, None]
    assert rates(lr=0.1) == [0.1, 0.1]
    assert rates(d_lr=0.5) == [None, 0.5]
    assert rates(lr=0.1, d_lr=0.5) == [0.1, 0.5]
    assert rates(lr=0.25, d_lr="10x") == [0.25, 2.5]
    assert rates(lr=0.25, d_lr="0.5x") == [0.25, 0.125]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"d_lr": "10x"}, "lr was not given; pass lr= to param_groups too"),
        ({"lr": 0.1, "d_lr": "10"}, "got '10', expected a number, or a multiple of lr such as '10x'"),
        ({"lr": 0.1, "d_lr": "x"}, "d_lr: got 'x'"),
        ({"lr": 0.1, "d_lr": "-1x"}, "d_lr: got '-1x'"),
        ({"lr": 0.1, "d_lr": "nanx"}, "d_lr: got 'nanx'"),
        ({"lr": -0.1}, "^lr: got -0.1, expected a finite number"),
        ({"d_lr": float("inf")}, "^d_lr: got inf"),
        ({"weight_decay": float("nan")}, "^weight_decay: got nan"),
        ({"d_weight_decay": -1.0}, "^d_weight_decay: got -1.0"),
    ],
)
def test_wrong_rates(options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        rates(**options)


@pytest.mark.parametrize("kind", NETS)
def test_d_moves_at_its_own_rate(kind: str) -> None:
    moved = []
    for d_lr in (None, "10x"):
        model = converted(NETS[kind]())
        train(model, torch.optim.SGD(param_groups(model, lr=0.01, d_lr=d_lr)), 1)
        moved.append(torch.cat([p.detach().flatten() for name, p in model.named_parameters() if is_d(name)]))
    assert moved[0].any()
    torch.testing.assert_close(moved[1], 10 * moved[0])


def first_step(model: nn.Module, clipped: Iterable[Any]) -> list[torch.Tensor]:
    """Every D after one step of SGD at rate 1, with adaptive gradient clipping of these parameters."""
    loss_of(model, *images()).backward()
    adaptive_clip_grad(clipped, CLIP_FACTOR, EPS)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return [p.detach() for name, p in model.named_parameters() if is_d(name)]


@pytest.mark.parametrize("kind", NETS)
def test_adaptive_gradient_clipping_holds_d_at_zero(kind: str) -> None:
    """It allows a gradient of 1 % of the parameter's own norm, and D starts at zero. Clip the others."""
    models = [converted(NETS[kind]()) for _ in range(3)]
    free = first_step(models[0], [])
    held = first_step(models[1], models[1].parameters())
    apart = first_step(models[2], param_groups(models[2])[0]["params"])
    for one, two, three in zip(free, held, apart, strict=True):
        assert one.flatten(1).norm(dim=1).max() > 100 * CLIP_FACTOR * EPS
        assert two.flatten(1).norm(dim=1).max() <= 1.001 * CLIP_FACTOR * EPS
        assert torch.equal(three, one)


@pytest.mark.parametrize("kind", NETS)
def test_lars_takes_d_without_weight_decay_as_sgd_does(kind: str) -> None:
    """Its rate is scaled by |p| / |gradient|, which is nothing at D = 0: the first step is unscaled, the next is
    tiny. timm's leaves groups without weight decay alone."""
    after = []
    for optimizer in (Lars, torch.optim.SGD):
        model = converted(NETS[kind]())
        groups = param_groups(model, weight_decay=1e-4, d_weight_decay=0.0, lr=1.0, d_lr=0.1)
        loss_of(model, *images()).backward()
        optimizer(groups, lr=1.0).step()
        after.append({name: p.detach() for name, p in model.named_parameters()})
    assert any(not torch.equal(after[0][name], after[1][name]) for name in after[0] if not is_d(name))
    for name in after[0]:
        if is_d(name):
            assert after[0][name].any()
            torch.testing.assert_close(after[0][name], after[1][name])


def test_torchs_muon_takes_matrices_only() -> None:
    """D has three dimensions: it goes to the other optimizer, with the convolutions' kernels."""
    model = converted(NETS["layers"]())
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    muon = torch.optim.Muon(matrices)
    assert "'first.D'" in complaint(model, muon)
    check_optimizer(model, muon, torch.optim.AdamW(others))


def test_timms_muon_with_d_by_adamw() -> None:
    model = converted(NETS["functional"]())
    groups = param_groups_weight_decay(model, 1e-4, fallback_list=["*D"])
    fallback = {id(p) for group in groups if group.get("use_fallback") for p in group["params"]}
    assert fallback == {id(p) for name, p in model.named_parameters() if is_d(name)}
    optimizer = Muon(groups, lr=0.01)
    check_optimizer(model, optimizer)
    train(model, optimizer, 2)
    assert least_moved_d(model) > MOVED


def decays(groups: list[dict[str, Any]], parameter: torch.Tensor) -> tuple[float, float]:
    """The weight decay and the learning rate's scale of one parameter."""
    (found,) = [group for group in groups if any(p is parameter for p in group["params"])]
    return found["weight_decay"], found.get("lr_scale", 1.0)


@pytest.mark.parametrize("rule", [param_groups_weight_decay, param_groups_layer_decay])
def test_timms_rules_by_name_and_dimension(rule: Any) -> None:
    """D and weight_extra are no vectors, so they decay; their names begin like the kernel's, so they are of its layer.
    A pattern of names sets D apart."""
    model = to_doconv(create_model("test_resnet"), d_mul="K+1")
    every = dict(model.named_parameters())
    names = [name.removesuffix(".D") for name in every if is_d(name)]
    assert len(names) > 5
    groups = rule(model, weight_decay=0.05)
    check_optimizer(model, torch.optim.SGD(groups, lr=0.1))
    scales = set()
    for name in names:
        of_kernel = decays(groups, every[f"{name}.weight"])
        assert of_kernel[0] == 0.05
        assert decays(groups, every[f"{name}.D"]) == of_kernel
        assert decays(groups, every[f"{name}.weight_extra"]) == of_kernel
        scales.add(of_kernel[1])
    assert (len(scales) > 3) == (rule is param_groups_layer_decay)
    groups = rule(model, weight_decay=0.05, no_weight_decay_list=["*.D"])
    assert {decays(groups, every[f"{name}.D"])[0] for name in names} == {0.0}


@pytest.mark.parametrize("kind", NETS)
def test_groups_by_attribute_miss_d(kind: str) -> None:
    """As YOLO's trainers once built them. A converted layer's `weight` may be no leaf: torch then refuses the group,
    and who filters by `is_leaf` is told what is missing."""
    model = converted(NETS[kind]())
    found = [getattr(module, name, None) for module in model.modules() for name in ("weight", "bias")]
    attributes = [p for p in found if isinstance(p, nn.Parameter) and p.is_leaf]
    said = complaint(model, sgd(attributes))
    d_names = [name for name, _ in model.named_parameters() if is_d(name)]
    assert all(f"'{name}'" in said for name in d_names)


def test_a_fold_of_an_untrained_model_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = converted(NETS["layers"]())
    fold(model)
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "No D was trained: every D is exactly zero. Was the optimizer built before the conversion?"
    caplog.clear()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if is_d(name)).view(-1)[-1] = 1e-30
    fold(model)
    fold(NETS["layers"]())  # a plain model has no D to train
    assert caplog.records == []
