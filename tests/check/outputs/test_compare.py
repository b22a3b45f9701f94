"""Outputs: what may pass, and everything that must not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from doconv_convert.check.onnx_files.model import onnx_inputs
from doconv_convert.check.outputs.compare import (
    CEILING,
    FACTOR,
    FLOOR,
    Array,
    OutputCheck,
    bound_for,
    compare_output,
    compare_outputs,
    relative_error,
)
from doconv_convert.check.outputs.session import run_onnx
from doconv_convert.check.torch_runs.exact_start import require_same_start
from doconv_convert.check.torch_runs.float64 import run_float64, run_inputs
from doconv_convert.errors import DoconvError, UsageError

GENERATOR = np.random.default_rng(0)
TRUTH: Array = GENERATOR.standard_normal((3, 10))
PLAIN = TRUTH.astype(np.float32)


def noisy(size: float) -> Array:
    noise = GENERATOR.standard_normal(TRUTH.shape)
    return (TRUTH + size * noise * np.linalg.norm(TRUTH) / np.linalg.norm(noise)).astype(np.float32)


def compare(got: Array, truth: Array = TRUTH, plain: Array = PLAIN, samples: int = 3) -> OutputCheck:
    return compare_output("y", truth, plain, got, samples)


def with_value(value: float) -> Array:
    changed = PLAIN.copy()
    changed[1, 1] = value
    return changed


def test_rounding_passes() -> None:
    check = compare(PLAIN)
    assert check.ok
    assert check.shape == (3, 10)
    assert 0 < check.error == check.plain_error < FLOOR == check.bound
    assert check.largest < 1e-6
    assert check.variation > 0.5


@pytest.mark.parametrize("plain_error", [1e-5, 1e-3])
def test_the_bound_follows_what_plain_torch_is_off(plain_error: float) -> None:
    plain = noisy(plain_error)
    bound = bound_for(relative_error(plain, TRUTH))
    assert bound == pytest.approx(min(FACTOR * plain_error, CEILING), rel=0.01)
    assert compare(noisy(0.9 * bound), plain=plain).ok
    assert "allowed" in str(compare(noisy(1.1 * bound), plain=plain).problem)


@pytest.mark.parametrize(
    ("got", "problem"),
    [
        (with_value(float("nan")), "has 1 of 30 values that are NaN or infinite"),
        (with_value(float("inf")), "has 1 of 30 values that are NaN or infinite"),
        (np.full_like(PLAIN, np.nan), "has 30 of 30 values"),
        (noisy(1e-5), "is off by 1.0e-05 of its scale, allowed"),
        (PLAIN[0], "has shape (10,), expected (3, 10)"),
        (PLAIN[:1], "has shape (1, 10), expected (3, 10)"),
        (PLAIN[:, :1], "has shape (3, 1), expected (3, 10)"),
        (PLAIN[None], "has shape (1, 3, 10)"),
        (PLAIN.astype(np.float16), "has dtype float16, expected float32"),
        (TRUTH, "has dtype float64, expected float32"),
        (PLAIN[:0], "has shape (0, 10)"),
    ],
)
def test_what_must_not_pass(got: Array, problem: str) -> None:
    assert problem in str(compare(got).problem)


def test_a_difference_that_broadcasting_would_hide() -> None:
    truth = np.ones((4, 3))
    assert compare(np.ones(3, np.float32), truth, truth.astype(np.float32)).problem == (
        "has shape (3,), expected (4, 3)"
    )


def test_nan_everywhere_is_no_agreement() -> None:
    nan = np.full((3, 2), np.nan)
    check = compare(nan.astype(np.float32), nan, nan.astype(np.float32))
    assert "not finite in the float64 run" in str(check.problem)
    plain = PLAIN.copy()
    plain[0, 0] = np.nan  # plain torch alone: no bound can be had from it
    assert not compare(PLAIN, plain=plain).ok


def test_an_empty_output_compares_nothing() -> None:
    empty = np.zeros((0, 4))
    check = compare(empty.astype(np.float32), empty, empty.astype(np.float32))
    assert "nothing was compared; pass `input_file`" in str(check.problem)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_output_that_is_the_same_for_every_sample_shows_nothing(value: float) -> None:
    truth = np.full((3, 4), value)
    check = compare(truth.astype(np.float32), truth, truth.astype(np.float32))
    assert "same for every sample" in str(check.problem)
    assert "pass `input_file`" in str(check.problem)
    assert check.variation == 0
    # what is no batch cannot differ between samples
    assert compare(truth.astype(np.float32), truth, truth.astype(np.float32), samples=2).ok is True


def test_integers_are_compared_exactly() -> None:
    labels = np.arange(6).reshape(3, 2)
    assert compare(labels, labels, labels).ok
    changed = labels.copy()
    changed[2, 1] += 1
    assert compare(changed, labels, labels).problem == "differs in 1 of 6 values"
    assert compare(labels.astype(np.int32), labels, labels).problem == "has dtype int32, expected int64"


def test_an_all_zero_truth_has_an_absolute_scale() -> None:
    zero = np.zeros((2, 2))
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 1, zero) == 2
    assert np.isnan(relative_error(zero * np.nan, zero))


def test_a_missing_output_is_an_error() -> None:
    two: Sequence[Array] = [TRUTH, TRUTH]
    assert len(compare_outputs(["a", "b"], two, [PLAIN, PLAIN], [PLAIN, PLAIN], 3)) == 2
    with pytest.raises(DoconvError, match="has 1 outputs, the torch model 2"):
        compare_outputs(["a"], two, [PLAIN, PLAIN], [PLAIN], 3)
    with pytest.raises(DoconvError, match="has 3 outputs, the torch model 2"):
        compare_outputs(["a", "b", "c"], two, [PLAIN, PLAIN], [PLAIN] * 3, 3)


def onnx_file(folder: Path) -> Path:
    """y = x + w on (N, 3), with the weight among the inputs, as old exporters write it."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["n", 3]), value("w", TensorProto.FLOAT, [3])],
        [value("y", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor("w", TensorProto.FLOAT, [3], [1, 2, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def test_onnxruntime_runs_a_file(tmp_path: Path) -> None:
    path = onnx_file(tmp_path)
    assert dict(onnx_inputs(path)) == {"x": (np.dtype("float32"), ["n", 3])}
    names, (got,) = run_onnx(path, [np.zeros((2, 3), np.float32)])
    assert names == ["y"]
    assert got.tolist() == [[1, 2, 3], [1, 2, 3]]


def test_a_file_that_does_not_run_is_an_error_in_words(tmp_path: Path) -> None:
    path = onnx_file(tmp_path)
    with pytest.raises(DoconvError, match=r"cannot run '.*' on x \(2, 4\): "):
        run_onnx(path, [np.zeros((2, 4), np.float32)])
    with pytest.raises(DoconvError, match="takes 1 inputs"):
        run_onnx(path, [np.zeros((2, 3), np.float32)] * 2)
    path.write_bytes(b"nonsense")
    with pytest.raises(DoconvError, match="onnxruntime cannot load"):
        run_onnx(path, [])


class AsksForFloat32(nn.Module):
    """Like RAFT: its own code makes and asks for float32 in every usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> dict[str, Any]:
        grid = torch.arange(x.shape[-1], device=x.device).float() / 3
        mask = torch.zeros(x.shape[-1], dtype=torch.float32).to(torch.float32) + torch.tensor(0.1)
        y = self.conv(x.float()) + self.conv((grid + mask + x).to(dtype=torch.float32))
        y = y + x.half().mean() + x.type(torch.float32).mean()
        self.seen = [grid.dtype, mask.dtype, y.dtype]
        return {"flow": y, "count": torch.tensor(3), "nested": [y * 2]}


# Two float64 runs of one small net; run in float32 by mistake it would be off by 1e-7.
SAME_IN_FLOAT64 = 1e-14


def test_a_float64_run_is_one_also_where_float32_is_asked_for() -> None:
    model = AsksForFloat32()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x = torch.randn(2, 2, 5, 5)
    flow, count, nested = run_float64(model, (x,))
    assert {flow.dtype, nested.dtype} == {torch.float64}
    assert count.dtype == torch.int64
    kernel, bias, wide = before["conv.weight"].double(), before["conv.bias"].double(), x.double()
    grid = torch.arange(5, dtype=torch.float64) / 3 + 0.1
    expected = sum(nn.functional.conv2d(z, kernel, bias) for z in (wide, grid + wide)) + 2 * wide.mean()
    assert relative_error(flow.numpy(), expected.numpy()) < SAME_IN_FLOAT64
    # the model is as it was, and so is torch
    assert model.training
    assert model.seen == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.get_default_dtype() == torch.float32
    assert model(x)["flow"].dtype == torch.float32


def test_a_model_that_cannot_run_in_float64_is_an_error_and_torch_is_as_before() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is torch.float64:
                raise TypeError("single precision only")
            return x

    with pytest.raises(DoconvError, match=r"Refuses does not run in float64.*single precision only"):
        run_float64(Refuses(), (torch.ones(1),))
    assert torch.get_default_dtype() == torch.float32


def test_wrong_inputs_are_told_by_their_shape() -> None:
    with pytest.raises(UsageError, match=r"Conv2d does not run on inputs of shape \(1, 3, 8, 8\).*`input_shapes`"):
        run_inputs(nn.Conv2d(2, 2, 3), (torch.zeros(1, 3, 8, 8),))


def test_the_start_check() -> None:
    class Net(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Any:
            return x + self.value if self.value else None

    inputs = (torch.zeros(2),)
    require_same_start(Net(1.0), Net(1.0), inputs)
    with pytest.raises(DoconvError, match="outputs differ from the original's"):
        require_same_start(Net(1.0), Net(1.0000001), inputs)
    with pytest.raises(DoconvError, match="its own outputs are NaN or infinite"):
        require_same_start(Net(float("nan")), Net(float("nan")), inputs)
    with pytest.raises(DoconvError, match="has no tensor outputs"):
        require_same_start(Net(0.0), Net(0.0), inputs)
