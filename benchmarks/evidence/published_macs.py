"""The MACs of ONNX graphs against the figures that torchvision publishes, and against torch's own counter.

    python benchmarks/evidence/published_macs.py [--only GLOB] [--graphs FOLDER]

For every weights entry that publishes `_ops` (giga-MACs): the architecture those weights belong to, exported at the
weights' own crop size, counted by `count_macs`, and run once under torch.utils.flop_counter (which counts 2 a MAC).
The figures depend on shapes alone, so models are built and exported on the meta device: no weights exist. Detectors
compute sizes from values; they are exported by our own `export_onnx`, with random weights.

Results go to docs/data/published_macs.json after every model (a rerun resumes there); docs/make/published_macs_table.py
makes the page of them. --graphs keeps the exported graphs, which makes a recount quick.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model, get_model_weights, list_models

from doconv_convert.artifacts.export.exporter import export_onnx
from doconv_convert.artifacts.sources.inputs import VIDEO_FRAMES
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.artifacts.sources.zoos import torchvision_family
from doconv_convert.check.macs.counting import MacCount, count_macs
from doconv_convert.errors import DoconvError

RESULTS = Path(__file__).parents[2] / "docs" / "data" / "published_macs.json"
# What torchvision's own test measures a model at where its weights name no crop.
PLAIN_SIZE = 512


def published() -> list[tuple[str, str, float]]:
    """(model, weights, giga-MACs) of every entry that publishes a figure."""
    return [
        (name, member.name, member.meta["_ops"])
        for name in list_models()
        for member in get_model_weights(name)
        if member.meta.get("_ops")
    ]


def input_shape(name: str, weights: str) -> tuple[int, ...]:
    """(1, channels, [frames,] height, width); of a detector's one image (channels, height, width)."""
    transform = get_model_weights(name)[weights].transforms()
    family = torchvision_family(name)
    if family == "detection":
        return (3, PLAIN_SIZE, PLAIN_SIZE)
    if family == "optical_flow":
        return (1, 3, PLAIN_SIZE, PLAIN_SIZE)
    if family == "segmentation":
        return (1, 3, transform.resize_size[0], transform.resize_size[0])
    crop = transform.crop_size
    frames = (VIDEO_FRAMES,) if family == "video" else ()
    return (1, 3, *frames, crop[0], crop[-1])


def architecture(name: str, weights: str) -> nn.Module:
    """The float network that those weights belong to; quantized ones publish the figure of that before quantizing."""
    if not name.startswith("quantized_"):
        return build(parse_source(f"torchvision:{name}@{weights}"))
    options = {"init_weights": False} if name in ("quantized_googlenet", "quantized_inception_v3") else {}
    return get_model(name, weights=None, quantize=False, **options)


def on_meta(name: str, weights: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return architecture(name, weights)
    except DoconvError:  # regnets compute their widths with tensors; memory that nobody writes costs nothing
        filling = dict.fromkeys(("normal_", "uniform_", "kaiming_uniform_"), lambda tensor, *_, **__: tensor)
        with patch.multiple(nn.init, **filling):
            return architecture(name, weights).to("meta")


def export_meta(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> onnx.ModelProto:
    """The exported graph of a model on the meta device: its weights have a shape and no content."""
    program = torch.onnx.export(model, inputs, dynamo=True, optimize=False, verbose=False)
    assert program is not None
    for value in program.model.graph.initializers.values():
        tensor: Any = value.const_value
        if tensor.raw.device.type == "meta":
            value.const_value = ir.ExternalTensor(
                "absent", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=value.name or ""
            )
    return ir.to_proto(program.model)


def flops(model: nn.Module, arguments: tuple[Any, ...]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(*arguments)
    return counter.get_total_flops()


def measure(name: str, weights: str, kept: Path | None) -> dict[str, Any]:
    """The counts of one model: MACs of the ONNX graph, and half of what torch's counter says."""
    shape = input_shape(name, weights)
    graph = None if kept is None else kept / f"{name}.{'x'.join(map(str, shape))}.onnx"
    detector = torchvision_family(name) == "detection"
    model = (architecture if detector else on_meta)(name, weights).eval()
    with torch.device("cpu" if detector else "meta"):
        torch.manual_seed(0)
        inputs = tuple(torch.rand(shape) for _ in range(2 if torchvision_family(name) == "optical_flow" else 1))
    arguments: tuple[Any, ...] = (list(inputs),) if detector else inputs
    if graph is not None and graph.is_file():
        count = count_macs(graph)
    elif detector:
        count = _count_detector(model, arguments, graph)
    else:
        proto = export_meta(model, inputs)
        if graph is not None:
            onnx.save(proto, graph)
        count = count_macs(proto)
    heads = {"heads": head_macs(model)} if hasattr(model, "roi_heads") else {}
    return {
        **heads,
        "input": list(shape),
        "macs": count.total,
        "uncounted": count.uncounted,
        "flop_counter_macs": flops(model, arguments) // 2,
    }


def head_macs(model: nn.Module) -> dict[str, int]:
    """What an R-CNN's heads cost for one proposal, and for one detection (masks or keypoints)."""
    heads: Any = model.roi_heads
    pooled = {"box": heads.box_roi_pool, "mask": heads.mask_roi_pool, "keypoint": heads.keypoint_roi_pool}
    found = {}
    for name, pool in pooled.items():
        if pool is not None:
            head, predictor = getattr(heads, f"{name}_head"), getattr(heads, f"{name}_predictor")
            features = torch.rand(1, model.backbone.out_channels, *pool.output_size)
            found["proposal" if name == "box" else "detection"] = (
                flops(nn.Sequential(head, predictor), (features,)) // 2
            )
    return found


def _count_detector(model: nn.Module, arguments: tuple[Any, ...], graph: Path | None) -> MacCount:
    with tempfile.TemporaryDirectory() as folder:
        path = graph or Path(folder) / "model.onnx"
        export_onnx(model, arguments, path, dynamic_batch=False)
        return count_macs(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help="models to measure (again)")
    parser.add_argument("--graphs", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    by_shape: dict[Any, dict[str, Any]] = {}
    for name, weights, figure in published():
        key = f"{name} {weights}"
        if not fnmatch(name, options.only) or (key in results and options.only == "*"):
            continue
        start = time.monotonic()
        twin = (name, input_shape(name, weights))
        if twin not in by_shape:  # most weights of a model share its architecture and size
            by_shape[twin] = measure(name, weights, options.graphs)
        results[key] = {"published": figure, **by_shape[twin]}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        row = results[key]
        print(
            f"{key}: published {figure}, {row['macs'] / 1e9:.6f}, torch {row['flop_counter_macs'] / 1e9:.6f}, "
            f"uncounted {row['uncounted']}, {time.monotonic() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
