"""`fold --onnx` from end to end: proven, one file, what was asked for, and a plain model that anybody can load."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, load_model
from support import build_model, difference, sample_source, signature, varied_images
from support_cli import names, run_cli, tiny, tiny_file, trained_sample, trained_tiny, write_model, write_sample
from support_foreign import rebuild, wrapped
from torch import nn

from doconv_convert import fold, to_doconv
from doconv_convert.artifacts.export import onnx_file
from doconv_convert.artifacts.models import SourceModel, find_inputs
from doconv_convert.artifacts.sources.source import parse_source
from doconv_convert.check import status
from doconv_convert.check.torch_runs.reference_run import reference_run
from doconv_convert.workflows import exports
from doconv_convert.workflows import fold as fold_workflow

# Two fp32 implementations of one of these nets; the proof's own bound is about 1e-6.
SAME = 1e-5
# Of the kernels' scale: so far D moves them away from W, or almost any wrong fold would pass.
MOVED = 0.1

CHECKS = ["fold", "graph", "macs", "twin", "outputs", "coverage"]


@pytest.mark.parametrize(
    ("name", "suffix", "d_mul", "options"),
    [
        ("residual", ".pth", "K", []),
        ("grouped", ".pth", "K+3", ["--opset", "18"]),
        ("functional", ".safetensors", "K", ["--input-names", "picture", "--output-names", "scores"]),
        ("tied", ".safetensors", "2K", []),
        ("control_flow", ".pth", "K", []),
    ],
)
def test_a_trained_model_becomes_a_proven_file(
    tmp_path: Path, name: str, suffix: str, d_mul: str, options: list[str]
) -> None:
    trained, original = trained_sample(name, d_mul), build_model(name)
    write_sample(tmp_path / f"a{suffix}", name, d_mul)
    out = tmp_path / "out"
    out.mkdir()
    result = run_cli(
        *("fold", tmp_path / f"a{suffix}", "--model", sample_source(name)),
        *("--onnx", out / "m.onnx", "-o", out / "plain.safetensors", "--json", *options),
    )
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["proven"] is True
    assert [(status["name"], status["state"]) for status in said["proof"]["statuses"]] == [
        (check, "passed") for check in CHECKS
    ]
    coverage = said["proof"]["statuses"][-1]
    assert len(coverage["findings"]) == sum(
        value is None or value <= 1 for value in said["proof"]["sensitivity"].values()
    )
    assert set(said["folded"]) <= set(said["proof"]["sensitivity"])
    assert names(out) == ["m.certificate.json", "m.onnx", "m.reference.npz", "plain.safetensors"]
    assert run_cli("verify", out / "m.onnx", "--certificate", out / "m.certificate.json").exit_code == 0

    model = onnx.load(out / "m.onnx")
    assert model.opset_import[0].version == said["export"]["opset"]
    assert "--opset" not in options or said["export"]["opset"] == 18
    assert said["export"]["dynamic_batch"] is True
    if "--input-names" in options:
        assert (model.graph.input[0].name, model.graph.output[0].name) == ("picture", "scores")
    session = onnxruntime.InferenceSession(out / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = varied_images(batch, 3, 32, 32, seed=3)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert difference(torch.from_numpy(got), trained(x)) < SAME

    load_model(original, out / "plain.safetensors", strict=True)
    assert signature(original) == signature(build_model(name))
    with torch.no_grad():
        assert difference(original(x), trained(x)) < SAME
    state = trained.state_dict()
    for kernel in said["folded"]:
        key = f"{kernel}.weight" if f"{kernel}.weight" in state else kernel
        assert difference(original.state_dict()[key], state[key]) > MOVED


def plain_file(folder: Path) -> tuple[Path, list[Any]]:
    write_model(tiny(folder), folder / "a.pth")
    return folder / "a.pth", ["--model", f"{tiny_file(folder)}:tiny"]


def test_a_plain_checkpoint_has_nothing_to_fold(tmp_path: Path) -> None:
    path, options = plain_file(tmp_path)
    result = run_cli("fold", path, *options, "-o", tmp_path / "plain.safetensors")
    assert result.exit_code == 0
    assert "has no D: a plain checkpoint, nothing to fold" in result.stdout.replace("\n", " ")
    state = tiny(tmp_path).state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in load_file(tmp_path / "plain.safetensors").items())


def test_a_checkpoint_whose_every_d_is_zero_says_so(tmp_path: Path) -> None:
    """A fact, not an error: the optimizer may have known no D, or the layers were frozen on purpose."""
    write_model(to_doconv(tiny(tmp_path)), tmp_path / "zero.pth")
    write_model(trained_tiny(tmp_path), tmp_path / "trained.pth")
    foreign = rebuild(tiny(tmp_path))
    for name, parameter in foreign.named_parameters():
        if name.endswith(".D"):
            nn.init.zeros_(parameter)
    torch.save(wrapped(foreign), tmp_path / "foreign.pth")
    model = ["--model", f"{tiny_file(tmp_path)}:tiny"]
    for name, options, expected in (
        ("zero", model, True),
        ("trained", model, False),
        ("foreign", model, True),
        ("foreign", [], True),
    ):
        result = run_cli("fold", tmp_path / f"{name}.pth", *options, "-o", tmp_path / "plain.safetensors", "--json")
        assert result.exit_code == 0, result.stderr
        assert any(note.startswith("No D was trained") for note in json.loads(result.stdout)["notes"]) is expected


def test_folding_what_is_folded_gives_the_same_bytes(tmp_path: Path) -> None:
    write_model(trained_tiny(tmp_path), tmp_path / "a.safetensors")
    options = ["--model", f"{tiny_file(tmp_path)}:tiny"]
    for source, target in (("a", "b"), ("b", "c")):
        result = run_cli("fold", tmp_path / f"{source}.safetensors", *options, "-o", tmp_path / f"{target}.safetensors")
        assert result.exit_code == 0
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


@pytest.mark.parametrize("option", ["--exclude", "--include"])
def test_layers_left_out_of_the_conversion_are_named(tmp_path: Path, option: str) -> None:
    chosen = {"exclude": ["grouped"]} if option == "--exclude" else {"include": ["first", "depthwise"]}
    model = trained_tiny(tmp_path, **chosen)
    write_model(model, tmp_path / "a.pth")
    command = ["fold", tmp_path / "a.pth", "--model", f"{tiny_file(tmp_path)}:tiny", "-o", tmp_path / "b.safetensors"]
    assert run_cli(*command).exit_code == 1
    globs = chosen[option.removeprefix("--")]
    result = run_cli(*command, *(word for glob in globs for word in (option, glob)))
    assert result.exit_code == 0, result.stderr
    expected = fold(model).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(tmp_path / "b.safetensors").items())


@pytest.fixture
def no_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporting children are replaced by one that writes a constant for a file, and the checks by `prove`'s."""

    def export(jobs: Any, **_: Any) -> Any:
        reports = []
        for job in jobs:
            job.path.write_bytes(b"a model")
            reports.append(exports.ExportReport(str(job.path), 20, [], [], "dynamo", True, False))
        return reports

    monkeypatch.setattr(exports, "export_in_child", export)
    monkeypatch.setattr(onnx_file, "_data_files", lambda path: set())


