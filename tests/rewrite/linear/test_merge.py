"""`fold` with `merge`: blocks of the papers, trained, become one convolution each or are declined with a reason."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support_branches import DBB, OREPA, ACNet, ExpandNet, Net, RepVGG, UniRepLKNet, conv_norm, trained
from torch import Tensor, nn
from torch.nn import functional as F

from doconv_convert import DoconvError, UsageError, fold, to_doconv
from doconv_convert.rewrite.fold import fold_in_place
from doconv_convert.rewrite.linear.merge import InferenceModule, find_in_model, merge_in_place
from doconv_convert.rewrite.linear.reasons import Reason

# Whole networks of a few blocks in float64; the largest seen here is 3e-15.
EXACT = 1e-13


def count(model: nn.Module, cls: type[nn.Module]) -> int:
    return sum(isinstance(module, cls) for module in model.modules())


def convolutions(model: nn.Module) -> int:
    return count(model, nn.modules.conv._ConvNd)


def norms(model: nn.Module) -> int:
    return count(model, nn.modules.batchnorm._BatchNorm)


def difference(model: nn.Module, other: nn.Module, *shape: int) -> float:
    x = torch.randn(shape or (2, 3, 13, 12), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    with torch.no_grad():
        expected, got = model(x), other(x)
    assert expected.std() > 0
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("block", "per_block"),
    [
        (RepVGG, 2),
        (lambda c: RepVGG(c, groups=2), 2),
        (ACNet, 3),
        (DBB, 5),
        (ExpandNet, 3),
        (UniRepLKNet, 5),
    ],
)
def test_a_trained_block_becomes_one_convolution(block: Callable[[int], nn.Module], per_block: int) -> None:
    model = trained(Net(block).double())
    assert convolutions(model) == 1 + 2 * per_block
    report = fold_in_place(copy.deepcopy(model), merge="branches")
    assert convolutions(report.model) == 3
    assert norms(report.model) == 0
    assert report.left == []
    assert [region.convolutions for region in report.merged] == [per_block] * 2
    assert difference(model, report.model) < EXACT
    for region in report.merged:
        assert region.error < 1e-13
        assert region.macs <= region.macs_before
        assert region.parameters <= region.parameters_before
        assert len(region.sizes) == 3
    # only the blocks changed their class
    assert type(report.model) is Net
    assert [type(module).__name__ for module in report.model.blocks] == [type(model.blocks[0]).__name__] * 2
    assert all(isinstance(module, InferenceModule) for module in report.model.blocks)


def test_dbb_that_pads_with_zeros_is_declined_at_its_border() -> None:
    model = trained(Net(lambda c: DBB(c, wrong=True)).double())
    report = fold_in_place(copy.deepcopy(model), merge="branches")
    assert {region.reason for region in report.left} == {Reason.BIAS_BEFORE_PADDING.value}
    assert {region.module for region in report.left} == {"blocks.0", "blocks.1"}
    # the branches that have no such border are one convolution, the two with it stay
    assert [region.nodes for region in report.merged] == [("origin_0", "origin_1", "one_0", "one_1", "add")] * 2
    assert convolutions(report.model) == 1 + 2 * 4
    assert difference(model, report.model) < EXACT


def test_orepa_folds_by_its_graph_and_takes_its_batch_norm() -> None:
    model = trained(Net(OREPA).double())
    report = fold_in_place(copy.deepcopy(model), merge="all")
    assert report.by_graph == ["blocks.0.kernels", "blocks.1.kernels"]
    assert convolutions(report.model) == 3
    assert norms(report.model) == 0
    assert difference(model, report.model) < EXACT


def test_a_trained_doconv_repvgg_ships_one_convolution_a_block() -> None:
    training = to_doconv(Net(RepVGG).double())
    model = trained(training)
    assert all(site.any() for name, site in model.named_parameters() if name.endswith(".D"))
    before = copy.deepcopy(model)
    shipped = fold(model, merge="branches")
    assert convolutions(shipped) == 3
    assert not [name for name in shipped.state_dict() if name.endswith(".D")]
    assert difference(before, shipped) < EXACT
    assert difference(before, model) == 0.0


def test_a_merged_kernel_is_rounded_once() -> None:
    model = trained(to_doconv(Net(RepVGG)))
    wide = fold(copy.deepcopy(model).double(), merge="branches")
    narrow = fold(model, merge="branches")
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}
    for name, exact in wide.state_dict().items():
        assert torch.equal(narrow.state_dict()[name], exact.float()), name
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    half = fold(copy.deepcopy(model).half(), merge="branches")
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_what_half_precision_cannot_hold_is_an_error() -> None:
    block = RepVGG(4).eval().half()
    with torch.no_grad():
        block.dense[1].weight.fill_(6e4)
        block.dense[1].running_var.fill_(1e-6)
    with pytest.raises(DoconvError, match="beyond the largest finite number of float16"):
        fold(block, merge="branches")


def test_none_changes_nothing_and_says_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    model = trained(Net(RepVGG))
    with caplog.at_level(logging.INFO, "doconv_convert"):
        same = fold(model)
    assert "left as they are: 2 linear regions with 4 convolutions; `merge` branches makes one" in caplog.text
    assert [type(m) for m in same.modules()] == [type(m) for m in model.modules()]
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values(), strict=True))
    caplog.clear()
    with caplog.at_level(logging.INFO, "doconv_convert"):
        fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    assert caplog.text == ""


def test_a_merge_of_another_name_is_refused() -> None:
    with pytest.raises(UsageError, match="`merge`: got 'some', expected one of 'none', 'branches', 'all'"):
        fold(Net(RepVGG), merge="some")  # type: ignore[arg-type]


def test_training_mode_is_refused_with_the_reason() -> None:
    shipped = fold(trained(Net(RepVGG)), merge="branches")
    shipped.eval()
    with pytest.raises(DoconvError, match=r"RepVGG: linear regions .* were merged for inference; train the model from"):
        shipped.train()
    again = copy.deepcopy(shipped)
    assert isinstance(again.blocks[0], InferenceModule)


def test_batch_norms_behind_one_convolution_go_with_all_alone() -> None:
    model = trained(nn.Sequential(conv_norm(3, 6, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(6, 4, 1)).double())
    assert fold_in_place(copy.deepcopy(model), merge="branches").merged == []
    report = fold_in_place(copy.deepcopy(model), merge="all")
    assert [(one.name, one.convolutions, one.batch_norms) for one in report.merged] == [("0.merged", 1, 1)]
    assert report.model[0].merged.dilation == (2, 2)
    assert norms(report.model) == 0
    assert difference(model, report.model) < EXACT


class Around(nn.Module):
    """Forwards that merge in one way alone, by name."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b = conv_norm(3, 3, 3, padding=1), conv_norm(3, 3, 1)
        self.gain = nn.Parameter(torch.rand(3, 1, 1) + 0.5)
        self.pool, self.drop = nn.AvgPool2d(1, 1), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, f"by_{self.way}")(x)
        return result

    def by_scale(self, x: Tensor) -> Tensor:
        return self.gain.view(1, -1, 1, 1) * (self.a(x) - 2.0 * self.b(x)) / 4 + x

    def by_methods(self, x: Tensor) -> Tensor:
        y = self.a(x).add_(self.drop(self.b(x))).sub(x, alpha=0.5)
        return torch.relu_(y)

    def by_calls(self, x: Tensor) -> Tensor:
        y = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.a[0].weight, stride=1)
        norm = self.b[1]
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.1, norm.eps)
        return F.dropout(y, 0.5, self.training) + F.conv2d(input=x, weight=self.b[0].weight)

    def by_pool(self, x: Tensor) -> Tensor:
        return self.pool(self.a(x)) + F.avg_pool2d(x, 3, 1, 1)

    def by_shape(self, x: Tensor) -> Tensor:
        y = self.a(x)
        torch._assert(y.ndim == 4, "an image")
        return y + self.b(x)

    def by_statistics(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.a(x), None, None, training=True) + x

    def by_input(self, x: Tensor) -> Tensor:
        return F.conv2d(x, x.mean((0, 2, 3)).reshape(1, 3, 1, 1).expand(3, 3, 1, 1)) + self.b(x)

    def by_outputs(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return torch.cat([y + self.b(x), y], 1)

    def by_writing(self, x: Tensor) -> Tensor:
        y = x.sigmoid()
        z = self.a(y)
        y.mul_(2.0)
        return z + self.b(y)

    def by_reflection(self, x: Tensor) -> Tensor:
        return self.a(F.pad(x, (1, 1, 1, 1), mode="reflect")) + F.pad(self.b(x), (1, 1, 1, 1))

    def by_broadcast(self, x: Tensor) -> Tensor:
        return self.a(x) + F.conv2d(x, self.b[0].weight[:1])

    def by_sizes(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.a[0].weight, stride=2, padding=1) + F.conv2d(x, self.a[0].weight[..., 1:, 1:], stride=2)

    def by_uneven(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 0, 1, 0)), self.a[0].weight[..., :2, :2]) + self.b(x)


