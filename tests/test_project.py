"""What a project has beside its code: metadata, templates and workflows that say what is so."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from support import build_model
from test_docs import LINK

from doconv_convert import __version__, save, to_doconv
from doconv_convert.artifacts.checkpoints.recipe import FORMAT_VERSION, METADATA_KEY, Recipe

if sys.version_info >= (3, 11):
    import tomllib

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / ".github/PULL_REQUEST_TEMPLATE.md"]


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def scripts(workflow: Path) -> str:
    jobs = loaded(workflow)["jobs"].values()
    return "\n".join(step.get("run", "") for job in jobs for step in job["steps"])


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = loaded(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= citation.keys()
    assert citation["version"] == __version__
    (paper,) = citation["references"]
    assert paper["url"] == "https://arxiv.org/abs/2006.12030"
    assert len(paper["authors"]) == 8


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is new in Python 3.11")
def test_the_addresses_are_known_ones() -> None:
    """A placeholder owner is a name that somebody else may take."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["urls"] == {"Paper": "https://arxiv.org/abs/2006.12030"}
    if not (ROOT / ".git").exists():
        pytest.skip("no clone: which files are the project's is not known")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert "README.md" in files
    told = [ROOT / name for name in files if name.endswith((".md", ".yml", ".yaml", ".toml", ".cff"))]
    owners = re.compile(r"\bOWNER/|github\.com/(?:OWNER|example|your)", re.IGNORECASE)
    assert [path.name for path in told if owners.search(path.read_text())] == []


def test_the_hooks_are_the_linters_of_ci() -> None:
    repos = loaded(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    entries = [hook["entry"] for hook in repos[0]["hooks"]]
    assert [entry.removesuffix(" --force-exclude") for entry in entries] == ["ruff check", "ruff format", "mypy"]
    run = (ROOT / ".ci/run").read_text()
    assert all(entry.removesuffix(" --force-exclude") in run for entry in entries)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates(path: Path) -> None:
    template = loaded(path)
    if path.stem == "config":
        assert template == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= template.keys()
    identifiers = [part["id"] for part in template["body"]]
    assert len(identifiers) == len(set(identifiers))
    for part in template["body"]:
        assert part["type"] in ("textarea", "dropdown", "input", "checkboxes")
        assert part["attributes"]["label"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_links_of_the_other_pages_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []
    commands = re.findall(r"`\.venv/bin/python -m pytest ([^`]*tests/[^` ]+)`", page.read_text())
    assert [one for one in commands if not (ROOT / one.split()[-1]).exists()] == []


def test_the_workflows_have_every_job() -> None:
    ci, nightly, release = (loaded(ROOT / f".github/workflows/{name}.yml") for name in ("ci", "nightly", "release"))
    assert {"3.10", "3.13"} <= set(ci["jobs"]["tests"]["strategy"]["matrix"]["python"])
    assert nightly[True]["schedule"]  # YAML's `on` is true
    assert "-m pytest -m zoo" in scripts(ROOT / ".github/workflows/nightly.yml")
    assert list(release["jobs"]) == ["build", "test", "attest"]
    assert [job.get("needs") for job in release["jobs"].values()] == [None, "build", "test"]
    assert release["jobs"]["attest"]["permissions"]["attestations"] == "write"
    uses = [step.get("uses", "") for step in release["jobs"]["attest"]["steps"]]
    assert any(one.startswith("actions/attest-build-provenance@") for one in uses)


def test_the_lowest_versions_are_all_of_them() -> None:
    """What the workflow's own line makes of pyproject.toml: an exact version for each dependency, tests' too."""
    (line,) = re.findall(r"sed .* pyproject\.toml", scripts(ROOT / ".github/workflows/ci.yml"))
    told = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = re.findall(r'^    "([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert told == [f"{name}=={version}" for name, version in wanted]
    assert {name for name, _ in wanted} >= {"torch", "onnx", "onnxruntime", "numpy", "pytest", "triton"}


def test_no_file_names_a_registrys_host() -> None:
    """Which index packages come from is the machine's own configuration."""
    hosts = re.compile(r"\b(?:\w+\.)?(?:pypi|pytorch|anaconda)\.org\b|pythonhosted|PIP_(?:EXTRA_)?INDEX_URL")
    told = [*WORKFLOWS, *ROOT.glob(".ci/*"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "action.yml"]
    assert [path.name for path in told if hosts.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_no_more_than_it_needs_and_runs_what_is_there(workflow: Path) -> None:
    assert loaded(workflow)["permissions"] == {"contents": "read"}
    for job in loaded(workflow)["jobs"].values():
        for step in job["steps"]:
            assert step.get("uses", "actions/").startswith(("actions/", "./"))
    for name in re.findall(r"\.ci/\w+(?:\.py)?", scripts(workflow)):
        assert (ROOT / name).exists()
        assert name.endswith(".py") or (ROOT / name).stat().st_mode & 0o111


def test_the_lowest_python_is_the_one_that_is_tested() -> None:
    lowest = re.search(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert lowest is not None
    assert lowest[1] in loaded(ROOT / ".github/workflows/ci.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert f"Python {lowest[1]} or newer" in (ROOT / "CONTRIBUTING.md").read_text()


def told(section: str) -> set[str]:
    """The keys in the first table of a section of docs/metadata.md."""
    page = (ROOT / "docs/metadata.md").read_text()
    return set(re.findall(r"^\| `(\w+)` \|", page.split(section, 1)[1].split("\n\n", 1)[0], re.MULTILINE))


def test_the_metadata_is_what_its_page_says(tmp_path: Path) -> None:
    save(to_doconv(build_model("grouped"), d_mul="K+1"), tmp_path / "m.safetensors", source="torchvision:resnet18")
    with safe_open(tmp_path / "m.safetensors", "numpy") as file:
        assert list(file.metadata()) == [METADATA_KEY]
        content = json.loads(file.metadata()[METADATA_KEY])
    assert content["format"] == FORMAT_VERSION
    assert f"**version {FORMAT_VERSION}**" in (ROOT / "docs/metadata.md").read_text()
    assert content.keys() == told("\n## Keys\n")
    assert len(content["sites"]) > 3
    assert all(site.keys() == told("\nA site:\n") for site in content["sites"])
    assert content["source"].keys() == {"source", "args"}


def test_a_reader_ignores_what_a_later_writer_adds() -> None:
    content = json.loads(Recipe(()).dump())
    assert Recipe.parse(json.dumps({**content, "later": [1]}), "file") == Recipe(())
