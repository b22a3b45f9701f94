"""`--merge` from end to end: fold and prove, verify, from ONNX to ONNX, the linter, and damage that each must find."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, numpy_helper
from support_branches import DBB, Net, RepVGG, trained
from support_cli import ROOT, names, run_cli, run_python

from doconv_convert import to_doconv
from doconv_convert.check.certificate.certificate import SCHEMA
from doconv_convert.check.macs.counting import count_macs
from doconv_convert.check.merged import Merged, check_merged_graph, value_hash
from doconv_convert.check.outputs.compare import relative_error
from doconv_convert.check.outputs.session import run_onnx
from doconv_convert.check.proof import check_macs

NET = f"""
import sys

import torch

sys.path.insert(0, {str(ROOT / "tests")!r})
from support_branches import DBB, Net, RepVGG

INPUT_SHAPE = (1, 3, 12, 12)

def repvgg():
    torch.manual_seed(0)
    return Net(RepVGG)

def dbb():
    torch.manual_seed(0)
    return Net(lambda c: DBB(c, wrong=True))
"""
# Two fp32 implementations of a network of this size; the proof's own bound is about 1e-6.
SAME = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained RepVGG with a D in each block, a trained DBB, the proven merge of the first, and its plain export."""
    folder = tmp_path_factory.mktemp("merge")
    (folder / "net.py").write_text(NET)
    torch.manual_seed(0)
    torch.save(trained(to_doconv(Net(RepVGG)), 6).state_dict(), folder / "repvgg.pth")
    torch.manual_seed(0)
    torch.save(trained(Net(lambda c: DBB(c, wrong=True)), 6).state_dict(), folder / "dbb.pth")
    for name, options in (("merged", ["--merge", "branches", "-o", folder / "m.safetensors"]), ("plain", [])):
        result = run_cli("fold", folder / "repvgg.pth", *model(folder), "--onnx", folder / f"{name}.onnx", *options)
        assert result.exit_code == 0, result.stdout + result.stderr
    return folder


def model(folder: Path, factory: str = "repvgg") -> tuple[str, str]:
    return "--model", f"{folder / 'net.py'}:{factory}"


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def states(document: Any) -> dict[str, str]:
    return {status["name"]: status["state"] for status in document["statuses"]}


def test_a_trained_repvgg_is_shipped_with_one_convolution_a_block(folder: Path) -> None:
    assert operators(folder / "merged.onnx").count("Conv") == 3
    assert operators(folder / "plain.onnx").count("Conv") == 5
    assert "BatchNormalization" not in operators(folder / "merged.onnx")
    certificate = json.loads((folder / "merged.certificate.json").read_text())
    jsonschema.validate(certificate, json.loads(SCHEMA.read_text()))
    assert certificate["proven"] is True
    assert certificate["merged"]["merge"] == "branches"
    assert [region["name"] for region in certificate["merged"]["regions"]] == ["blocks.0.merged", "blocks.1.merged"]
    checks = {check["name"]: check["detail"] for check in certificate["checks"]}
    assert "2 linear regions merged, each equal to its own forward in float64" in checks["fold"]
    assert "merged: 2 linear regions of the original's graph, Conv 5 to 3" in checks["graph"]
    assert certificate["macs"]["total"] < count_macs(folder / "plain.onnx").total
    assert "merged" not in json.loads((folder / "plain.certificate.json").read_text())
    assert set(certificate["coverage"]) == {"stem", "blocks.0.merged", "blocks.1.merged"}
    assert run_cli("verify", folder / "merged.onnx", "--certificate", folder / "merged.certificate.json").exit_code == 0


def test_verify_against_the_checkpoint_knows_which_file_is_merged(folder: Path) -> None:
    against = ("--against", folder / "repvgg.pth", *model(folder), "--json")
    merged = run_cli("verify", folder / "merged.onnx", *against, "--merge", "branches")
    assert merged.exit_code == 0, merged.stderr
    plain = run_cli("verify", folder / "plain.onnx", *against, "--merge", "branches")
    assert plain.exit_code == 3
    (graph,) = (status for status in json.loads(plain.stdout)["statuses"] if status["name"] == "graph")
    assert graph["findings"][0].startswith("a linear region is left: ")


def test_what_cannot_be_merged_is_said_and_the_rest_is_proven(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "dbb.onnx"
    result = run_cli("fold", folder / "dbb.pth", *model(folder, "dbb"), "--onnx", target, "--merge", "branches")
    assert result.exit_code == 0, result.stdout
    said = " ".join(result.stdout.split())
    assert "2 linear regions left: a bias before zero padding, which the border would see" in said
    assert "left: 2 (a bias before zero padding" in said
    assert "proven: true" in said


def test_without_merge_it_says_what_is_left(folder: Path, tmp_path: Path) -> None:
    result = run_cli("fold", folder / "repvgg.pth", *model(folder), "-o", tmp_path / "plain.safetensors")
    assert result.exit_code == 0
    assert "2 linear regions with 4 convolutions; --merge branches makes one convolution of each" in result.stdout


def damage_kernel(proto: ModelProto) -> None:
    tensor = next(one for one in proto.graph.initializer if one.name == "blocks.1.merged.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0, 0, 0] += 1e-3
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def drop_bias(proto: ModelProto) -> None:
    conv = next(node for node in proto.graph.node if "blocks.1.merged.weight" in node.input)
    del conv.input[2]


def pad_wrong(proto: ModelProto) -> None:
    conv = next(node for node in proto.graph.node if "blocks.1.merged.weight" in node.input)
    pads = next(one for one in conv.attribute if one.name == "pads")
    pads.ints[:] = [2, 0, 2, 0]


def keep_a_branch(proto: ModelProto) -> None:
    conv = next(node for node in proto.graph.node if "blocks.1.merged.weight" in node.input)
    twin = proto.graph.node.add()
    twin.CopyFrom(conv)
    twin.output[0], twin.name = "branch", "branch"
    total = onnx.helper.make_node("Add", [conv.output[0] + "_", "branch"], [conv.output[0]])
    conv.output[0] += "_"
    nodes = list(proto.graph.node)
    index = nodes.index(conv)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes[: index + 1], nodes[-1], total, *nodes[index + 1 : -1]])