@pytest.mark.parametrize("way", ["scale", "methods", "calls", "pool", "shape"])
def test_other_ways_to_write_it(way: str) -> None:
    model = trained(Around(way).double())
    report = fold_in_place(copy.deepcopy(model), merge="branches")
    assert len(report.merged) == 1, report.left
    assert difference(model, report.model) < EXACT
    assert convolutions(report.model) == 1


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("statistics", Reason.BATCH_STATISTICS),
        ("input", Reason.INPUT_DEPENDENT),
        ("outputs", Reason.SEVERAL_OUTPUTS),
        ("writing", Reason.WRITTEN_IN_PLACE),
        ("reflection", Reason.PADDING_MODE),
        ("broadcast", Reason.CHANNELS),
        ("sizes", Reason.SIZES),
        ("uneven", Reason.PADDING),
    ],
)
def test_what_is_no_convolution_is_declined_with_its_reason(way: str, reason: Reason) -> None:
    model = trained(Around(way).double(), 0 if way == "writing" else 2, shape=(4, 3, 12, 12))
    report = fold_in_place(copy.deepcopy(model), merge="branches")
    assert report.merged == []
    assert {region.reason for region in report.left} == {reason.value}
    assert difference(model, report.model, 2, 3, 12, 12) == 0.0


def test_two_padded_kernels_in_a_row_are_declined() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 2, 3, padding=1)).double().eval()
    report = fold_in_place(copy.deepcopy(model), merge="branches")
    assert [region.reason for region in report.left] == [Reason.PADDING_BETWEEN.value]


