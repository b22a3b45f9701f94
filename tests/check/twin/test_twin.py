"""The float64 twin passes for a faithful export, to float64's rounding, and for nothing else."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from support import inexact_session, randomize_and_calibrate, varied_images
from torch import Tensor, nn

from doconv_convert import fold, to_doconv
from doconv_convert.artifacts.export import twin as export_twin_module
from doconv_convert.artifacts.export.exporter import export_onnx
from doconv_convert.artifacts.export.job import Flags
from doconv_convert.artifacts.export.twin import export_twin
from doconv_convert.check import onnxruntime_run
from doconv_convert.check.coverage import check_coverage
from doconv_convert.check.outputs import reruns
from doconv_convert.check.outputs.compare import COVERED_ABOVE, TWIN_BOUND
from doconv_convert.check.outputs.expected import FoldRun, ReferenceRun
from doconv_convert.check.proof import prove
from doconv_convert.check.status import Proof, Status
from doconv_convert.check.torch_runs.reference_run import reference_run
from doconv_convert.check.twin.evaluate import evaluate, meant, widened
from doconv_convert.check.twin.status import Twin, check_twin, settled
from doconv_convert.errors import DoconvError

FOLDED = Status("fold", "passed", "kernels agree")
IMAGES = varied_images(3, 3, 24, 24, seed=5)  # no power of two: onnxruntime's DFT is off


class Everything(nn.Module):
    """A convolution with a batch norm, one in the Fourier domain, a Python number, a small epsilon, a Gelu."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.spectrum, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(8, 4, 3, groups=4, stride=2)
        self.layer = nn.LayerNorm(24, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        wave = torch.fft.rfft2(x)
        wave = torch.view_as_complex(
            self.spectrum(torch.cat([wave.real, wave.imag], 1))
            .reshape(-1, 8, 2, 24, 13)
            .permute(0, 1, 3, 4, 2)
            .contiguous()
        )
        x = x + torch.fft.irfft2(wave, s=(24, 24))
        return self.last(nn.functional.gelu(self.layer(x) * 3**-0.5))


@dataclass
class Exported:
    candidate: Path
    twin: Path
    reference: ReferenceRun

    def prove(self, candidate: Path | None = None, twin: Path | None = None) -> Proof:
        given = Twin(twin or self.twin)
        return prove(candidate or self.candidate, self.candidate, self.reference, FOLDED, twin=given)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("twin")
    torch.manual_seed(0)
    trained = randomize_and_calibrate(to_doconv(Everything()), IMAGES, seed=1).eval()
    folded = fold(trained)
    export_onnx(folded, (IMAGES[:2],), folder / "m.onnx")
    assert export_twin(copy.deepcopy(folded), (IMAGES[:2],), folder / "twin.onnx", Flags()) is None
    return Exported(
        folder / "m.onnx", folder / "twin.onnx", reference_run(trained, copy.deepcopy(folded), (IMAGES,), 3)
    )


def state_of(proof: Proof, name: str) -> Status:
    return next(status for status in proof.statuses if status.name == name)


def test_a_faithful_export_passes_with_the_runtime_s_operator_named(exported: Exported) -> None:
    proof = exported.prove()
    assert proof.proven, proof.statuses
    twin, outputs = state_of(proof, "twin"), state_of(proof, "outputs")
    assert "correctly rounded" in twin.detail
    assert proof.loose == ("DFT",)
    assert "DFT (off by" in outputs.detail
    without = prove(exported.candidate, exported.candidate, exported.reference, FOLDED)
    assert without.state("twin") == "not checked"
    assert without.state("outputs") == "failed"  # the runtime's rounding, which only the twin tells from a fault


def one_weight(model: ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "last.weight")
    array = numpy_helper.to_array(tensor).copy()
    array.flat[3] *= 1 + 1e-6
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def every_weight(model: ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "spectrum.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1 + 1e-5), tensor.name))


def an_epsilon(model: ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(one for one in node.attribute if one.name == "epsilon").f = 1.001e-3


def a_direction(model: ModelProto) -> None:
    node = [node for node in model.graph.node if node.op_type == "DFT"][-1]
    attribute = next((one for one in node.attribute if one.name == "inverse"), None)
    node.attribute.append(helper.make_attribute("inverse", 1)) if attribute is None else setattr(attribute, "i", 0)


def another_operator(model: ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Gelu").attribute.append(
        helper.make_attribute("approximate", "tanh")
    )


def a_new_node(model: ModelProto) -> None:
    last = model.graph.node[-1]
    last.output[0], name = "inner", last.output[0]
    model.graph.node.append(helper.make_node("Identity", ["inner"], [name]))


FAULTS = [one_weight, every_weight, an_epsilon, a_direction, another_operator, a_new_node]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_changed_file_never_passes_by_the_runtime_s_rounding(
    fault: Callable[[ModelProto], None], exported: Exported, tmp_path: Path
) -> None:
    model = onnx.load(exported.candidate)
    before = model.SerializeToString()
    fault(model)
    assert model.SerializeToString() != before
    onnx.save(model, tmp_path / "m.onnx")
    proof = exported.prove(tmp_path / "m.onnx")
    failed = {status.name for status in proof.statuses if status.state == "failed"}
    # what the exporter computes is held to four roundings of a tensor's largest value, its bytes to the baseline's
    assert {"graph"} | ({"twin"} if fault is not one_weight else set()) <= failed
    assert proof.loose == ()  # the road was not taken


@pytest.mark.parametrize("fault", [every_weight, an_epsilon, another_operator])
def test_an_exporter_s_fault_is_seen_where_float32_hides_it(
    fault: Callable[[ModelProto], None], exported: Exported, tmp_path: Path
) -> None:
    """Both files have the fault, so the graphs agree: the float64 outputs alone tell."""
    for name, path in (("m", exported.candidate), ("twin", exported.twin)):
        model = onnx.load(path)
        if name == "twin" and fault is every_weight:
            tensor = next(t for t in model.graph.initializer if t.name == "spectrum.weight")
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * (1 + 1e-5), tensor.name))
        else:
            fault(model)
        onnx.save(model, tmp_path / f"{name}.onnx")
    status, error = check_twin(Twin(tmp_path / "twin.onnx"), tmp_path / "m.onnx", exported.reference, "passed")
    assert status.state == "failed"
    assert error > 1e3 * TWIN_BOUND


def test_what_cannot_be_had_is_not_run_and_blocks_nothing(exported: Exported) -> None:
    for twin, reference, told in (
        (Twin(None, "because"), exported.reference, "because"),
        (Twin(exported.twin), replace(exported.reference, shipped=()), "no float64 run"),
        (Twin(exported.twin), replace(exported.reference, fold=FoldRun(random="it draws")), "not deterministic"),
    ):
        status, _ = check_twin(twin, exported.candidate, reference, "passed")
        assert status.state == "not run"
        assert told in status.detail
        assert Proof("m", [Status("graph", "passed", ""), status]).proven
    assert not Proof("m", [status]).proven


def test_an_evaluator_that_contradicts_onnxruntime_says_nothing(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_run, "OnnxSession", inexact_session(0.0))
    wrong = replace(exported.reference, shipped=[one * 1.5 for one in exported.reference.shipped])
    failed, error = check_twin(Twin(exported.twin), exported.candidate, wrong, "passed")
    assert failed.state == "failed"
    proof = replace(exported, reference=wrong).prove()
    # outputs fail here for want of a passed twin; where they pass, the twin is not run
    assert proof.state("twin") == "failed"
    checks = exported.prove().outputs
    assert settled(failed, error, Status("outputs", "passed", ""), checks).state == "not run"
    assert settled(failed, 1e-9, Status("outputs", "passed", ""), checks).state == "failed"


def test_numbers_that_attributes_stand_for() -> None:
    for number in (1e-5, 1e-3, 0.01, 0.2, 1 / 6, 0.044715, 1.0, -0.75, 1e-12, 0.1):
        assert meant(float(np.float32(number))) == number


def test_python_s_numbers_are_float64_in_the_twin(exported: Exported) -> None:
    values = [numpy_helper.to_array(t) for t in onnx.load(exported.twin).graph.initializer]
    scalars = {float(value) for value in values if value.size == 1 and value.dtype == np.float64}
    assert 3**-0.5 in scalars
    assert float(np.float32(3**-0.5)) not in scalars


def test_narrow_values_stay_wide() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.FLOAT),
        helper.make_node("ConstantOfShape", ["shape"], ["third"], value=helper.make_tensor("v", 1, [1], [1 / 3])),
        helper.make_node("Add", ["narrow", "third"], ["y"]),
    ]
    known = [numpy_helper.from_array(np.array([1]), "shape")]
    ports = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, [1]) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], known))
    (got,) = evaluate(widened(model), [np.array([1 / 7])])
    assert got.dtype == np.float64
    assert got[0] == 1 / 7 + float(np.float32(1 / 3))


