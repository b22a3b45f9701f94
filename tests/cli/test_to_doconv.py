"""`to-doconv`: what it writes computes what the original does, and is written only if it does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import equal, run, sample_source, varied_images
from support_cli import names, read_file, run_cli, tiny, tiny_file, trained_tiny, write_model
from torch import nn

from doconv_convert import load, to_doconv
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.check.torch_runs import exact_start
from doconv_convert.workflows import convert


@pytest.mark.parametrize("source", ["torchvision:mobilenet_v2", "torchvision:shufflenet_v2_x0_5", "timm:resnet10t"])
def test_a_zoo_model_comes_back_from_its_file_alone(tmp_path: Path, source: str) -> None:
    for name in ("a", "b"):
        result = run_cli("to-doconv", source, "-o", tmp_path / f"{name}.safetensors", "--seed", "5", "--d-mul", "K+3")
        assert result.exit_code == 0, result.stderr
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded, original = load(tmp_path / "a.safetensors").eval(), build(parse_source(source), seed=5).eval()
    x = varied_images(2, 3, 64, 64)
    assert equal(run(loaded, x), run(original, x))
    assert any(name.endswith(".D") for name in loaded.state_dict())


def test_the_seed_draws_the_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        run_cli("to-doconv", sample_source("digits"), "-o", tmp_path / f"{seed}.safetensors", "--seed", seed)
    first, second = (read_file(tmp_path / f"{seed}.safetensors")[0] for seed in (0, 1))
    assert not torch.equal(first["head.weight"], second["head.weight"])


@pytest.mark.parametrize(
    ("options", "converted"),
    [
        ([], {"first": 9, "grouped": 9, "depthwise": 25}),
        (["--d-mul", "2K"], {"first": 18, "grouped": 18, "depthwise": 50}),
        (["--include", "first"], {"first": 9}),
        (["--exclude", "g*", "--exclude", "depthwise"], {"first": 9}),
        (["--pointwise"], {"first": 9, "grouped": 9, "depthwise": 25, "pointwise": 1}),
        (["--max-d-params", "700"], {"first": 9, "grouped": 9}),
    ],
)
def test_options_choose_the_layers(tmp_path: Path, options: list[str], converted: dict[str, int]) -> None:
    out, source = tmp_path / "a.safetensors", f"{tiny_file(tmp_path)}:tiny"
    result = run_cli("to-doconv", source, "-o", out, "--json", *options)
    assert result.exit_code == 0, result.stderr
    tensors, recipe = read_file(out)
    assert {name.removesuffix(".D"): t.shape[2] for name, t in tensors.items() if name.endswith(".D")} == converted
    assert {site["owner"]: site["d_mul"] for site in recipe["sites"] if site["d_mul"]} == converted
    assert recipe["source"] == {"source": "net.py:tiny", "args": {}}
    said = json.loads(result.stdout)
    assert said["written"] == str(out)
    assert {row["name"] for row in said["plan"]["rows"]} == {"first", "grouped", "depthwise", "pointwise"}


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    source = f"{tiny_file(tmp_path)}:tiny"
    before = names(tmp_path)
    for options in ([], ["-o", tmp_path / "a.safetensors"]):
        result = run_cli("to-doconv", source, "--dry-run", *options)
        assert result.exit_code == 0
        assert "depthwise" in result.stdout
        assert "wrote" not in result.stdout
    assert set(names(tmp_path)) <= {*before, "net.imported", "__pycache__"}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_users_own_weights_are_the_start(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    source = f"{tiny_file(tmp_path)}:tiny"
    plain = build(parse_source(source), seed=9).to(dtype).eval()
    write_model(plain, tmp_path / f"w{suffix}")
    result = run_cli("to-doconv", source, "-o", tmp_path / "a.safetensors", "--weights", tmp_path / f"w{suffix}")
    assert result.exit_code == 0, result.stderr
    loaded = load(tmp_path / "a.safetensors", model=tiny(tmp_path)).eval()
    x = varied_images(2, 2, 6, 6).to(dtype)
    assert equal(run(loaded, x), run(plain, x))
    assert loaded.get_parameter("first.D").dtype == dtype


def test_what_is_converted_already_stays_as_it_is(tmp_path: Path) -> None:
    source = f"{tiny_file(tmp_path)}:tiny"
    write_model(trained_tiny(tmp_path), tmp_path / "a.safetensors", source)
    result = run_cli(
        "to-doconv", source, "--weights", tmp_path / "a.safetensors", "-o", tmp_path / "b.safetensors", "--d-mul", "2K"
    )
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_start_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one bit of one weight."""
    real = convert.convert_copy

    def wrong(*arguments: Any) -> nn.Module:
        converted = real(*arguments)
        with torch.no_grad():
            bias = converted.get_parameter("head.bias")
            bias[0] = torch.nextafter(bias[0], torch.tensor(1.0))
        return converted

    out = tmp_path / "out"
    out.mkdir()
    (out / "a.safetensors").write_bytes(b"old")
    monkeypatch.setattr(convert, "convert_copy", wrong)
    result = run_cli("to-doconv", f"{tiny_file(tmp_path)}:tiny", "-o", out / "a.safetensors")
    assert result.exit_code == 1
    assert "outputs differ from the original's, expected the same bits; nothing was written" in result.stderr
    assert (out / "a.safetensors").read_bytes() == b"old"
    assert names(out) == ["a.safetensors"]


def test_the_check_of_the_start_leaves_the_model_alone(tmp_path: Path) -> None:
    model = tiny(tmp_path).train()
    model.get_submodule("norm").eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    exact_start.require_same_start(model, to_doconv(model), (varied_images(2, 2, 6, 6),))
    assert [m.training for m in model.children()] == [True, False, True, True, True, True]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
