"""What has to be said beside yes or no: a branch that never ran, a model that float32 cannot compute, an output that
is no tensor, a layer whose size a norm takes back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from adversarial.harness import SAME, Seen, far, fold_command, fresh_inputs, run_file, source_of, trained
from support import outputs
from support_cli import run_cli
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

CONTROL = "unrepeatable.Control"


def fold_trained(live: nn.Module, net: str, folder: Path, *options: str) -> Seen:
    torch.save(live.state_dict(), folder / "trained.pth")
    return fold_command(folder / "trained.pth", source_of(net), folder / "out.onnx", *options)


@pytest.mark.zoo
def test_a_kernel_in_a_branch_not_taken_is_uncovered(tmp_path: Path) -> None:
    """It is in the file: 'only runs in training' is false, and --min-coverage 1.0 must not pass."""
    live = trained("hidden.Branch")
    seen = fold_trained(live, "hidden.Branch", tmp_path)
    assert "only runs in training" not in seen.words
    assert not seen.proven or "'bright'" in seen.words
    seen = fold_trained(live, "hidden.Branch", tmp_path, "--min-coverage", "1.0")
    assert seen.code != 0
    assert not seen.proven


@pytest.mark.zoo
def test_a_blind_kernel_does_not_pass_a_full_coverage(tmp_path: Path) -> None:
    seen = fold_trained(trained("hidden.Gated"), "hidden.Gated", tmp_path, "--min-coverage", "1.0")
    assert (seen.code, seen.proven) == (3, False)
    assert "'bright'" in seen.reason


@torch.no_grad()
def rescale(net: nn.Module, factor: float) -> None:
    """W x factor and D^ / factor: the same kernel, by other numbers."""
    for layer in net.modules():
        d = getattr(layer, "D", None)
        if d is not None:
            identity = torch.eye(d.shape[1], d.shape[2])
            layer._parameters["weight"].mul_(factor)
            d.copy_((identity + d) / factor - identity)


def figures(words: str) -> list[float]:
    return [float(text) for text in re.findall(r"\d(?:\.\d+)?e[-+]\d+", words)]


@torch.no_grad()
def test_a_model_that_float32_cannot_compute_is_told_so(tmp_path: Path) -> None:
    """The file is right and 3e-4 from the fp32 model that was validated: that figure stands in what is said."""
    live = trained(CONTROL)
    rescale(live, 1e4)
    seen = fold_trained(live, CONTROL, tmp_path)
    inputs = fresh_inputs(torch.float32)
    plain = [outputs(live(x)) for x in inputs]
    exact = [outputs(live.double()(x.double())) for x in inputs]
    rounding = far(plain, exact)
    assert rounding > 10 * SAME, "float32 computes this net well: nothing to say"
    if seen.proven:
        assert far(run_file(tmp_path / "out.onnx", inputs), exact) <= SAME
        assert any(rounding / 4 < figure < rounding * 4 for figure in figures(seen.words)), seen.words
    else:
        assert "float32" in seen.reason or "fp32" in seen.reason


@pytest.mark.zoo
@torch.no_grad()
def test_small_weights_and_large_factors_are_no_reason(tmp_path: Path) -> None:
    live = trained(CONTROL)
    rescale(live, 1e-4)
    seen = fold_trained(live, CONTROL, tmp_path)
    assert seen.proven, seen.reason
    inputs = fresh_inputs(torch.float32)
    exact = [outputs(live.double()(x.double())) for x in inputs]
    assert far(run_file(tmp_path / "out.onnx", inputs), exact) <= SAME


@torch.no_grad()
def test_a_kernel_beyond_float32_is_refused(tmp_path: Path) -> None:
    live = trained(CONTROL)
    for name, parameter in live.named_parameters():
        if name.startswith("enc."):
            parameter.mul_(1e25)
    seen = fold_trained(live, CONTROL, tmp_path)
    assert not seen.proven
    assert seen.crash is None
    assert "finite" in seen.reason
    assert "'enc" in seen.reason


def rehearse(net: str) -> tuple[int, Any]:
    result = run_cli("rehearse", source_of(net), "--json")
    return result.exit_code, json.loads(result.stdout)["models"][0]


@pytest.mark.zoo
@pytest.mark.parametrize("net", ["objects.Registered", "hidden.InPlace"])
def test_a_right_net_passes_its_rehearsal(net: str) -> None:
    code, said = rehearse(net)
    assert (code, said["status"]) == (0, "passed"), said["steps"]


@pytest.mark.zoo
@pytest.mark.parametrize("net", ["unrepeatable.Noise", "unrepeatable.Dropout", "unrepeatable.CallCount"])
def test_a_rehearsal_names_a_net_that_differs_from_itself(net: str) -> None:
    code, said = rehearse(net)
    assert code != 0
    assert said["status"] != "passed"
    assert re.search(r"itself|repeat|random", json.dumps(said["steps"]))
