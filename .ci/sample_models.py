"""Every sample model all the way: converted, weights as after a training, folded, exported and proven.

    python .ci/sample_models.py FOLDER

Writes NAME.onnx with its certificate, and NAME.original.onnx, the network as drawn (with other weights). Exits with
the code of the first command that fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from doconv_convert import export_onnx, to_doconv
from doconv_convert.artifacts.checkpoints.checkpoint import save
from doconv_convert.artifacts.models import SourceModel, find_inputs
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.cli.app import app
from doconv_convert.workflows.rehearsal.randomize import randomize_and_calibrate

NAMES = ("residual", "grouped", "functional", "tied", "control_flow", "digits")


def prepare(name: str, folder: Path) -> list[str]:
    """Writes the trained checkpoint and the original's export; the command that folds it."""
    text = f"{Path(__file__).parents[1] / 'sample_models' / name}.py:{name}"
    source = parse_source(text)
    original = build(source).eval()
    inputs = find_inputs(SourceModel(original, source), None, None)
    assert inputs is not None, f"'{text}' declares no INPUT_SHAPE"
    randomize_and_calibrate(original, inputs.arguments(inputs.proof_batch))
    export_onnx(original, inputs.arguments(inputs.export_batch), folder / f"{name}.original.onnx")
    torch.manual_seed(0)
    trained = to_doconv(build(source)).eval()
    randomize_and_calibrate(trained, inputs.arguments(inputs.proof_batch))
    save(trained, folder / f"{name}.safetensors")
    return ["fold", f"{folder / name}.safetensors", "--model", text, "--onnx", f"{folder / name}.onnx"]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if code := app(prepare(name, folder), standalone_mode=False):
            sys.exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
