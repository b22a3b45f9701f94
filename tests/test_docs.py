"""Every Python block of the documentation runs: a page's blocks one after the other, as a reader would type them."""

import re
from pathlib import Path

import pytest
from support_cli import run_cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# "python no-run": what takes several processes, which tests/training/train_distributed.py does
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

# What a page takes as the reader's own: their model, their data.
READERS_OWN = {
    "training": """
import torch
from torch import nn
from doconv_convert import to_doconv
model = to_doconv(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)))
batch = torch.randn(2, 3, 8, 8)
loss_of = lambda model, batch: model(batch).square().mean()
""",
}


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page.stem == "README":  # the command line above its second block
        command = "doconv-convert to-doconv torchvision:mobilenet_v2 -o start.safetensors"
        assert command in page.read_text()
        assert run_cli(*command.split()[1:]).exit_code == 0
    names: dict[str, object] = {}
    exec(READERS_OWN.get(page.stem, ""), names)
    for number, block in enumerate(blocks(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_links_lead_somewhere(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_linked() -> None:
    linked = {(page.parent / link).resolve() for page in PAGES for link in LINK.findall(page.read_text())}
    assert [page.name for page in PAGES[1:] if page not in linked] == []
