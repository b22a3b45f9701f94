"""What is kept or refused, and in which words; every refusal comes before the first change."""

import sys
from functools import partial
from typing import Any

import pytest
import torch
from support import build_model, difference, equal, is_d, randomize, run, varied_images
from torch import Tensor, nn
from torch.nn import functional as F

from doconv_convert import DOConv2d, DoconvError, UsageError, fold, plan, to_doconv
from doconv_convert.rewrite.plan import Plan
from doconv_convert.rewrite.sites import Reason

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature"),
]

MOVED = 0.1


def net(*others: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 3, 3), *others).eval()


def reasons(made: Plan) -> dict[str, str | None]:
    return {row.name: row.reason for row in made.rows}


def quantized() -> nn.Module:
    return torch.ao.nn.quantized.Conv2d(3, 3, 3)


def quantization_aware() -> nn.Module:
    return torch.ao.nn.qat.Conv2d(3, 3, 3, qconfig=torch.ao.quantization.default_qat_qconfig)


def quantization_aware_fused() -> nn.Module:
    return torch.ao.nn.intrinsic.qat.ConvReLU2d(3, 3, 3, qconfig=torch.ao.quantization.default_qat_qconfig)


KEPT = {
    "lazy": (lambda: nn.LazyConv2d(3, 3), Reason.LAZY),
    "quantized": (quantized, Reason.QUANTIZED),
    "quantization-aware": (quantization_aware, Reason.QUANTIZED),
    "quantization-aware, fused": (quantization_aware_fused, Reason.QUANTIZED),
    "complex": (lambda: nn.Conv2d(3, 3, 3, dtype=torch.complex64), Reason.COMPLEX),
    "transposed": (lambda: nn.ConvTranspose2d(3, 3, 3), Reason.TRANSPOSED),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_for_a_reason(name: str) -> None:
    make, reason = KEPT[name]
    assert reasons(plan(net(make()))) == {"0": None, "1": reason.value}
    converted = to_doconv(net(make()))
    assert isinstance(converted[0], DOConv2d)  # type: ignore[index]
    assert type(converted[1]) is type(make())  # type: ignore[index]
    assert type(fold(converted)[0]) is nn.Conv2d  # type: ignore[index]
    with pytest.raises(DoconvError, match=f"Sequential: nothing to convert \\(1 {reason.value}\\)"):
        to_doconv(nn.Sequential(make()))


def test_a_fused_float_block_is_entered() -> None:
    assert reasons(plan(net(torch.ao.nn.intrinsic.ConvReLU2d(nn.Conv2d(3, 3, 3), nn.ReLU())))) == {
        "0": None,
        "1.0": None,
    }


def test_nothing_to_convert() -> None:
    with pytest.raises(DoconvError, match=r"Linear: nothing to convert \(it has no convolution\)"):
        to_doconv(nn.Linear(3, 3))
    with pytest.raises(DoconvError, match=r"Sequential: nothing to convert \(2 excluded by name\)"):
        to_doconv(net(nn.Conv2d(3, 3, 3)), exclude=["*"])
    assert plan(nn.Linear(3, 3)).rows == []
    assert "no convolution; 0 parameters added" in str(plan(nn.Linear(3, 3)))
    assert type(fold(nn.Linear(3, 3))) is nn.Linear


def test_an_unseen_functional_call_is_hinted_at() -> None:
    class Unseen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(3, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel) if x.mean() < 1e9 else x

    with pytest.raises(DoconvError, match=r"Not looked into: 'the model itself'; pass example_inputs\."):
        to_doconv(Unseen())
    x = varied_images(2, 3, 8, 8)
    converted = to_doconv(Unseen(), example_inputs=(x,))
    assert [name for name, _ in converted.named_parameters()] == ["kernel", "kernel_D"]


def test_an_already_converted_model_comes_back_unchanged() -> None:
    converted = randomize(to_doconv(build_model("tied"), d_mul="K+3"), seed=0)
    again = to_doconv(converted, d_mul="2K")
    state, expected = again.state_dict(), converted.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert {row.action for row in plan(again).rows} == {"already DO-Conv"}
    assert plan(again).added_parameters == 0


def test_a_half_converted_model_is_completed() -> None:
    original, x = build_model("residual"), varied_images(2, 3, 32, 32)
    half = to_doconv(original, include=["blocks*"])
    assert not isinstance(half.stem[0], DOConv2d)  # type: ignore[union-attr, index]
    moved = run(randomize(half, seed=0), x)
    whole = to_doconv(half)
    assert isinstance(whole.stem[0], DOConv2d)  # type: ignore[union-attr, index]
    assert equal(run(whole, x), moved)
    assert difference(moved, run(original, x)) > MOVED


def test_ddp_is_refused(tmp_path: Any, loopback: Any) -> None:
    distributed = torch.distributed
    start = partial(loopback, distributed.init_process_group)
    start("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net())
        with pytest.raises(DoconvError, match=r"is a DistributedDataParallel already; .*DDP\(to_doconv\(model\)\)"):
            to_doconv(wrapped)
        moved = nn.parallel.DistributedDataParallel(randomize(to_doconv(net()), seed=0))
        moved(varied_images(2, 3, 8, 8)).mean().backward()
        assert all(p.grad is not None for p in moved.parameters())
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("inner", [False, True])
def test_compiled_and_parallel_models_are_refused(inner: bool) -> None:
    for wrapped, said in (
        (torch.compile(net()), r"OptimizedModule already; .*torch\.compile\(to_doconv\(model\)\)"),
        (nn.DataParallel(net()), "DataParallel already; wrap the converted model instead"),
    ):
        assert isinstance(wrapped, nn.Module)
        with pytest.raises(DoconvError, match=said):
            to_doconv(nn.Sequential(wrapped) if inner else wrapped)


def test_globs_choose_and_exclude_wins() -> None:
    model = build_model("residual")
    every = {row.name for row in plan(model).rows}
    assert {"stem.0", "blocks.0.conv1", "blocks.1.shortcut.0"} <= every

    def chosen(**options: Any) -> set[str]:
        converted = to_doconv(model, **options)
        return {name for name, module in converted.named_modules() if isinstance(module, DOConv2d)}

    assert chosen() == every
    assert chosen(include=["blocks.0.*"]) == {"blocks.0.conv1", "blocks.0.conv2"}
    assert chosen(include=["blocks.*", "stem*"], exclude=["*.conv2", "blocks.1.*"]) == {
        "stem.0",
        "blocks.0.conv1",
        "blocks.2.conv1",
    }
    assert chosen(exclude=["stem.0"]) == every - {"stem.0"}
    assert reasons(plan(model, exclude=["stem.0"]))["stem.0"] == "excluded by name"


def test_an_alias_names_its_layer_too() -> None:
    converted: Any = to_doconv(build_model("tied"), include=["again", "right"])
    assert [name for name, _ in converted.named_parameters() if is_d(name)] == ["left.D", "first.D"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_an_error(option: str) -> None:
    for glob in ("layer9*", "stem"):
        with pytest.raises(UsageError, match=f"{option} '{glob[:4]}.*' matches no convolution; the model's are named"):
            to_doconv(build_model("residual"), **{option: [glob]})
    with pytest.raises(UsageError, match=f"{option}: got the text 'stem.0', expected a sequence of globs"):
        to_doconv(build_model("residual"), **{option: "stem.0"})


def test_max_d_params_is_a_limit_that_is_told() -> None:
    model = net(nn.Conv2d(3, 3, 5))
    assert reasons(plan(model, max_d_params=3 * 81)) == {"0": None, "1": "above max_d_params"}
    assert reasons(plan(model, max_d_params=3 * 81 - 1)) == dict.fromkeys("01", "above max_d_params")
    large = nn.Conv2d(64, 64, 31, groups=64, device="meta")
    assert reasons(plan(net(large), max_d_params=64 * 961**2)) == {"0": None, "1": None}
    assert reasons(plan(net(large))) == {"0": None, "1": "above max_d_params"}


def test_refusals_leave_the_model_as_it_was() -> None:
    for options in ({"d_mul": 5}, {"include": ["none"]}, {"exclude": ["*"]}):
        model = build_model("functional")
        before = {name: id(module.__class__) for name, module in model.named_modules()}
        keys = list(model.state_dict())
        with pytest.raises(DoconvError):
            to_doconv(model, inplace=True, **options)
        assert list(model.state_dict()) == keys
        assert {name: id(module.__class__) for name, module in model.named_modules()} == before


def test_a_name_that_is_taken_is_refused_by_name() -> None:
    class Taken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 3, 3)
            self.p, self.p_D = nn.Parameter(torch.randn(3, 3, 3, 3)), "something of the user's"

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.stem(x), self.p)

    model = Taken()
    with pytest.raises(DoconvError, match=r"'p': Taken already has an attribute 'p_D'.*exclude=\['p'\]"):
        to_doconv(model, inplace=True)
    assert type(model.stem) is nn.Conv2d
    assert isinstance(to_doconv(model, exclude=["p"]).stem, DOConv2d)


def test_meta_models_convert_and_load_but_do_not_fold() -> None:
    with torch.device("meta"):
        model = build_model("residual").to("meta")
    converted = to_doconv(model, d_mul="K+3")
    assert all(p.is_meta for p in converted.parameters())
    assert reasons(plan(model)) == reasons(plan(build_model("residual")))
    with pytest.raises(DoconvError, match=r"'stem.0': its tensors are on the meta device and hold no values"):
        fold(converted)
    trained = randomize(to_doconv(build_model("residual"), d_mul="K+3"), seed=0)
    converted.load_state_dict(trained.state_dict(), assign=True)
    x = varied_images(2, 3, 32, 32)
    assert equal(run(converted, x), run(trained, x))


def test_a_model_that_refuses_to_be_copied_says_what_to_do() -> None:
    class Uncopyable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.log = nn.Conv2d(3, 3, 3), sys.stdout

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    model = Uncopyable()
    with pytest.raises(DoconvError, match=r"Uncopyable cannot be copied \(TypeError: .*\); pass inplace=True\."):
        to_doconv(model)
    x = varied_images(2, 3, 8, 8)
    before = run(model, x)
    converted = to_doconv(model, inplace=True)
    assert equal(run(converted, x), before)
    with pytest.raises(DoconvError, match="pass inplace=True"):
        fold(converted)
    assert type(fold(converted, inplace=True).body) is nn.Conv2d
