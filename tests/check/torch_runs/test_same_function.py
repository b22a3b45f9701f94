"""A fold that changes what the network computes is seen in float64, whatever float32 itself is off by."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper
from support import randomize, randomize_and_calibrate, varied_images
from torch import Tensor, nn
from torch.nn import functional as F

from doconv_convert import fold, to_doconv
from doconv_convert.check.coverage import with_branches
from doconv_convert.check.onnxruntime_run import check_outputs
from doconv_convert.check.outputs.compare import CEILING, bound_for
from doconv_convert.check.outputs.expected import FoldRun, ReferenceRun
from doconv_convert.check.proof import with_function
from doconv_convert.check.status import Status
from doconv_convert.check.torch_runs.reference_run import reference_run
from doconv_convert.check.torch_runs.same_function import FUNCTION_TOLERANCE, run_in_float64

IMAGES = varied_images(3, 3, 12, 12, seed=2)


class Gated(nn.Module):
    """Convolves with a kernel and scales by the norm of the parameter of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * dict(self.named_parameters())["conv.weight"].norm()


class Noisy(nn.Module):
    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.noise = nn.Conv2d(3, 8, 3), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(self.conv(x))


def trained(net: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return randomize(to_doconv(net), seed=1).eval()


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2))


@pytest.mark.parametrize("composition", ["kernel", "feature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_faithful_fold_has_no_finding(composition: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = randomize_and_calibrate(to_doconv(plain(), composition=composition), IMAGES, seed=1).to(dtype)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    _, runs = run_in_float64(net, fold(net), (IMAGES.to(dtype),))
    assert runs.findings == ()
    assert runs.random is None
    assert runs.error <= FUNCTION_TOLERANCE
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_kernel_read_elsewhere_is_a_finding() -> None:
    net = trained(Gated())
    reference = reference_run(net, fold(net), (IMAGES,), 3)
    assert reference.fold is not None
    assert any(finding.startswith("output 0 differs by") for finding in reference.fold.findings)
    status = with_function(Status("fold", "passed", "1 kernels"), reference.fold)
    assert status.state == "failed"
    assert "does not compute what the trained one does" in status.detail


@pytest.mark.parametrize("change", [1 + 2.0**-23, -1.0])
def test_a_shipped_weight_that_is_not_the_folds_is_a_finding(change: float) -> None:
    net = trained(plain())
    folded: Any = fold(net)
    assert run_in_float64(net, folded, (IMAGES,))[1].findings == ()
    with torch.no_grad():
        folded[3].weight[0, 0, 0, 0] *= change
    (finding,) = run_in_float64(net, folded, (IMAGES,))[1].findings
    assert finding.startswith("'3.weight' of the folded network is not the trained one's")


@pytest.mark.parametrize("noise", [lambda x: F.dropout(x, 0.1, training=True), lambda x: x + torch.rand_like(x)])
def test_a_network_that_is_random_in_eval_mode_has_no_reference(
    noise: Callable[[Tensor], Tensor], tmp_path: Any
) -> None:
    net = trained(Noisy(noise))
    reference = reference_run(net, fold(net), (IMAGES,), 3)
    assert reference.fold is not None
    assert reference.fold.random is not None
    status, checks = check_outputs(tmp_path / "not even opened.onnx", reference)
    assert status.state == "failed"
    assert status.detail.startswith("the network is not deterministic")
    assert checks == []


def test_no_error_of_float32_widens_the_bound_beyond_the_ceiling() -> None:
    assert bound_for(0.1) == CEILING
    assert bound_for(CEILING / 8) == CEILING / 2


@pytest.mark.parametrize("branches", [True, False])
def test_a_kernel_in_a_branch_not_taken_is_uncovered(tmp_path: Any, branches: bool) -> None:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    then = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "then", [], [y])
    node = (
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=then)
        if branches
        else helper.make_node("Identity", ["x"], ["y"])
    )
    x, c = (
        helper.make_tensor_value_info(n, kind, [1]) for n, kind in (("x", TensorProto.FLOAT), ("c", TensorProto.BOOL))
    )
    model = helper.make_model(helper.make_graph([node], "g", [x, c], [y]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    reference = ReferenceRun([], [], [], 1, {"ran": 3.0, "aux": None}, fold=FoldRun())
    found = with_branches(reference, tmp_path / "m.onnx")
    assert found.sensitivity == {"ran": 3.0, "aux": 0.0 if branches else None}
    assert ("another branch" in found.uncovered_reason.get("aux", "")) is branches


class ReadBehindAGate(nn.Module):
    """Adds what it reads of W only where the image is bright, which these images are not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self._parameters_of_conv()
        gate = (x.mean() > 1e6).to(x.dtype)
        return self.conv(x) + gate * weight.sum()

    def _parameters_of_conv(self) -> Tensor:
        return next(iter(self.conv.parameters()))


class ReadsMetadata(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = next(iter(self.conv.parameters()))
        return self.conv(x.to(weight)) + torch.zeros_like(weight).sum() + weight.shape[0] + self.conv.weight.sum()


@pytest.mark.parametrize(("net", "count"), [(ReadBehindAGate, 1), (ReadsMetadata, 0)])
def test_a_read_of_w_is_seen_though_no_output_shows_it(net: type[nn.Module], count: int) -> None:
    model = trained(net())
    _, runs = run_in_float64(model, fold(model), (IMAGES,))
    assert runs.error <= FUNCTION_TOLERANCE
    assert len(runs.findings) == count
    assert all("reads 'conv.weight (W)' outside" in finding for finding in runs.findings)


class Counting(nn.Module):
    """Its second call gives something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 8, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * self.calls


def test_a_network_that_changes_from_call_to_call_has_no_reference() -> None:
    net = trained(Counting())
    assert "counts in 'calls'" in str(run_in_float64(net, fold(net), (IMAGES,))[1].random)


class Rare(nn.Module):
    """Draws a number, of which the outputs show nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + float(torch.rand(()) > 2)


def test_a_network_that_draws_a_number_has_no_reference() -> None:
    net = trained(Rare())
    assert run_in_float64(net, fold(net), (IMAGES,))[1].random == "it draws from torch's random generator"


def test_a_network_that_is_half_precision_in_part_is_run_in_float64_alone() -> None:
    net = half_in_part()
    _, runs = run_in_float64(net, fold(net), (IMAGES,))
    assert runs.findings == ()
    assert runs.float32_error is None


def half_in_part() -> nn.Module:
    """A float16 convolution before a float32 norm, which float32 images do not fit."""
    net = trained(plain())
    net[0].half()  # type: ignore[index, operator]
    return net
