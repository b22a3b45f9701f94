"""`flops` as a gate: budgets, dynamic sizes, what is not counted; and what GitHub Actions reads of it."""

import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support_cli import ConfinedHere, run_cli

from doconv_convert.check import confined
from doconv_convert.cli.console import Output
from doconv_convert.cli.github import SHOWN_ROWS, GithubReport

# Each convolution below: 8 x 3 x 3 x 3 weights at 8 x 8 positions.
CONV = 8 * 3 * 9 * 64


@pytest.fixture(autouse=True)
def files_are_read_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "Confined", ConfinedHere)


def write(path: Path, names: tuple[str, ...] = ("conv",), size: int | str = 10, extra: str | None = None) -> Path:
    """Convolutions side by side on one image (batch, 3, size, 10), and an operator that nobody knows."""
    nodes = [helper.make_node("Conv", ["x", "w"], [f"{name}_out"], name=name) for name in names]
    domains = [helper.make_opsetid("", 20)]
    if extra is not None:
        nodes.append(helper.make_node(extra, ["x"], ["z"], domain="mine"))
        domains.append(helper.make_opsetid("mine", 1))
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, size, 10])],
        [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None) for name in names],
        [numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=domains), path)
    return path


def test_the_table_has_macs_and_parameters_of_every_layer(tmp_path: Path) -> None:
    result = run_cli("flops", write(tmp_path / "m.onnx", ("first", "second")))
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["node", "op", "parameters", "MACs"]
    assert [line.split() for line in lines[1:3]] == [[name, "Conv", "216", f"{CONV:,}"] for name in ("first", "second")]
    assert f"27.65 kMACs ({2 * CONV:,} MACs; FLOPs = 2 x MACs)" in result.stdout
    assert "assumed: dimension 'batch' is 1" in result.stdout


@pytest.mark.parametrize(
    ("budget", "code"), [("27.648k", 0), ("27647", 3), ("0.03M", 0), ("1G", 0), ("0", 3), ("27.647 kMACs", 3)]
)
def test_a_budget(tmp_path: Path, budget: str, code: int) -> None:
    path = write(tmp_path / "m.onnx", ("first", "second"))
    assert run_cli("flops", path, "--max", budget).exit_code == code
    result = run_cli("flops", path, "--max", budget, "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["within"] is (code == 0)


def test_a_budget_that_is_no_number_is_wrong_usage(tmp_path: Path) -> None:
    result = run_cli("flops", write(tmp_path / "m.onnx"), "--max", "4.1 GFLOPs")
    assert result.exit_code == 2
    assert "expected MACs such as 4.1G" in result.stderr


def test_a_budget_does_not_hold_while_something_is_uncounted(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", extra="Mystery")
    result = run_cli("flops", path, "--max", "1G")
    assert result.exit_code == 3
    assert "not counted: 1 mine.Mystery" in result.stdout
    assert "--ignore mine.Mystery" in result.stdout
    assert run_cli("flops", path, "--max", "1G", "--ignore", "mine.Mystery").exit_code == 0
    assert run_cli("flops", path).exit_code == 0


def test_a_size_that_only_the_file_states_holds_no_budget(tmp_path: Path) -> None:
    """Behind an operator that is ignored, 16 times smaller than what `--dim` makes of it."""
    path = write(tmp_path / "m.onnx", size="height", extra="Mask")
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("Conv", ["z", "w"], ["last"]))
    model.graph.value_info.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 3, 10, 10]))
    onnx.save(model, path)
    counting = ["flops", path, "--dim", "height=42", "--ignore", "mine.Mask"]
    result = run_cli(*counting, "--json")
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert said["total"] == (40 * 8 + 64) * 8 * 27
    assert said["claimed"] == ["z"]
    assert said["assumed"][-1] == "'z' has the size that the file states; no operator confirms it"
    for asked in (["--max", "1G"], ["--against", path]):
        result = run_cli(*counting, *asked)
        assert result.exit_code == 3
        assert "no operator confirms the sizes that the file states for 'z'; if right: --allow-assumed" in result.stdout
        assert json.loads(run_cli(*counting, *asked, "--json").stdout).get("within", False) is False
        assert run_cli(*counting, *asked, "--allow-assumed").exit_code == 0


def test_what_was_counted_is_said(tmp_path: Path) -> None:
    """A fixed batch is counted whole."""
    path = write(tmp_path / "m.onnx")
    assert f"({CONV:,} MACs; FLOPs = 2 x MACs); one run on x 1x3x10x10" in run_cli("flops", path).stdout
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    onnx.save(model, path)
    result = run_cli("flops", path)
    assert f"({8 * CONV:,} MACs; FLOPs = 2 x MACs); one run on x 8x3x10x10" in result.stdout
    assert json.loads(run_cli("flops", path, "--json").stdout)["inputs"] == {"x": [8, 3, 10, 10]}


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.onnx")
    result = run_cli("flops", tmp_path / "m.onnx")
    assert result.exit_code == 1
    assert "m.onnx' is not a regular file; expected an ONNX file" in result.stderr


