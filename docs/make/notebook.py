"""Run a notebook's cells in place and keep what they show: `python docs/make/notebook.py examples/prove.ipynb`.

Needs nbconvert and ipykernel, which the project itself does not.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor


def main(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        ExecutePreprocessor(timeout=600).preprocess(notebook, {"metadata": {"path": folder}})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the times of this run
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