def test_an_operator_that_the_reference_computes_in_float32_is_named() -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in ("x", "grid", "y")]
    node = helper.make_node("GridSample", ["x", "grid"], ["y"], name="warp")
    model = helper.make_model(helper.make_graph([node], "g", ports[:2], ports[2:]))
    with pytest.raises(DoconvError, match="computes the node 'warp' \\(GridSample\\) in float32"):
        evaluate(widened(model), [np.zeros((1, 1, 4, 4)), np.zeros((1, 2, 2, 2))])


def test_coverage_is_asked_of_the_twin() -> None:
    """A kernel whose movement float32's rounding hides, and one that moves nothing."""

    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.faint, self.dead = (nn.Conv2d(3, 4, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.loud(x) + 1e-6 * self.faint(x) + (self.dead(x) - 1e3).relu()

    torch.manual_seed(0)
    net = to_doconv(Faint()).eval()
    with torch.no_grad():
        for layer in (net.loud, net.faint, net.dead):
            layer.D.normal_(std=0.1)
    reference = reference_run(net, fold(net), (IMAGES,), 3)
    assert not reference.sensitivity["faint"] > COVERED_ABOVE
    assert reference.sharp["faint"] > 100 * COVERED_ABOVE
    assert reference.sharp["dead"] == 0.0
    told = {state: check_coverage(reference, "passed", "passed", 0.0, state) for state in ("passed", "not run")}
    assert "2 of 3 kernels, for 1 of these in float64 alone" in told["passed"].detail
    assert told["passed"].findings == ("'dead' moves nothing, in float64 either: no output depends on it",)
    assert "1 of 3 kernels" in told["not run"].detail
    assert "faint" in told["not run"].findings[0]


def test_reruns_use_the_same_operators(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is wrong in a way no operator explains fails, DFT or not."""
    for module in (onnxruntime_run, reruns):
        monkeypatch.setattr(module, "OnnxSession", inexact_session(2e-5, lambda session: bool(session.wide)))
    assert exported.prove().state("outputs") == "failed"


def test_there_is_no_twin_of_what_torchscript_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_twin_module, "is_or_holds_a_detector", lambda module: True)
    missing = export_twin(nn.Conv2d(3, 4, 3), (IMAGES,), tmp_path / "twin.onnx", Flags())
    assert missing is not None
    assert "TorchScript" in missing
    assert not (tmp_path / "twin.onnx").exists()


def test_a_network_that_does_not_export_in_float64_says_why(tmp_path: Path) -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise TypeError("float32 alone")
            return x + 1

    missing = export_twin(Narrow(), (IMAGES,), tmp_path / "twin.onnx", Flags())
    assert missing is not None
    assert missing.startswith("the network cannot be exported in float64: 'Narrow'")
