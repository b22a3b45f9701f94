"""Sums and sigmoids in float64: what is the runtime's rounding passes, and nothing else does."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from support import inexact_session
from torch import Tensor, nn

from doconv_convert.artifacts.export.exporter import export_onnx
from doconv_convert.check import onnxruntime_run
from doconv_convert.check.onnxruntime_run import check_outputs
from doconv_convert.check.outputs import reruns
from doconv_convert.check.outputs.compare import FLOOR, ONNX_BOUND, Array, relative_error
from doconv_convert.check.outputs.expected import ReferenceRun
from doconv_convert.check.outputs.float64_copy import LOOSE, in_float64
from doconv_convert.check.outputs.session import OnnxSession
from doconv_convert.check.status import Status
from doconv_convert.check.torch_runs.reference_run import reference_run

IMAGES = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
# What a float64 value loses in the cast to float32.
ONE_ROUNDING = 2.0**-24
# As far as onnxruntime's sums were off in efficientnet_b7: beyond the bound of a shallow net, far below ONNX_BOUND.
RUNTIME_ERROR = 1e-5


class Gated(nn.Module):
    """A squeeze-and-excitation block: a mean and a Sigmoid decide over the features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReferenceRun]:
    torch.manual_seed(0)
    model, path = Gated().eval(), tmp_path_factory.mktemp("gated") / "m.onnx"
    export_onnx(model, (IMAGES[:2],), path, output_names=["out"])
    return path, reference_run(model, model, (IMAGES,), 3)


def model_of(operator: str, opset: int = 18) -> ModelProto:
    """The operator on x, and once more in a subgraph."""
    axes = [] if operator == "Sigmoid" else ["axes"]
    empty = helper.make_empty_tensor_value_info
    branch = helper.make_graph([helper.make_node(operator, ["x", *axes], ["inner"])], "branch", [], [empty("inner")])
    nodes = [
        helper.make_node(operator, ["x", *axes], ["y"]),
        helper.make_node("If", ["always"], ["z"], then_branch=branch, else_branch=branch),
    ]
    known = [
        numpy_helper.from_array(np.array([2, 3]), "axes"),
        numpy_helper.from_array(np.array(True), "always"),
    ]
    shape = [2, 4, 300, 300]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [x], [empty("y"), empty("z")], known)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def in_numpy(operator: str, x: Array) -> Array:
    wide = x.astype(np.float64)
    functions = {
        "ReduceMean": lambda: wide.mean((2, 3), keepdims=True),
        "ReduceSum": lambda: wide.sum((2, 3), keepdims=True),
        "ReduceSumSquare": lambda: np.square(wide).sum((2, 3), keepdims=True),
        "ReduceL2": lambda: np.sqrt(np.square(wide).sum((2, 3), keepdims=True)),
        "ReduceLogSumExp": lambda: np.log(np.exp(wide).sum((2, 3), keepdims=True)),
        "Sigmoid": lambda: 1 / (1 + np.exp(-wide)),
    }
    return functions[operator]()


@pytest.mark.parametrize("operator", sorted(LOOSE))
def test_a_loose_operator_is_exact_in_the_copy(tmp_path: Path, operator: str) -> None:
    model = model_of(operator)
    before = model.SerializeToString()
    onnx.save(in_float64(model), tmp_path / "copy.onnx")
    assert model.SerializeToString() == before
    onnx.save(model, tmp_path / "m.onnx")
    x = (np.random.default_rng(0).standard_normal((2, 4, 300, 300)) + 0.5).astype(np.float32)
    truth = in_numpy(operator, x)
    for session in (OnnxSession(tmp_path / "copy.onnx"), OnnxSession(tmp_path / "m.onnx", wide=LOOSE)):
        for got in session.run([x]):
            assert got.dtype == np.float32
            assert relative_error(got, truth) <= ONE_ROUNDING


def test_before_castlike_the_copy_is_the_model() -> None:
    assert in_float64(model_of("Sigmoid", opset=14)) == model_of("Sigmoid", opset=14)
    assert in_float64(model_of("Sigmoid", opset=15)) != model_of("Sigmoid", opset=15)


def test_weights_in_another_file_are_found(
    gated: tuple[Path, ReferenceRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reference = gated
    (tmp_path / "sub").mkdir()
    onnx.save(onnx.load(path), tmp_path / "sub" / "m.onnx", save_as_external_data=True, size_threshold=0)
    monkeypatch.chdir(tmp_path)
    (got,) = OnnxSession(Path("sub/m.onnx"), wide=LOOSE).run(reference.inputs)
    assert relative_error(got, reference.truth[0]) < FLOOR


def inexact(monkeypatch: pytest.MonkeyPatch, *error: Any) -> None:
    for module in (onnxruntime_run, reruns):
        monkeypatch.setattr(module, "OnnxSession", inexact_session(*error))


def checked(gated: tuple[Path, ReferenceRun]) -> Status:
    return check_outputs(*gated)[0]


def test_the_runtimes_rounding_is_told_from_a_fault(
    gated: tuple[Path, ReferenceRun], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exact = checked(gated)
    assert exact.state == "passed"
    assert "float64" not in exact.detail
    inexact(monkeypatch, RUNTIME_ERROR)
    caplog.set_level("INFO", "doconv_convert")
    status, (check,) = check_outputs(*gated)
    assert ["once more in float64" in record.getMessage() for record in caplog.records] == [True]
    assert status.state == "passed"
    assert (
        "; sums and sigmoids computed in float64, since in float32 'out' is off by 1.0e-05 of its scale"
        in status.detail
    )
    assert check.error < FLOOR


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (2 * ONNX_BOUND, lambda session: not session.wide),  # no rounding is as large
        (float("nan"), lambda session: not session.wide),
        (RUNTIME_ERROR, lambda session: True),  # not for want of precision
    ],
)
def test_what_no_rounding_explains_fails(
    gated: tuple[Path, ReferenceRun], monkeypatch: pytest.MonkeyPatch, error: float, where: Any
) -> None:
    inexact(monkeypatch, error, where)
    assert checked(gated).state == "failed"


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_changed_by_a_thousandth_is_caught_under_the_runtimes_rounding(
    gated: tuple[Path, ReferenceRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    path, reference = gated
    model = onnx.load(path)
    kernel = [one for one in model.graph.initializer if len(one.dims) == 4][index]
    values = numpy_helper.to_array(kernel)
    changed = values * (1 + 1e-3 * np.random.default_rng(0).standard_normal(values.shape).astype(np.float32))
    kernel.CopyFrom(numpy_helper.from_array(changed, kernel.name))
    onnx.save(model, tmp_path / "damaged.onnx")
    assert check_outputs(tmp_path / "damaged.onnx", reference)[0].state == "failed"
    inexact(monkeypatch, RUNTIME_ERROR)
    assert check_outputs(tmp_path / "damaged.onnx", reference)[0].state == "failed"