def test_small_external_constants_are_read(tmp_path: Path) -> None:
    """A kernel's size through a Reshape whose shape lies outside; not where that is no file of the model's folder."""
    path = write(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node[0].input[1] = "kernel"
    model.graph.node.insert(0, helper.make_node("Reshape", ["w", "shape"], ["kernel"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([8, 3, 3, 3]), "shape"))
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=0)
    assert json.loads(run_cli("flops", path, "--json").stdout)["total"] == CONV
    (tmp_path / "data").rename(tmp_path.parent / "elsewhere")
    (tmp_path / "data").symlink_to(tmp_path.parent / "elsewhere")
    assert json.loads(run_cli("flops", path, "--json").stdout)["uncounted"] == {"Conv": 1}
    (tmp_path / "data").unlink()
    os.mkfifo(tmp_path / "data")
    assert json.loads(run_cli("flops", path, "--json").stdout)["uncounted"] == {"Conv": 1}


def test_dynamic_sizes_are_given_by_name(tmp_path: Path) -> None:
    path, fixed = write(tmp_path / "m.onnx", size="height"), write(tmp_path / "fixed.onnx")
    result = run_cli("flops", path)
    assert result.exit_code == 1
    assert "--dim 'height=224'" in result.stderr
    result = run_cli("flops", path, "--dim", "height=10", "--dim", "batch=3", "--json")
    assert json.loads(result.stdout)["total"] == 3 * CONV
    # a size that one of the two files has
    assert run_cli("flops", path, "--against", fixed, "--dim", "height=10").exit_code == 0
    assert run_cli("flops", path, "--against", fixed, "--dim", "height=11").exit_code == 3
    result = run_cli("flops", path, "--dim", "width=10")
    assert result.exit_code == 2
    assert "no dynamic dimension is named 'width'" in result.stderr
    for text in ("height", "height=", "height=tall", "=3"):
        assert run_cli("flops", path, "--dim", text).exit_code == 2


def test_equal_totals_are_not_equal_nodes(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.onnx", ("one", "two")), write(tmp_path / "b.onnx", ("one", "two"))
    model = onnx.load(b)
    # 4 + 12 kernels instead of 8 + 8
    del model.graph.initializer[:]
    for node, count in zip(model.graph.node, (4, 12), strict=True):
        node.input[1] = f"{node.name}_w"
        kernel = np.ones((count, 3, 3, 3), np.float32)
        model.graph.initializer.append(numpy_helper.from_array(kernel, node.input[1]))
    onnx.save(model, b)
    result = run_cli("flops", b, "--against", a, "--json")
    assert result.exit_code == 3
    said = json.loads(result.stdout)
    assert said["total"] == 2 * CONV
    assert len(said["differences"]) == 2
    assert run_cli("flops", a, "--against", a).exit_code == 0


def test_json_is_another_name_for_its_format(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx")
    documents = [run_cli("flops", path, *options).stdout for options in (["--json"], ["--format", "json"])]
    assert documents[0] == documents[1]
    assert json.loads(documents[0])["unit"] == "MACs"
    assert run_cli("flops", path, "--format", "text").stdout == run_cli("flops", path).stdout
    assert run_cli("flops", path, "--format", "json", "--json").exit_code == 0
    assert run_cli("flops", path, "--format", "github", "--json").exit_code == 2
    assert run_cli("flops", path, "--format", "xml").exit_code == 2


def test_github_gets_annotations_and_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("# Another step's\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    path = write(tmp_path / "m.onnx", ("conv|1",))
    assert run_cli("flops", path, "--format", "github", "--max", "1G").exit_code == 0
    said = summary.read_text()
    assert said.startswith("# Another step's\n")
    assert "| node | op | parameters | MACs |\n| --- | --- | ---: | ---: |" in said
    assert f"| conv&#124;1 | Conv | 216 | {CONV:,} |" in said
    result = run_cli("flops", path, "--format", "github", "--max", "1k")
    assert result.exit_code == 3
    place = str(path).replace(":", "%3A").replace(",", "%2C")
    assert f"::error file={place}::over budget: 13.82 kMACs" in result.stdout.splitlines()[-1]
    assert "over budget" in summary.read_text()[len(said) :]


def test_github_gets_failed_checks_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    a, b = write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx", ("one", "two"))
    result = run_cli("verify", b, "--against", a, "--format", "github")
    assert result.exit_code == 3
    errors = [line for line in result.stdout.splitlines() if line.startswith("::error")]
    assert any("::macs: MACs differ from the original's%0A- total" in line for line in errors)
    assert "| macs | failed |" in (tmp_path / "summary.md").read_text()
    result = run_cli("verify", tmp_path / "absent.onnx", "--against", a, "--format", "github", "--quiet")
    assert result.exit_code == 1
    assert result.stdout.startswith("::error file=")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    assert run_cli("flops", a, "--format", "github").exit_code == 0


def test_an_annotation_is_one_line_and_a_long_table_is_cut() -> None:
    report = GithubReport("a,b:c.onnx")
    assert report.error("100 %\r\n", "two") == r"::error file=a%2Cb%3Ac.onnx::100 %25\r\n%0Atwo"
    report.table(["n"], [[index] for index in range(SHOWN_ROWS + 5)], [0])
    assert "and 5 more" in report.blocks[0]
    assert f"| {SHOWN_ROWS - 1} |" in report.blocks[0]
    assert f"| {SHOWN_ROWS} |" not in report.blocks[0]


def test_plain_tables_fit_the_width_and_lose_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = Output(as_json=False, quiet=False)
    long = "a_very_long_name/" * 12
    out.table(["node", "op", "MACs"], [[long, "com.microsoft.MultiHeadAttention", 1234]], right=[2])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "".join(line[:30].strip() for line in lines[1:])[: len(long)].startswith(long[:30])
    assert "".join(line.split()[0] for line in lines[1:]) == long
    assert lines[1].endswith("1,234")
    out.table(["check", "found"], [["macs", ["one", "two"]]])
    assert capsys.readouterr().out.splitlines() == ["check  found", "macs   one", "       two"]
    monkeypatch.setenv("COLUMNS", "20")  # too narrow for the numbers: longer lines, nothing cut
    out = Output(as_json=False, quiet=False)
    out.table(["layer", "added", "MACs"], [["features.10.expand", 123456789, 987654321]], right=[1, 2])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["features.10.", "123,456,789", "987,654,321"]
    assert lines[2:] == ["expand"]
