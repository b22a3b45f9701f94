"""The report of a really trained network, the study's ResNet, and its pictures as docs/report.md shows them.

    python docs/make/report_page.py [--folder docs/data/report]

Trains the cell (fashion, resnet, K, 0) of examples/study, folds, exports and proves it with `fold --report`, and takes
screenshots with Chromium. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from doconv_convert import save

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples/study"), str(ROOT / "tests")]

from data import DATA  # noqa: E402
from first_edition import train  # noqa: E402
from support_browser import browser  # noqa: E402

CELL = "fashion", "resnet", "K", 0
NETS = ROOT / "examples/study/nets.py"
# Of the page: the checks on a phone, the pictures on a desk, in both themes.
SHOTS = (("phone-light", 390, False, None), ("desk-dark", 1440, True, "#pictures"))
SHOT_HEIGHT = {390: 844, 1440: 1020}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs/data/report")
    folder: Path = parser.parse_args().folder.resolve()
    model, row = train(CELL)
    print(f"{row['accuracy']:.2%} of the test images in {row['seconds']} s")
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "resnet.html"
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save(model, work / "trained.safetensors")
        shutil.copy(NETS, work)  # the page names the network as the command line does
        np.save(work / "images.npy", DATA[CELL[0]]()[1][0][:3].numpy())
        files = ["trained.safetensors", "--onnx", "resnet.onnx", "--input", "images.npy", "--report", str(page)]
        run = [sys.executable, "-m", "doconv_convert", "fold", "--model", f"{NETS.name}:resnet", *files]
        subprocess.run(run, cwd=work, check=True)
        with browser(work / "profile") as tab:
            for shot, width, dark, place in SHOTS:
                tab.open(page, width=width, height=SHOT_HEIGHT[width], dark=dark)
                if place is not None:
                    tab.evaluate(f"document.querySelector('{place}').scrollIntoView()")
                tab.screenshot(folder / f"{shot}.png")


if __name__ == "__main__":
    main()
