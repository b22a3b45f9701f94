"""What the tests of files, proofs and the command line share: tiny nets, trained models, one command's run."""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import build_model, randomize_and_calibrate, sample_source, varied_images
from torch import Tensor, nn
from typer.testing import CliRunner

from doconv_convert import save, to_doconv
from doconv_convert.artifacts.checkpoints.recipe import METADATA_KEY
from doconv_convert.artifacts.export import child_process
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.cli.app import app
from doconv_convert.rewrite.convert import copy_model


class ExportsHere:
    """In an exporting child's place: a child of its own costs seconds, and other tests have it."""

    reuse = False

    def export(self, job: child_process.ExportJob) -> object:
        return child_process._export(job)

    def close(self) -> None:
        pass


class ConfinedHere:
    """In a confined process' place, without its limits: each costs half a second, and other tests have them."""

    def call(self, function: str, file: Path, *arguments: Any, limits: object = None) -> Any:
        module, _, name = function.partition(":")
        called = getattr(importlib.import_module(f"doconv_convert.{module}"), name)
        return json.loads(json.dumps(called(str(file), *json.loads(json.dumps(arguments)))))

    def close(self) -> None:
        pass


ROOT = Path(__file__).resolve().parents[1]

# A file of the user's own: a marker beside it shows that it was imported.
TINY = """
from pathlib import Path

import torch
from torch import nn

Path(__file__).with_suffix(".imported").touch()
INPUT_SHAPE = (1, 2, 6, 6)


class Tiny(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=4, bias=False)
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, 3)

    def forward(self, image):
        x = torch.relu(self.norm(self.first(image)))
        x = self.depthwise(x + self.grouped(x))
        return self.head(torch.relu(self.pointwise(x)).mean((2, 3)))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Tiny()

    def forward(self, image):
        return self.model(image)


def tiny(width=8):
    return Tiny(width)


def wrapped():
    return Wrapped()


def constant():
    net = Tiny()
    nn.init.zeros_(net.head.weight)
    return net


def nothing():
    return nn.Linear(2, 2)


def transposed():
    return nn.ConvTranspose2d(2, 2, 3)


def diverged():
    net = Tiny()
    nn.init.constant_(net.first.weight, float("nan"))
    return net


def raises():
    raise RuntimeError("out of luck")


def number():
    return 3
"""


def tiny_file(folder: Path) -> str:
    """Writes TINY, with the constant INPUT_SHAPE, as 'net.py'; 'PATH:tiny' is a source."""
    path = folder / "net.py"
    path.write_text(TINY)
    return str(path)


def tiny(folder: Path, factory: str = "tiny") -> nn.Module:
    return build(parse_source(f"{tiny_file(folder)}:{factory}")).eval()


def trained(model: nn.Module, inputs: Tensor, **options: Any) -> nn.Module:
    """`model` converted and as if trained for long: D moved, batch norm calibrated, every output alive."""
    return randomize_and_calibrate(to_doconv(model, **options), inputs, seed=1).eval()


@functools.cache
def _trained_sample(name: str, d_mul: str) -> nn.Module:
    channels = 1 if name == "digits" else 3
    size = 8 if name == "digits" else 32
    return trained(build_model(name), varied_images(8, channels, size, size), d_mul=d_mul)


def trained_sample(name: str, d_mul: str = "K") -> nn.Module:
    """A fresh copy of a sample model, converted, randomized and calibrated."""
    return copy_model(_trained_sample(name, d_mul)).eval()


def trained_tiny(folder: Path, factory: str = "tiny", **options: Any) -> nn.Module:
    return trained(tiny(folder, factory), varied_images(8, 2, 6, 6), **options)


def write_sample(path: Path, name: str, d_mul: str = "K") -> None:
    """A trained sample model in a file of ours or, as people bring it, in `torch.save(model.state_dict())`."""
    write_model(trained_sample(name, d_mul), path, sample_source(name))


def write_model(model: nn.Module, path: Path, source: str | None = None) -> None:
    if path.suffix == ".safetensors":
        save(model, path, source=source)
    else:
        torch.save(model.state_dict(), path)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors as they are stored and the recipe."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return tensors, json.loads((file.metadata() or {})[METADATA_KEY])


def rewrite_file(path: Path, tensors: dict[str, Tensor], recipe: Any) -> None:
    """The file with other tensors, and another recipe: a dict, or any text."""
    text = recipe if isinstance(recipe, str) else json.dumps(recipe)
    save_file(tensors, path, metadata={METADATA_KEY: text})


def run_cli(*arguments: Any) -> Any:
    """One command in this process: exit_code, stdout, stderr, exception."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_python(code: str, *arguments: Any) -> str:
    """What `code` prints in a fresh interpreter that has `arguments` in sys.argv."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden leftovers too."""
    return sorted(path.name for path in folder.iterdir())
