"""What a terminal of 80 columns, a pipe and a shell see of the commands."""

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
from support_cli import ROOT, run_cli, tiny_file, trained_tiny, write_model
from typer.testing import CliRunner

from doconv_convert.cli import fold, progress, to_doconv, verify
from doconv_convert.cli.app import app
from doconv_convert.cli.console import Output
from doconv_convert.versions import LIBRARIES

COLOR = re.compile(r"\x1b\[[\d;]*\b(?:3\d|4\d|9\d|10\d)(?:;[\d;]*)?m")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a trained network, its ONNX file and its certificate."""
    folder = tmp_path_factory.mktemp("net")
    write_model(trained_tiny(folder), folder / "trained.pth")
    model = f"{tiny_file(folder)}:tiny"
    made = run_cli("fold", folder / "trained.pth", "--model", model, "--onnx", folder / "out.onnx")
    assert made.exit_code == 0, made.output
    return folder


def test_every_command_fits_a_terminal_of_80_columns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: dict[tuple[str, ...], list[str]] = {}

    @contextmanager
    def stepping(console: Any, shares: Mapping[str, float]) -> Iterator[Callable[[str], None]]:
        yield begun.setdefault(tuple(shares), []).append

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Output, "terminal", True)
    monkeypatch.setattr(progress, "stepping", stepping)
    net, out, trained = f"{folder}/net.py:tiny", folder / "out.onnx", folder / "trained.pth"
    for command in (
        ("to-doconv", net, "-o", folder / "start.safetensors"),
        ("fold", trained, "--model", net, "--onnx", folder / "again.onnx", "-o", folder / "plain.safetensors"),
        ("verify", out, "--against", trained, "--model", net),
        ("verify", out, "--certificate", folder / "out.certificate.json"),
        ("flops", out, "--max", "1G"),
        ("rehearse", net, "--no-export"),
        ("to-doconv", "torchvision:squeezenet1_1", "--dry-run"),
    ):
        result = run_cli(*command)
        assert result.exit_code == 0, result.output
        assert [line for line in result.stdout.splitlines() if len(line) > 80 or "…" in line] == []
    assert re.search(r"^features\.10\.squeeze +DO-Conv ", result.stdout, re.MULTILINE)
    assert re.search(r"^features\.10\. +DO-Conv .*\nexpand3x3$", result.stdout, re.MULTILINE)  # broken at its dot
    for module in (fold, to_doconv, verify):  # the time left is known of every step that is reported
        assert set(begun[tuple(module._STEPS)]) == set(list(module._STEPS)[1:])
        assert sum(module._STEPS.values()) == pytest.approx(1)


def test_a_name_is_broken_where_it_has_a_joint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    Output(as_json=False, quiet=False).table(
        ["layer", "MACs"], [["backbone.feature_pyramid.inner_blocks.0", 1234567]], right=[1]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["backbone.feature_", "1,234,567"]
    assert [line.split()[0] for line in lines[1:]] == ["backbone.feature_", "pyramid.inner_", "blocks.0"]
    assert max(map(len, lines)) <= 30


def test_colors_asked_of_everybody_reach_no_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    Output(as_json=False, quiet=False).table(["check", "state"], [["macs", "failed"]])
    assert capsys.readouterr().out == "check  state\nmacs   failed\n"


def on_terminal(*arguments: str, **environment: str) -> str:
    """All that the program writes to a real terminal of 80 columns."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", "from doconv_convert.cli.app import main; main()", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=inherited | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)} | environment,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            written += os.read(ours, 65536)
        except OSError:  # the last writer has closed the terminal
            break
    os.close(ours)
    process.wait()
    return written.decode()


def test_colors_are_for_terminals_that_want_them(folder: Path) -> None:
    command = ("verify", str(folder / "out.onnx"), "--certificate", str(folder / "out.certificate.json"))
    assert COLOR.search(on_terminal(*command))
    plain = on_terminal(*command, NO_COLOR="1")
    assert "proven" in plain
    assert COLOR.search(plain) is None
    piped = run_cli(*command).output
    assert "proven" in piped
    assert "\x1b" not in piped


def test_an_error_is_broken_between_words() -> None:
    *lines, _ = (
        on_terminal("flops", "a-file-with-a-longer-name-that-is-not-there.onnx", "--quiet")
        .replace("\r", "")
        .split("\n")
    )
    assert len(lines) > 1
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).startswith(
        "error: 'a-file-with-a-longer-name-that-is-not-there.onnx' does not exist; expected"
    )


def test_the_time_that_is_left() -> None:
    shares = {"load": 0.25, "fold": 0.25, "prove": 0.5}
    assert [progress.part_done(shares, name) for name in (*shares, "another")] == [0, 0.25, 0.5, 0]


def test_a_bug_report_gets_its_versions() -> None:
    said = run_cli("--version").stdout
    first, *others = said.splitlines()
    assert re.match(r"doconv-convert [\d.]+, Python [\d.]+, \w+", first)
    assert [line.split()[0] for line in others] == list(LIBRARIES)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes(shell: str) -> None:
    def ask(instruction: str, **words: str) -> str:
        environment = {"_DOCONV_CONVERT_COMPLETE": f"{instruction}_{shell}"} | words
        return CliRunner().invoke(app, [], env=environment, prog_name="doconv-convert").stdout

    assert "doconv-convert" in ask("source")
    asked = {"COMP_WORDS": "doconv-convert fo", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "doconv-convert fo"}
    suggested = ask("complete", **asked, _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert "fold" in suggested
    assert "verify" not in suggested
