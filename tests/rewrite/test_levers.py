"""Levers in a plan: at a user's own loss, and at a random direction in a dry run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support_cli import run_cli
from torch import Tensor, nn

from doconv_convert import lever, plan, to_doconv
from doconv_convert.errors import UsageError

NET = """
from torch import nn

INPUT_SHAPE = (1, 3, 8, 8)


def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3, groups=4))


def cut():
    class Cut(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    return Cut(nn.Conv2d(3, 8, 3))
"""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=4))


def loss(output: Tensor) -> Tensor:
    return output.square().mean()


def test_a_plans_levers_are_those_of_the_first_step() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(4, 3, 8, 8)
    planned = plan(model, x, loss=loss)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    converted = to_doconv(model)
    loss(converted(x)).backward()
    assert {row.name: row.lever for row in planned.rows} == pytest.approx(lever(converted), rel=1e-5)
    assert planned.median_lever is not None
    assert "The median lever is" in str(planned)


@pytest.mark.parametrize("wrong", [lambda y: y, lambda y: 1.0, lambda y: y.sum().detach()])
def test_a_loss_that_is_no_scalar_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="expected a function from the output to a scalar"):
        plan(net(), torch.zeros(2, 3, 8, 8), loss=wrong)


def test_a_loss_needs_inputs() -> None:
    with pytest.raises(UsageError, match="`loss` needs `example_inputs`"):
        plan(net(), loss=loss)


def dry_run(tmp_path: Path, factory: str) -> Any:
    (tmp_path / "net.py").write_text(NET)
    result = run_cli("to-doconv", f"{tmp_path / 'net.py'}:{factory}", "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["plan"], result.stderr


def test_a_dry_run_says_what_its_levers_are_of(tmp_path: Path) -> None:
    planned, said = dry_run(tmp_path, "make")
    assert [row["lever"] is not None for row in planned["rows"]] == [True, False, True]
    assert planned["levers_of"] == "a random direction of the outputs, in eval mode"
    assert f"by {planned['median_lever']:.2g} of its size in the median layer" in said


def test_a_model_without_gradients_has_no_levers(tmp_path: Path) -> None:
    planned, said = dry_run(tmp_path, "cut")
    assert (planned["levers_of"], planned["median_lever"]) == (None, None)
    assert "lever:" not in said