@pytest.mark.usefixtures("no_exports")
@pytest.mark.parametrize("state", ["passed", "failed"])
def test_a_failed_check_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    path, options = plain_file(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "m.onnx").write_bytes(b"old")
    (out / "plain.safetensors").write_bytes(b"old")
    found = status.Status("graph", state, "the graph was looked at", ("one difference",))  # type: ignore[arg-type]
    monkeypatch.setattr(fold_workflow, "prove", lambda candidate, *_, **__: status.Proof(str(candidate), [found]))
    result = run_cli("fold", path, *options, "--onnx", out / "m.onnx", "-o", out / "plain.safetensors")
    assert result.exit_code == (0 if state == "passed" else 3)
    assert f"proven: {str(state == 'passed').lower()}" in result.stdout
    assert ("nothing was written: a check failed" in result.stdout) is (state == "failed")
    assert ((out / "m.onnx").read_bytes() == b"old") is (state == "failed")
    assert ((out / "plain.safetensors").read_bytes() == b"old") is (state == "failed")
    assert names(out) == ["m.onnx", "plain.safetensors"]


@pytest.mark.usefixtures("no_exports")
def test_without_verification_nothing_counts_as_proven(tmp_path: Path) -> None:
    path, options = plain_file(tmp_path)
    result = run_cli("fold", path, *options, "--onnx", tmp_path / "m.onnx", "--no-verify", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["proven"] is False
    result = run_cli("fold", path, *options, "--onnx", tmp_path / "m.onnx", "--no-verify")
    assert "proven: false" in result.stdout
    assert "proven: true" not in result.stdout


def test_one_sample_of_the_users_own_is_enough(tmp_path: Path) -> None:
    """The batch that is compared is made from it, and its samples differ."""
    model, own = trained_tiny(tmp_path), varied_images(1, 2, 6, 6).double().numpy()
    np.save(tmp_path / "x.npy", own)
    inputs = find_inputs(SourceModel(model, parse_source(f"{tiny_file(tmp_path)}:tiny")), None, tmp_path / "x.npy")
    assert inputs is not None
    (x,) = inputs.arguments(3)
    assert x.shape == (3, 2, 6, 6)
    assert x.dtype == torch.float32
    assert torch.equal(x[0], torch.from_numpy(own[0]).float())
    assert 0 < difference(x[1], x[0]) < 0.5
    truth = torch.from_numpy(reference_run(model, fold(model), (x,), 3).truth[0])
    assert difference(truth[1], truth[0]) > SAME
    assert difference(truth[2], truth[1]) > SAME