def test_no_merge_may_cost_more() -> None:
    """A linear bottleneck (MobileNetV2): one convolution would be wider than the two."""
    model = nn.Sequential(nn.Conv2d(16, 2, 1), nn.Conv2d(2, 16, 1)).double().eval()
    report = fold_in_place(copy.deepcopy(model), merge="branches")
    assert [region.reason for region in report.left] == [Reason.MORE_MACS.value]
    shared = nn.Conv2d(8, 8, 1, bias=False)
    norms = [nn.BatchNorm2d(8) for _ in range(3)]
    heads = Heads(shared, norms).double().eval()
    report = fold_in_place(copy.deepcopy(heads), merge="all")  # EfficientDet's heads
    assert {region.reason for region in report.left} == {Reason.MORE_PARAMETERS.value}


class Heads(nn.Module):
    def __init__(self, conv: nn.Conv2d, norms: list[nn.BatchNorm2d]) -> None:
        super().__init__()
        self.conv, self.norms = conv, nn.ModuleList(norms)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [norm(self.conv(x)).relu() for norm in self.norms]


def test_hooks_keep_a_module_as_it_is() -> None:
    model = trained(Net(RepVGG).double())
    model.blocks[0].register_forward_hook(lambda module, args, output: None)
    model.blocks[1].one[0].register_forward_hook(lambda module, args, output: output * 2)
    report = fold_in_place(model, merge="branches")
    assert {region.reason for region in report.left} == {Reason.HOOK.value}
    assert report.merged == []


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.same = RepVGG(3), RepVGG(3)
        self.again = self.same

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1000:
            return x
        return self.again(self.same(self.body(x)))


def test_an_untraceable_model_is_entered_child_by_child() -> None:
    model = trained(Untraceable().double())
    report = fold_in_place(copy.deepcopy(model), merge="branches")
    assert [region.name for region in report.merged] == ["body.merged", "same.merged"]
    assert report.model.again is report.model.same
    assert difference(model, report.model) < EXACT


def test_the_model_itself_may_be_the_region() -> None:
    model = trained(RepVGG(3).double())
    shipped = fold(model, merge="branches")
    assert isinstance(shipped, InferenceModule)
    assert list(shipped.state_dict()) == ["merged.weight", "merged.bias"]
    assert difference(model, shipped) < EXACT
    graph = torch.fx.symbolic_trace(model)
    assert difference(model, fold(graph, merge="branches")) < EXACT
    assert len(graph.graph.nodes) > 5


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_other_ranks_and_transposed_convolutions(rank: int, transposed: bool) -> None:
    cls: Any = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
    norm: Any = getattr(nn, f"BatchNorm{rank}d")
    extra = {"output_padding": 1} if transposed else {}

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(cls(4, 6, 3, stride=2, padding=1, groups=2, **extra), norm(6))
            self.b = nn.Sequential(cls(4, 6, 1, stride=2, groups=2, bias=False, **extra), norm(6))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) + self.b(x)).sigmoid()

    shape = (2, 4, 7, 6, 5)[: rank + 2]
    model = trained(Branches().double(), shape=shape)
    report = fold_in_place(copy.deepcopy(model), merge="branches")
    assert len(report.merged) == 1, report.left
    assert difference(model, report.model, *shape) < EXACT


def test_an_own_check_that_fails_declines_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the algebra gets wrong, the region's own forward tells."""
    from doconv_convert.rewrite.linear import evaluate

    right = evaluate.scaled

    def wrong(conv: Any, scale: Any) -> Any:
        return right(conv, replace(scale, bias=scale.bias * 1.01))

    monkeypatch.setattr(evaluate, "scaled", wrong)
    model = trained(Net(RepVGG).double())
    report = fold_in_place(copy.deepcopy(model), merge="branches")
    assert report.merged == []
    assert {region.reason for region in report.left} == {Reason.NOT_EQUAL.value}
    assert difference(model, report.model) == 0.0


def test_find_in_model_counts_and_leaves_the_model() -> None:
    model = Net(RepVGG)
    before = copy.deepcopy(model.state_dict())
    assert [region.count("convolution") for region in find_in_model(model)] == [2, 2]
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert merge_in_place(model, "none").merged == []
