"""The examples, in a small size, by their own command lines."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "examples/study"
# One process, so that the study is run once.
pytestmark = pytest.mark.xdist_group("study")


def python(*arguments: str | Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def rows(path: Path) -> dict[tuple[str, str, str, int], dict]:
    return {tuple(row["cell"]): row for row in map(json.loads, path.read_text().splitlines())}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "study.jsonl"
    nets = ["--data", "digits", "--nets", "stack", "--seeds", "2", "--epochs", "1", "--jobs", "1"]
    python(STUDY / "first_edition.py", *nets, "--resume", path)
    return path


def test_the_arms_of_a_pair_start_as_one_function_and_part(study: Path) -> None:
    found = rows(study)
    assert len(found) == 3 * 2
    for seed in (0, 1):
        plain, *others = (found["digits", "stack", arm, seed]["losses"] for arm in ("plain", "K", "2K"))
        for losses in others:
            assert losses[0] == plain[0]
            assert losses[-1] != plain[-1]
    assert found["digits", "stack", "plain", 0]["losses"][0] != found["digits", "stack", "plain", 1]["losses"][0]


def test_a_cell_run_again_gives_the_same_numbers(study: Path, tmp_path: Path) -> None:
    lines = study.read_text().splitlines()
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(lines[:-1]) + "\n")
    shown = python(
        STUDY / "first_edition.py",
        *["--data", "digits", "--nets", "stack", "--seeds", "2", "--epochs", "1", "--resume", again],
    )
    assert shown.startswith("[1/1]")
    (first,), second = [json.loads(lines[-1])], json.loads(again.read_text().splitlines()[-1])
    assert first["cell"] == second["cell"]
    assert (first["losses"], first["accuracy"]) == (second["losses"], second["accuracy"])


def test_the_page_tells_pairs_and_intervals(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "study.md"
    (tmp_path / "study.jsonl").write_bytes(study.read_bytes())
    monkeypatch.setattr(sys, "argv", ["summary.py", str(tmp_path), str(page)])
    monkeypatch.syspath_prepend(str(STUDY))
    pictures = [page.with_name(f"study_{what}.svg") for what in ("accuracy", "losses")]
    drawn = []
    for _ in range(2):
        runpy.run_path(str(STUDY / "summary.py"), run_name="__main__")
        drawn.append([picture.read_bytes() for picture in pictures])
    assert drawn[0] == drawn[1]
    text = page.read_text()
    assert "Of 2 comparisons of the test accuracy" in text
    assert text.count("| digits |") == 2