@pytest.mark.parametrize(
    ("damage", "fails"),
    [
        (damage_kernel, {"graph", "outputs"}),
        (drop_bias, {"outputs"}),
        (pad_wrong, {"outputs"}),
        (keep_a_branch, {"graph", "outputs"}),
    ],
)
def test_each_damage_of_a_merged_file_is_found(
    folder: Path, tmp_path: Path, damage: Callable[[ModelProto], None], fails: set[str]
) -> None:
    assert failures(folder, folder / "merged.onnx") == set()
    proto = onnx.load(folder / "merged.onnx")
    damage(proto)
    onnx.save(proto, tmp_path / "damaged.onnx")
    assert fails <= failures(folder, tmp_path / "damaged.onnx")


def failures(folder: Path, candidate: Path) -> set[str]:
    """The checks that fail, of those that need no torch; what was merged as the certificate has it."""
    content = json.loads((folder / "merged.certificate.json").read_text())["merged"]
    tensors = {one.name: numpy_helper.to_array(one) for one in onnx.load(folder / "merged.onnx").graph.initializer}
    values = frozenset(value_hash(array) for name, array in tensors.items() if ".merged." in name)
    merged = Merged(content["merge"], content["regions"], content["left"], values)
    with np.load(folder / "merged.reference.npz") as arrays:
        inputs, truth = [arrays["input_0"]], arrays["output_0"]
    statuses = [
        check_merged_graph(folder / "plain.onnx", candidate, merged),
        check_macs(folder / "plain.onnx", candidate, inputs, fewer=True)[0],
    ]
    off = relative_error(run_onnx(candidate, inputs)[1][0], truth) > SAME
    return {status.name for status in statuses if status.state == "failed"} | ({"outputs"} if off else set())


def test_from_onnx_to_onnx(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "folded.onnx"
    result = run_cli(
        *("fold", folder / "plain.onnx", "--merge", "branches", "-o", target, "--json"),
        *("--input-shape", "3,3,12,12"),
    )
    assert result.exit_code == 0, result.stdout + result.stderr
    document = json.loads(result.stdout)
    assert document["proven"] is True
    assert states(document["proof"]) == dict.fromkeys(("fold", "graph", "macs", "outputs"), "passed")
    before, after = (onnx.load(path) for path in (folder / "plain.onnx", target))
    assert document["nodes"] == [len(before.graph.node), len(after.graph.node)]
    assert operators(target).count("Conv") == 3
    assert [value.name for value in after.graph.output] == [value.name for value in before.graph.output]
    assert after.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert names(tmp_path) == ["folded.onnx"]
    onnx.checker.check_model(after, full_check=True)
    # the road by torch and this one, from the same checkpoint
    x = np.random.default_rng(0).standard_normal((2, 3, 12, 12)).astype(np.float32)
    ours, theirs = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for path in (target, folder / "merged.onnx")
    )
    assert np.abs(ours - theirs).max() < SAME * np.abs(theirs).max()


def test_the_workflow_of_files_imports_no_torch() -> None:
    code = "import sys\nimport doconv_convert.workflows.merge_file\nprint('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "f.onnx"], "say with --merge branches or all what to fold in it"),
        (["--merge", "all"], "an ONNX file takes --merge and -o FILE.onnx"),
        (["--merge", "all", "-o", "plain.safetensors"], "expected a file that ends in .onnx"),
        (["--merge", "all", "-o", "{file}"], "-o names"),
        (["--merge", "all", "-o", "f.onnx", "--onnx", "g.onnx"], "no --model, --onnx and --report"),
    ],
)
def test_wrong_usage_of_an_onnx_file(folder: Path, options: list[str], said: str) -> None:
    result = run_cli("fold", folder / "plain.onnx", *(one.format(file=folder / "plain.onnx") for one in options))
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_the_linter_names_what_is_left_and_what_it_wastes(folder: Path) -> None:
    result = run_cli("flops", folder / "plain.onnx", "--max-regions", "0", "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert len(document["linear_regions"]) == 2
    difference = count_macs(folder / "plain.onnx").total - count_macs(folder / "merged.onnx").total
    assert sum(region["wasted"] for region in document["linear_regions"]) == difference > 0
    text = run_cli("flops", folder / "plain.onnx", "--max-regions", "1")
    assert text.exit_code == 3
    assert "2 linear regions left, 10.37 kMACs wasted" in text.stdout
    assert "too many linear regions: 2, at most 1 are allowed" in text.stdout
    assert run_cli("flops", folder / "plain.onnx", "--max-regions", "2").exit_code == 0
    clean = run_cli("flops", folder / "merged.onnx", "--max-regions", "0", "--json")
    assert clean.exit_code == 0
    assert json.loads(clean.stdout)["linear_regions"] == []
