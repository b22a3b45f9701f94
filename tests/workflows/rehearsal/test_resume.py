"""The file of earlier results: a line that was cut off costs one model; that it cannot be written is told first."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support_cli import run_cli, tiny_file

from doconv_convert.workflows.rehearsal import many
from doconv_convert.workflows.rehearsal.many import Rehearsals, RehearseRequest

SOURCES = ["torchvision:resnet18", "torchvision:resnet34"]


def results(request: RehearseRequest) -> list[str]:
    return [json.dumps({"source": text, "status": "passed", "settings": request.settings}) for text in SOURCES]


@pytest.mark.parametrize("cut", [1, 20, None])
def test_a_torn_last_line_costs_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int | None) -> None:
    """`cut` bytes of the second line are there, or all of it but its end of line."""
    request = RehearseRequest(SOURCES, resume=tmp_path / "a.jsonl")
    first, second = results(request)
    (tmp_path / "a.jsonl").write_text(f"{first}\n{second[:cut]}")
    rehearsals = Rehearsals.of(request)
    assert rehearsals.todo == (tuple(SOURCES[1:]) if cut else ())
    made = {"source": SOURCES[1], "status": "failed", "settings": request.settings}
    monkeypatch.setattr(many, "_results", lambda todo, request: iter([made] * len(todo)))
    list(rehearsals.run())
    lines = (tmp_path / "a.jsonl").read_text().split("\n")
    assert lines == [first, json.dumps(made) if cut else second, ""]
    assert Rehearsals.of(request).todo == ()


def test_damage_elsewhere_is_no_torn_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"sou\n{"source": 1}\n')
    result = run_cli("rehearse", f"{tiny_file(tmp_path)}:tiny", "--resume", tmp_path / "a.jsonl")
    assert result.exit_code == 1
    assert "is not a file of rehearsal results" in result.stderr
    assert (tmp_path / "a.jsonl").read_text() == '{"sou\n{"source": 1}\n'


@pytest.mark.parametrize("place", ["folder", "missing/a.jsonl", "read-only"])
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "folder").mkdir()
    if place == "read-only":
        real = Path.open

        def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
            if path.name == place and "a" in arguments[0]:
                raise PermissionError(13, os.strerror(13), str(path))
            return real(path, *arguments, **named)

        monkeypatch.setattr(Path, "open", refuse)  # root may write anywhere
    monkeypatch.setattr(many, "_results", lambda *_: pytest.fail("work was begun"))
    result = run_cli("rehearse", f"{tiny_file(tmp_path)}:tiny", "--resume", tmp_path / place)
    assert result.exit_code == 1
    assert f"error: cannot write '{tmp_path / place}': " in result.stderr


def test_a_full_disk_while_a_result_is_added_is_an_error_in_words(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    request = RehearseRequest(SOURCES, resume=Path("/dev/full"))
    rehearsals = Rehearsals(request, tuple(SOURCES), {}, tuple(SOURCES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(many, "_results", lambda todo, request: iter([{"source": SOURCES[0]}]))
        with pytest.raises(many.DoconvError, match="cannot write '/dev/full': No space left on device"):
            list(rehearsals.run())
