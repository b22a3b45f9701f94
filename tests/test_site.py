"""The documentation as a site: no page is lost or made by hand that a script makes, no reader's browser is sent out."""

import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from pages_of(part)


def test_the_navigation_has_every_page_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = ["index.md", *(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))]  # index.md: the README
    assert Counter(pages_of(nav)) == Counter(pages)


def test_the_reference_is_the_programs_own() -> None:
    made = runpy.run_path(str(DOCS / "make" / "cli_page.py"))["page"]()
    assert (DOCS / "cli.md").read_text() == made, "mend it: python docs/make/cli_page.py"
    for told in ("- `-o, --output FILE`:", "(0.0 to 1.0; default `0.0`)", "text|json|github", "rehearse SOURCES..."):
        assert told in made


def test_the_screens_ask_no_network() -> None:
    pictures = sorted((DOCS / "screens").glob("*.svg"))
    assert {picture.stem for picture in pictures} == set(
        re.findall(r"\(screens/(\w+)\.svg\)", (DOCS / "screens.md").read_text())
    )
    for picture in pictures:
        assert set(re.findall(r"https?://[^\"')\s]+", picture.read_text())) <= {
            "http://www.w3.org/2000/svg",  # a name, not an address
            "https://www.textualize.io",  # in a comment: rich made the picture
        }


@pytest.mark.zoo
def test_the_site_builds_and_asks_no_network(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()
        assert re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?https?://[^>]+", text) == [], page
        assert 'data-md-component="source"' not in text  # it asks the repository's host for stars
        pictures = re.findall(r"<img\b[^>]*?src=\"([^\"]+)", text)
        assert [picture for picture in pictures if not (page.parent / picture).exists()] == []
