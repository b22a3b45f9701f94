"""Coverage: the predicted movement is the real one, and a kernel that cannot be seen is not counted as seen."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support import build_model, varied_images
from support_cli import run_cli, tiny_file, trained_tiny, write_model
from torch import Tensor, nn

from doconv_convert import fold
from doconv_convert.artifacts.export.exporter import export_onnx
from doconv_convert.check.coverage import check_coverage
from doconv_convert.check.outputs.compare import COVERED_ABOVE
from doconv_convert.check.proof import prove
from doconv_convert.check.status import Status
from doconv_convert.check.torch_runs.coverage import (
    RELATIVE_CHANGE,
    least_perturbation,
    measure_sensitivity,
    perturbation,
)
from doconv_convert.check.torch_runs.reference_run import reference_run

# Predicted by one random direction against the root mean square of 16 real changes: 0.83 to 1.33 over 20 kernels.
FACTOR = 2.0


def moved(model: nn.Module, inputs: Tensor, kernel: Tensor, seeds: int = 16) -> float:
    """The root mean square distance that real changes of 1e-3 move the output."""
    with torch.no_grad():
        before, plain = kernel.detach().clone(), model(inputs)
        squares = []
        for seed in range(seeds):
            noise = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(100 + seed), dtype=kernel.dtype)
            kernel.copy_(before * (1 + RELATIVE_CHANGE * noise))
            squares.append(float((model(inputs) - plain).square().sum()))
        kernel.copy_(before)
    return math.sqrt(sum(squares) / seeds)


def convolutions(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def seen_blind_unreached(sensitivity: Mapping[str, float | None]) -> tuple[list[str], list[str], list[str]]:
    runs = {name: value for name, value in sensitivity.items() if value is not None}
    seen = [name for name, value in runs.items() if value > COVERED_ABOVE]
    return seen, [name for name in runs if name not in seen], [name for name in sensitivity if name not in runs]


@pytest.mark.parametrize("bound", [1.0, 1e-6])
def test_the_predicted_movement_is_the_real_one(tmp_path: Path, bound: float) -> None:
    for model, inputs in (
        (fold(trained_tiny(tmp_path)), varied_images(8, 2, 6, 6)),
        (build_model("residual"), varied_images(2, 3, 32, 32)),
        (build_model("grouped"), varied_images(2, 3, 32, 32)),
    ):
        model = model.double().eval()
        kernels = convolutions(model)
        sensitivity = measure_sensitivity([model(inputs.double())], [bound], kernels)
        for name, kernel in kernels.items():
            predicted = sensitivity[name]
            assert predicted is not None
            ratio = predicted * bound / moved(model, inputs.double(), kernel)
            assert 1 / FACTOR < ratio < FACTOR, (name, ratio)
            # What just counts as seen, at a sensitivity of COVERED_ABOVE, really leaves the bound.
            assert COVERED_ABOVE / ratio > 1, (name, ratio)


class Branches(nn.Module):
    """A branch that hardly counts, one behind a cut gradient and one for training only."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Conv2d(2, 4, 3)
        self.faint = nn.Conv2d(2, 4, 3)
        self.cut = nn.Conv2d(2, 4, 3)
        self.auxiliary = nn.Conv2d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.main(x) + 1e-9 * self.faint(x) + self.cut(x).detach()
        return y + self.auxiliary(x) if self.training else y


@pytest.fixture
def branches() -> Branches:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Branches().eval()


def test_a_faint_branch_is_blind_though_its_gradient_is_not_zero(branches: Branches) -> None:
    x = varied_images(3, 2, 8, 8)
    gradient = torch.autograd.grad(branches(x).sum(), branches.faint.weight)[0]
    assert gradient.abs().max() > 0
    reference = reference_run(branches, fold(branches), (x,), 3)
    assert seen_blind_unreached(reference.sensitivity) == (["main", "cut"], ["faint"], ["auxiliary"])
    assert not reference.uncovered_reason


def test_a_kernel_behind_a_cut_gradient_is_found_by_changing_it(branches: Branches) -> None:
    x = varied_images(3, 2, 8, 8)
    branches.requires_grad_(True)
    plain = branches(x)
    kernels = {"main": branches.main.weight, "cut": branches.cut.weight}
    sensitivity = measure_sensitivity([plain], [1.0], kernels)
    assert sensitivity["main"] is not None
    assert sensitivity["cut"] is None
    before = branches.cut.weight.clone()
    found = perturbation(lambda: [branches(x)], [plain.detach()], [1.0], branches.cut.weight)
    assert found == pytest.approx(moved(branches, x, branches.cut.weight), rel=FACTOR - 1)
    assert torch.equal(branches.cut.weight, before)
    assert perturbation(lambda: [branches(x)], [plain.detach()], [1.0], branches.auxiliary.weight) is None


