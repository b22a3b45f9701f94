"""`--debug` shows on stderr what was decided and why; without it nothing is heard of that."""

import json
import logging
from pathlib import Path

import pytest
import torch
from support import sample_source
from support_cli import run_cli
from torch import nn

from doconv_convert import fold, to_doconv
from doconv_convert.cli.console import output

PLAN = ["to-doconv", sample_source("control_flow"), "--dry-run", "--exclude", "stem", "--json"]


def test_decisions_are_shown_with_debug_alone() -> None:
    quiet, debug = run_cli(*PLAN), run_cli(*PLAN, "--debug")
    assert quiet.exit_code == debug.exit_code == 0
    assert json.loads(quiet.stdout) == json.loads(debug.stdout)
    assert "debug:" not in quiet.stderr
    said = debug.stderr.splitlines()
    assert "debug: doconv_convert.rewrite.sites: 'stem' is kept: excluded by name" in said
    whole = "cannot be traced whole: its children are traced one by one"
    assert f"debug: doconv_convert.rewrite.tracing: 'ControlFlowNet' {whole}" in said
    assert f"debug: doconv_convert.rewrite.tracing: 'refine' {whole}" in said
    assert any("symbolic trace of Refine in eval mode failed: TypeError" in line for line in said)
    package = logging.getLogger("doconv_convert")
    assert (package.handlers, package.level) == ([], logging.NOTSET)


def test_a_layer_computed_by_its_own_class_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Tripled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(2, 2, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.conv2d(x, 3 * self.kernel)

    caplog.set_level("INFO", "doconv_convert")
    fold(nn.Sequential(Tripled(), nn.ReLU()))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "'0' (Tripled) computes its kernel; it is folded by its graph"


def test_no_name_of_a_layer_steers_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential()
    model.add_module("\x1b[2J\r::error::\n\u202e", nn.Conv2d(1, 1, 3))
    model.add_module("plain", nn.Conv2d(1, 1, 3))
    with output(False, True, True):
        to_doconv(model, include=["plain"])
    said = capsys.readouterr().err
    assert all(line.startswith("debug: ") and line.isprintable() for line in said.removesuffix("\n").split("\n"))
    assert r"sites: '\x1b[2J\r::error::\n\u202e' is kept: excluded by name" in said


def test_the_python_api_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    to_doconv(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3)), exclude=["0"])
    assert capfd.readouterr() == ("", "")
