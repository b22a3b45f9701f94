"""A recipe's network may not be many times larger than its file: told before it is built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support_cli import run_cli, run_python

from doconv_convert import load
from doconv_convert.artifacts.checkpoints import bounded
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.errors import DoconvError

HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("torchvision:resnet18", {"num_classes": 2_000_000}),
    ("torchvision:mobilenet_v3_small", {"width_mult": 300.0}),
    ("torchvision:squeezenet1_1", {"num_classes": 10**9}),
    ("timm:resnet18", {"in_chans": 10**7}),
    ("timm:vit_tiny_patch16_224", {"img_size": 60_000}),
]


def written(path: Path, source: str, args: dict[str, Any]) -> Path:
    recipe = {"source": {"source": source, "args": args}, "sites": [], "aliases": {}, "channels_last": []}
    metadata = {"doconv_convert": json.dumps({**recipe, "format": 1, "tool_version": "0"})}
    save_file({"a": torch.ones(3)}, path, metadata=metadata)
    return path


@pytest.mark.parametrize(("source", "args"), HOSTILE)
def test_a_recipe_cannot_fill_the_memory(tmp_path: Path, source: str, args: dict[str, Any]) -> None:
    path = written(tmp_path / "a.safetensors", source, args)
    with pytest.raises(DoconvError, match=r"recipe asks for a network of more than 3 values.*`model`, `model_args`"):
        load(path)


def test_every_command_holds_a_recipe_against_its_file(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", *HOSTILE[0])
    for command in (
        ["fold", path, "-o", tmp_path / "b.safetensors"],
        ["to-doconv", path, "--dry-run"],
        ["flops", path],
    ):
        result = run_cli(*command)
        assert result.exit_code == 1, result.stderr
        assert "its recipe asks for a network of more than 3 values" in result.stderr


PEAK = """
import resource, sys
from doconv_convert import load
from doconv_convert.errors import DoconvError
import torchvision.models
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    load(sys.argv[1])
except DoconvError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_two_million_classes_take_no_memory(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", *HOSTILE[0])
    assert int(run_python(PEAK, path)) < 200 * 1024  # KiB; the network's last layer alone has 4 GB


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_honest_networks_are_far_from_the_bound(name: str) -> None:
    source = parse_source(f"torchvision:{name}")
    state = build(source).state_dict()
    held = sum(tensor.numel() for tensor in state.values())
    budget = bounded._Budget(10**9)
    with budget:
        build(source)
    assert budget.total < 0.5 * bounded._ALL_TENSORS * held
    assert bounded.build_within(source, state, "a") is not None