def test_a_decision_that_only_some_changes_turn_over_is_not_counted_on() -> None:
    assert least_perturbation({0: 7.0, 1: 0.4, 2: math.inf}.__getitem__) == 0.4
    assert least_perturbation({0: 7.0, 1: None}.__getitem__) is None
    assert least_perturbation({0: 7.0, 1: math.inf, 2: 9.0}.__getitem__) == 7.0


def test_a_change_of_the_outputs_shape_is_seen() -> None:
    kernel = torch.ones(1)
    sizes = iter([torch.zeros(3)])
    assert perturbation(lambda: [next(sizes)], [torch.zeros(2)], [1.0], kernel) == math.inf


def test_the_kernel_comes_back_when_the_run_fails() -> None:
    kernel = torch.ones(1)

    def fail() -> list[Tensor]:
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        perturbation(fail, [], [], kernel)
    assert kernel.item() == 1.0


def test_outputs_with_no_usable_bound_show_nothing() -> None:
    kernel = torch.ones(3, requires_grad=True)
    for bound in (0.0, float("nan")):
        assert measure_sensitivity([kernel * 2], [bound], {"k": kernel}) == {"k": None}


def test_two_outputs_are_not_seen_twice() -> None:
    """The same output n times must not make a kernel n times as visible."""
    kernel = torch.linspace(1, 2, 4096, dtype=torch.float64, requires_grad=True)
    once = measure_sensitivity([kernel * 2], [1.0], {"k": kernel})["k"]
    often = measure_sensitivity([kernel * 2] * 16, [1.0] * 16, {"k": kernel})["k"]
    assert once == pytest.approx(often, rel=0.1)


class Silent(nn.Module):
    """One kernel runs, but its result is thrown away; one runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Conv2d(2, 4, 3)
        self.unused = nn.Conv2d(2, 4, 3)
        self.auxiliary = nn.Conv2d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        y: Tensor = self.main(x)
        return y + self.auxiliary(x) if self.training else y


def test_a_kernel_that_runs_without_effect_is_blind_not_unreached() -> None:
    model = Silent().eval()
    reference = reference_run(model, fold(model), (varied_images(3, 2, 8, 8),), 3)
    assert reference.sensitivity["unused"] == 0.0
    assert seen_blind_unreached(reference.sensitivity) == (["main"], ["unused"], ["auxiliary"])
    assert reference.uncovered_reason == {"unused": "no output depends on it"}


class Chooser(nn.Module):
    """One kernel only decides which position is shown, as an RPN's objectness does."""

    def __init__(self) -> None:
        super().__init__()
        self.shown, self.score = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        best = self.score(x).detach().flatten(1).argmax(1)
        y: Tensor = self.shown(x).flatten(2)
        return y[torch.arange(len(x)), :, best]


def test_a_kernel_that_only_decides_is_named_as_such() -> None:
    torch.manual_seed(3)
    model = Chooser().eval()
    reference = reference_run(model, fold(model), (varied_images(3, 2, 8, 8),), 3)
    assert reference.sensitivity["score"] == 0.0
    assert reference.uncovered_reason == {"score": "it only decides what is shown"}
    status = check_coverage(reference, "passed", "passed")
    assert status.findings == ("'score' moves them by 0 bounds: it only decides what is shown",)
    assert check_coverage(reference, "failed", "passed").state == "failed"


def test_only_coverage_catches_a_fault_in_a_faint_kernel(branches: Branches, tmp_path: Path) -> None:
    """The same wrong kernel in both files: graph, MACs and outputs see nothing, and its gradient is not zero."""
    x = varied_images(3, 2, 8, 8)
    model = fold(branches)
    reference = reference_run(branches, copy.deepcopy(model), (x,), 3)
    with torch.no_grad():
        model.faint.weight.mul_(1.5)
    export_onnx(model, (x[:2],), tmp_path / "m.onnx")
    folded = Status("fold", "passed", "")
    for minimum, states in ((0.0, set()), (0.6, set()), (1.0, {"coverage"})):
        proof = prove(tmp_path / "m.onnx", tmp_path / "m.onnx", reference, folded, min_coverage=minimum)
        assert {status.name for status in proof.statuses if status.state == "failed"} == states
        (status,) = [status for status in proof.statuses if status.name == "coverage"]
        assert [finding.split()[0] for finding in status.findings] == ["'faint'", "'auxiliary'"]
    assert "67% of those that run; `min_coverage` asks for 100%; pass `input_file`" in status.detail
    assert "'auxiliary' only runs in training" in status.findings
    without_graph = check_coverage(reference, "failed", "passed")
    assert without_graph.state == "failed"


def test_min_coverage_on_the_command_line(tmp_path: Path) -> None:
    source = f"{tiny_file(tmp_path)}:tiny"
    write_model(trained_tiny(tmp_path), tmp_path / "t.pth")
    made = run_cli("fold", tmp_path / "t.pth", "--model", source, "--onnx", tmp_path / "m.onnx", "--min-coverage", 1)
    assert made.exit_code == 0, made.stderr
    assert run_cli("fold", tmp_path / "t.pth", "--model", source, "-o", "x", "--min-coverage", 2).exit_code == 2
