"""`verify NEW.onnx --against OLD.onnx`: equal outputs with other weights are equivalent at most, never proven."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper
from support_cli import run_cli

Weights = dict[str, npt.NDArray[np.float32]]

SIZE = 16


def weights() -> Weights:
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> npt.NDArray[np.float32]:
        return (generator.standard_normal(shape) * 0.2).astype(np.float32)

    return {
        "stem": draw(8, 3, 3, 3),
        "gate": draw(8, 3, 3, 3),
        "gate_bias": np.full(8, -8, np.float32),  # closed for N(0, 1)
        "bright": draw(8, 8, 3, 3),
        "dark": draw(8, 8, 3, 3),
        "threshold": np.array(50, np.float32),
        "unused": draw(4),
    }


def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=output, **attributes)


def value(name: str, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


def write(path: Path, held: Weights, stem: npt.NDArray[np.float32] | None = None) -> Path:
    """stem + ReLU(gate), then one of two convolutions by the image's brightness. `stem` is that kernel in a Constant
    node instead of an initializer."""
    pads = [1, 1, 1, 1]
    branches = [
        helper.make_graph([node("Conv", ["sum", name], f"{name}_out", pads=pads)], name, [], [value(f"{name}_out", [])])
        for name in ("bright", "dark")
    ]
    constant = [] if stem is None else [node("Constant", [], "stem", value=numpy_helper.from_array(stem))]
    nodes = [
        *constant,
        node("Conv", ["image", "stem"], "features", pads=pads),
        node("Conv", ["image", "gate", "gate_bias"], "closed", pads=pads),
        node("Relu", ["closed"], "opened"),
        node("Add", ["features", "opened"], "sum"),
        node("ReduceMean", ["image"], "mean", keepdims=0),
        node("Greater", ["mean", "threshold"], "is_bright"),
        node("If", ["is_bright"], "y", then_branch=branches[0], else_branch=branches[1]),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items() if stem is None or name != "stem"]
    graph = helper.make_graph(
        nodes, "net", [value("image", ["N", 3, SIZE, SIZE])], [value("y", ["N", 8, SIZE, SIZE])], tensors
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.save(model, path)
    return path


def verify(candidate: Path, baseline: Path, *options: str) -> tuple[int, Any]:
    result = run_cli("verify", candidate, "--against", baseline, "--json", *options)
    return result.exit_code, json.loads(result.stdout)


def negated_gate(held: Weights) -> None:
    """Behind a ReLU that N(0, 1) never opens; mirrored too, as the sign alone is one bit."""
    held["gate"] = -held["gate"][::-1].copy()


def untaken_branch(held: Weights) -> None:
    held["bright"] = held["bright"][::-1].copy() * 3


def rounded_to_half(held: Weights) -> None:
    for name in ("gate", "dark", "bright"):  # all four move the outputs beyond two runtimes' rounding
        held[name] = held[name].astype(np.float16).astype(np.float32)


def one_bit(held: Weights) -> None:
    held["stem"].view(np.int32).flat[0] ^= 1


def negative_zero(held: Weights) -> None:
    """Equal as a number, another weight as bytes; outputs agree to the bit."""
    held["gate"][0, 0, 0, 0] = -0.0


def another_bias(held: Weights) -> None:
    held["gate_bias"] -= np.float32(0.5)


def another_threshold(held: Weights) -> None:
    held["threshold"] = np.array(51, np.float32)


CHANGES: list[Callable[[Weights], None]] = [
    negated_gate,
    untaken_branch,
    rounded_to_half,
    one_bit,
    negative_zero,
    another_bias,
    another_threshold,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_weights_are_never_proven(tmp_path: Path, change: Callable[[Weights], None]) -> None:
    held = weights()
    if change is negative_zero:
        held["gate"][0, 0, 0, 0] = 0.0
    release = write(tmp_path / "release.onnx", held)
    change(held)
    candidate = write(tmp_path / "candidate.onnx", held)
    assert candidate.read_bytes() != release.read_bytes()
    code, said = verify(candidate, release)
    assert said["proven"] is False
    assert code != 0 or said["failed"] is False
    names = {negated_gate: "gate", untaken_branch: "bright", another_bias: "gate_bias", one_bit: "stem"}
    if change in names:
        assert f"'{names[change]}'" in json.dumps(said), "the weight that differs is not named"


def test_the_same_weights_are_proven(tmp_path: Path) -> None:
    """What the others change is what they fail for."""
    release = write(tmp_path / "release.onnx", weights())
    code, said = verify(write(tmp_path / "candidate.onnx", weights()), release)
    assert (code, said["proven"]) == (0, True)


def test_a_weight_that_no_node_reads_is_no_proof_either(tmp_path: Path) -> None:
    """Nothing computed differs; the files still do, and that is said or counted as other weights."""
    held = weights()
    release = write(tmp_path / "release.onnx", held)
    held["unused"] = held["unused"] + 1
    _, said = verify(write(tmp_path / "candidate.onnx", held), release)
    assert said["proven"] is False or "unused" in json.dumps(said)


def test_another_kernel_in_a_constant_node_is_another_weight(tmp_path: Path) -> None:
    held = weights()
    release = write(tmp_path / "release.onnx", held, held["stem"])
    nearly = held["stem"].copy()
    nearly.view(np.int32).flat[0] ^= 1
    code, said = verify(write(tmp_path / "candidate.onnx", held, nearly), release)
    assert said["proven"] is False
    code, said = verify(write(tmp_path / "again.onnx", held, held["stem"]), release)
    assert (code, said["proven"]) == (0, True)


def test_outputs_that_differ_fail(tmp_path: Path) -> None:
    held = weights()
    release = write(tmp_path / "release.onnx", held)
    held["dark"] = held["dark"] * np.float32(1.01)
    code, said = verify(write(tmp_path / "candidate.onnx", held), release)
    assert (code, said["proven"], said["failed"]) == (3, False, True)


def test_own_samples_do_not_make_other_weights_proven(tmp_path: Path) -> None:
    """Not even where they open the gate and the changed branch is the one not taken."""
    held = weights()
    release = write(tmp_path / "release.onnx", held)
    held["dark"] = held["dark"][::-1].copy()
    candidate = write(tmp_path / "candidate.onnx", held)
    noise = np.random.default_rng(1).standard_normal((2, 3, SIZE, SIZE))
    np.save(tmp_path / "bright.npy", (60 + 5 * noise).astype(np.float32))
    _, said = verify(candidate, release, "--input", str(tmp_path / "bright.npy"))
    assert said["proven"] is False
