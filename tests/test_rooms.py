"""The order of the rooms, as the imports tell it; and `check`, which needs no torch outside of `torch_runs`."""

import ast
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs/make/rooms.py"
ROOMS = runpy.run_path(str(SCRIPT))
PACKAGE = ROOT / "doconv_convert"
LONGEST = 300  # lines
LONGEST_COMMAND = 40  # lines of a function in cli, its signature aside
LONGER = {"nn/triton_kernels.py"}  # the kernels are read beside what launches them
WITHOUT_TORCH = """
import importlib, pkgutil, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("no torch here", name="torch")

sys.meta_path.insert(0, NoTorch())
import doconv_convert.check
for module in pkgutil.walk_packages(doconv_convert.check.__path__, "doconv_convert.check."):
    if ".torch_runs" not in module.name:
        importlib.import_module(module.name)
        print(module.name)
"""


def copied(folder: Path) -> Path:
    """The package's sources, to plant something in."""
    package = folder / "doconv_convert"
    shutil.copytree(ROOT / "doconv_convert", package, ignore=lambda _, names: {n for n in names if n == "libraries"})
    return package


def run_python(*arguments: Any, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)


def test_no_file_is_longer_than_a_reader_likes() -> None:
    lengths = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")
    }
    assert len(lengths) > 100
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST and name not in LONGER} == {}


def test_imports_lead_down_and_in_no_circle() -> None:
    imports = ROOMS["imports_of"](ROOT)
    rooms = ROOMS["rooms_of"](imports)
    ground = {"errors", "files", "interrupts", "versions", "words", "workspace"}
    assert {*ROOMS["ORDER"], *ground} == set(rooms[""])  # a new one needs its place in ORDER
    assert ROOMS["upward"](imports) == []
    assert ROOMS["circles"](rooms) == []
    done = run_python(SCRIPT)
    assert done.returncode == 0, done.stdout
    assert "circles: 0\nupward imports: 0" in done.stdout


@pytest.mark.parametrize(
    ("module", "planted", "told"),
    [
        ("nn/layers.py", "from doconv_convert.rewrite import sites", "nn.layers:1 imports rewrite.sites"),
        ("check/proof.py", "def f():\n    import doconv_convert.cli.app", "check.proof:2 imports cli.app"),
        ("files.py", "from doconv_convert.nn.layers import DOConv2d", "files:1 imports nn.layers"),
        ("cli/app.py", "from doconv_convert import fold", "cli.app:1 imports doconv_convert"),
        (
            "check/outputs/reruns.py",
            "if TYPE_CHECKING:\n    from doconv_convert.check.proof import Status",
            "check: outputs <- proof <- outputs",
        ),
        ("rewrite/sites.py", "from doconv_convert.rewrite.plan import plan", "rewrite: "),
    ],
)
def test_a_planted_import_is_found(module: str, planted: str, told: str, tmp_path: Path) -> None:
    path = copied(tmp_path) / module
    path.write_text(f"{planted}\n{path.read_text()}")
    done = run_python(SCRIPT, tmp_path)
    assert done.returncode == 1
    found = done.stdout.partition("circles: ")[2]
    assert told in found or told.replace("outputs <- proof <- outputs", "proof <- outputs <- proof") in found


def test_check_imports_without_torch() -> None:
    done = run_python("-c", WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert {"doconv_convert.check.proof", "doconv_convert.check.certificate.verify"} <= set(said)
    expected = [path for path in (ROOT / "doconv_convert/check").rglob("*.py") if "torch_runs" not in path.parts]
    assert len(said) == len(expected) - 1  # check/__init__.py itself


def test_torch_in_check_is_found(tmp_path: Path) -> None:
    path = copied(tmp_path) / "check/outputs/detections.py"
    path.write_text(path.read_text().replace("\nimport ", "\nimport torch\nimport ", 1))
    assert "import torch\n" in path.read_text()
    done = run_python("-c", WITHOUT_TORCH, folder=tmp_path)
    assert done.returncode == 1
    assert "no torch here" in done.stderr


def test_the_architecture_page_names_files_that_exist() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    inside = re.findall(r"`((?:nn|rewrite|artifacts|check|workflows|cli)/[\w/.]+\.py)`", page)
    assert len(inside) > 30
    assert [path for path in inside if not (ROOT / "doconv_convert" / path).is_file()] == []
    beside = re.findall(r"`((?:tests|docs)/[\w/.]+)[` ]", page)
    assert [path for path in beside if not (ROOT / path).exists()] == []


def test_a_commands_function_is_short() -> None:
    """It parses, calls one workflow and prints: what a workflow does is no command's."""
    lengths = {}
    for path in (PACKAGE / "cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lengths[f"{path.name}:{node.name}"] = (node.end_lineno or 0) - node.body[0].lineno + 1
    assert {"fold.py:fold", "demo.py:demo"} <= lengths.keys()
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_COMMAND} == {}
