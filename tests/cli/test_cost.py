"""What `to-doconv --dry-run` says of the cost before it is paid."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support_cli import names, run_cli, tiny, tiny_file

from doconv_convert import kernel_macs, plan, to_doconv
from doconv_convert.rewrite.cost import cost

# name: (C_in, C_out, groups, K) of the tiny net's layers with a D, on 6x6 positions
LAYERS = {"first": (2, 8, 1, 9), "grouped": (8, 8, 4, 9), "depthwise": (8, 8, 8, 25)}
POSITIONS = 36


def dry_run(folder: Path, *options: Any) -> Any:
    result = run_cli("to-doconv", f"{tiny_file(folder)}:tiny", "--dry-run", "--json", *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["cost"]


@pytest.mark.parametrize(("d_mul", "factor"), [("K", 1), ("2K", 2)])
@pytest.mark.parametrize("batch", [1, 7])
def test_every_figure_is_the_formulas(tmp_path: Path, d_mul: str, factor: int, batch: int) -> None:
    told = dry_run(tmp_path, "--d-mul", d_mul, "--batch", batch)
    assert told["batch"] == batch
    assert [site["name"] for site in told["sites"]] == list(LAYERS)
    for site in told["sites"]:
        c_in, c_out, groups, k = LAYERS[site["name"]]
        d = factor * k
        added = c_in * k * d + c_out * c_in // groups * (d - k)
        assert site["added_parameters"] == added
        assert site["checkpoint_bytes"] == site["sgd_momentum_bytes"] == 4 * added
        assert site["adam_bytes"] == 8 * added
        assert site["composition_macs"] == d * k * c_in * c_out // groups
        assert site["convolution_macs"] == batch * POSITIONS * c_out * k * c_in // groups
        both = kernel_macs(
            in_channels=c_in, out_channels=c_out, kernel_positions=k, d_mul=d, groups=groups, batch=batch,
            output_volume=POSITIONS,
        )  # fmt: skip
        assert both == site["composition_macs"] + site["convolution_macs"]
    for figure in ("added_parameters", "checkpoint_bytes", "sgd_momentum_bytes", "adam_bytes", "composition_macs"):
        assert told["total"][figure] == sum(site[figure] for site in told["sites"])
    pointwise = batch * POSITIONS * 8 * 8  # has no D, and is paid for all the same
    assert told["total"]["convolution_macs"] == sum(s["convolution_macs"] for s in told["sites"]) + pointwise


def test_the_growth_is_what_training_really_takes(tmp_path: Path) -> None:
    told = dry_run(tmp_path)["total"]
    plain = tiny(tmp_path)
    converted = to_doconv(plain)
    assert (
        sum(p.numel() for p in converted.parameters()) - sum(p.numel() for p in plain.parameters())
        == (told["added_parameters"])
    )
    for make, figure in (
        (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), "sgd_momentum_bytes"),
        (lambda ps: torch.optim.Adam(ps), "adam_bytes"),
    ):
        sizes = []
        for model in (converted, plain):
            optimizer = make(list(model.parameters()))
            model(torch.randn(2, 2, 6, 6)).sum().backward()
            optimizer.step()
            states = [t for state in optimizer.state.values() for t in state.values() if t is not None and t.dim()]
            sizes.append(sum(t.numel() * t.element_size() for t in states))
        assert sizes[0] - sizes[1] == told[figure]


def test_half_precision_and_frozen_kernels_cost_less(tmp_path: Path) -> None:
    model = tiny(tmp_path).to(torch.bfloat16)
    model.get_parameter("first.weight").requires_grad_(False)
    found = cost(plan(model), model, batch=1, measured_batch=1)
    first, grouped, _ = found.sites
    assert (first.checkpoint_bytes, first.sgd_momentum_bytes, first.adam_bytes) == (2 * 162, 0, 0)
    assert (grouped.checkpoint_bytes, grouped.adam_bytes) == (2 * 648, 4 * 648)
    assert found.convolution_macs is None  # nothing was run
    assert grouped.composition_macs == 9 * 9 * 8 * 2


def test_a_kernel_called_twice_is_composed_twice(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text(
        "from torch import nn\nINPUT_SHAPE = (1, 4, 8, 8)\n\ndef twice():\n"
        "    conv = nn.Conv2d(4, 4, 3, padding=1)\n    return nn.Sequential(conv, nn.ReLU(), conv)\n"
    )
    result = run_cli("to-doconv", f"{tmp_path}/twice.py:twice", "--dry-run", "--json")
    (site,) = json.loads(result.stdout)["cost"]["sites"]
    assert site["composition_macs"] == 2 * 9 * 9 * 16
    assert site["convolution_macs"] == 2 * 64 * 9 * 16


def test_the_tables_fit_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run_cli("to-doconv", "torchvision:mobilenet_v3_small", "--dry-run", "--batch", "32")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    tables = [
        line for line in lines if not line.startswith(("training costs", "one forward", "MobileNetV3:", "lever:"))
    ]
    tables = [line for line in tables if "linear region" not in line]
    assert max(map(len, tables)) <= 80
    assert any(line.split()[:2] == ["layer", "added"] for line in lines)
    assert any(line.startswith("total ") for line in lines)
    assert "at batch 32 (--batch)" in result.stdout
    assert "bytes more optimizer state with SGD and momentum" in result.stdout


@pytest.mark.parametrize("batch", ["0", "-3", "many"])
def test_a_batch_is_a_positive_number(tmp_path: Path, batch: str) -> None:
    result = run_cli("to-doconv", f"{tiny_file(tmp_path)}:tiny", "--dry-run", "--batch", batch)
    assert result.exit_code == 2
    assert "--batch" in result.stderr
    assert "Traceback" not in result.output


def test_no_cost_is_shown_where_it_is_paid(tmp_path: Path) -> None:
    result = run_cli("to-doconv", f"{tiny_file(tmp_path)}:tiny", "-o", tmp_path / "a.safetensors")
    assert "training costs" not in result.stdout
    assert "a.safetensors" in names(tmp_path)
