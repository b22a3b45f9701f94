"""One adversarial net through the real `fold --onnx`, and what came out held against the user's own live model."""

import functools
import importlib.util
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import torch
from support import is_d, outputs
from torch import Tensor, nn
from typer.testing import CliRunner

from doconv_convert import DoconvError, save, to_doconv
from doconv_convert.cli.app import app

NETS = Path(__file__).parent / "nets"
SHAPE = (3, 16, 16)
# fp32 rounding in nets of two to four layers: the largest that a right file showed was 4e-7.
SAME = 1e-5
# Float64 and float32 runs of one network; further apart, they are two.
PRECISE = 1e-3
SEED = 5  # not the seed that the product builds with: what no state dict holds is another one's
STEPS = 3
# D's entries after the training, N(0, MOVED^2): a wrong fold is 1 to 50 % off, and few outputs lose all sense.
MOVED = 0.05


@dataclass
class Seen:
    """What the command did and said. `off` is the file's relative L2 error against the live model, NaN where that has
    no reference, None where there is no file; `words` are everything that was said."""

    code: int
    proven: bool
    words: str
    off: float | None = None
    crash: BaseException | None = None
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def wrong_yes(self) -> bool:
        return self.proven and not (self.off is not None and self.off <= SAME)

    @property
    def reason(self) -> str:
        """Why it was not proven: the error, or what failed and what was found."""
        statuses = (self.document.get("proof") or {}).get("statuses", [])
        failed = [(one["detail"], *one["findings"]) for one in statuses if one["state"] == "failed"]
        return "; ".join(text for texts in failed for text in texts) or str(self.document.get("error", self.words))


def source_of(net: str) -> str:
    """'reading.Alias' is the class or factory `Alias` of nets/reading.py."""
    file, _, factory = net.partition(".")
    return f"{NETS / file}.py:{factory}"


@functools.cache
def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"adversarial_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(net: str) -> nn.Module:
    """The plain net as a user's own script builds it."""
    path, _, factory = source_of(net).rpartition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model: nn.Module = getattr(_module(path), factory)()
    return model


def trained(net: str, with_inputs: bool = False) -> nn.Module:
    """The user's live model: converted, a few SGD steps, D moved as by a long training, one run in eval mode.

    Raises DoconvError where `to_doconv` refuses it.
    """
    live = drawn(net)
    dtype = next(live.parameters()).dtype
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    live = to_doconv(live, example_inputs=x[:2].clone() if with_inputs else None)
    _train(live, x)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            if is_d(name):
                parameter.add_(MOVED * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        live.train()(x.clone())
        live.eval()(x.clone())
    return live


def _train(net: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.02)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = sum((y.float() - 1).square().mean() for y in outputs(net.train()(x.clone())) if y.requires_grad)
        if not isinstance(loss, Tensor) or not loss.isfinite():
            return
        loss.backward()
        optimizer.step()


def fresh_inputs(dtype: torch.dtype) -> list[Tensor]:
    """Noise as in training, images far brighter than any that the proof makes up, and a single image."""
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(9))
    return [noise.to(dtype), (20 * noise + 100).to(dtype), noise[:1].to(dtype)]


def references(live: nn.Module) -> list[list[Tensor]] | None:
    """The live model's outputs on fresh inputs, in float64 where that is the same network; None where two runs
    differ or draw random numbers. Changes the model's dtype."""
    inputs = fresh_inputs(next(live.parameters()).dtype)
    with torch.no_grad():
        before = _generators()
        first, again = ([outputs(live(x.clone())) for x in inputs] for _ in range(2))
        if far(again, first) > 0 or _generators() != before:
            return None
        half = inputs[0].dtype in (torch.float16, torch.bfloat16)
        if half:
            _compose(live)
        try:
            exact = [outputs(live.double()(x.double())) for x in inputs]
        except RuntimeError:  # aliases, closures and views keep float32
            return first
    return exact if half or far(exact, first) < PRECISE else first


@torch.no_grad()
def _compose(net: nn.Module) -> None:
    """Every kernel by the paper's formula, k[o, c, p] = sum_s (I + D)[c, p, s] W[o, c, s], in float64, cast once: what
    a half-precision model has to ship. Then W is k, and D is 0."""
    for layer in net.modules():
        if isinstance(d := layer._parameters.get("D"), Tensor):
            weight = layer._parameters["weight"]
            full = torch.eye(d.shape[1], d.shape[2], dtype=torch.float64) + d.double()
            kernel = torch.einsum("cps,ocs->ocp", full, weight.double().flatten(2))
            weight.copy_(kernel.view_as(weight))
            d.zero_()


def _generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def far(got: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """The largest ||got - expected|| / ||expected|| over runs and outputs. Whole numbers: the part that differs.
    Infinite where shapes differ or only one is finite."""
    worst = 0.0
    for a, b in ((x, y) for run, other in zip(got, expected, strict=True) for x, y in zip(run, other, strict=True)):
        if a.shape != b.shape:
            return float("inf")
        if not b.is_floating_point():
            worst = max(worst, float((a != b).double().mean()))
            continue
        a, b = a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        a, b = a.nan_to_num(), b.nan_to_num()
        worst = max(worst, float((a - b).norm()) / max(float(b.norm()), 1e-300))
    return worst


def fold_command(checkpoint: Path, source: str, target: Path, *options: str) -> Seen:
    """`fold CHECKPOINT --model SOURCE --onnx TARGET --json` in this process."""
    arguments = ["fold", checkpoint, "--model", source, "--onnx", target, "--json", *options]
    return seen_of(CliRunner().invoke(app, [str(argument) for argument in arguments]))


def seen_of(result: Any) -> Seen:
    try:
        document = json.loads(result.stdout)
    except ValueError:
        document = {}
    crash = None if isinstance(result.exception, SystemExit | None) else result.exception
    words = f"{result.stdout}\n{result.stderr}"
    return Seen(result.exit_code, bool(document.get("proven")), words, crash=crash, document=document)


def run_file(path: Path, inputs: list[Tensor]) -> list[list[Tensor]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return [[torch.from_numpy(y) for y in session.run(None, {name: x.float().numpy()})] for x in inputs]


def fold_net(net: str, folder: Path, *, recipe: bool, with_inputs: bool) -> Seen:
    """Train `net`, save it (`recipe`: as a file of ours, else as `torch.save(state_dict)`), fold it, measure."""
    source = source_of(net)
    try:
        live = trained(net, with_inputs)
    except DoconvError as error:
        return Seen(1, False, f"to_doconv: {error}")
    checkpoint = folder / ("trained.safetensors" if recipe else "trained.pth")
    if recipe:
        try:
            save(live, checkpoint)
        except DoconvError as error:
            return Seen(1, False, f"save: {error}")
    else:
        torch.save(live.state_dict(), checkpoint)
    seen = fold_command(checkpoint, source, folder / "out.onnx")
    dtype = next(live.parameters()).dtype
    if (folder / "out.onnx").exists():
        expected = references(live)
        got = run_file(folder / "out.onnx", fresh_inputs(dtype))
        seen.off = float("nan") if expected is None else far(got, expected)
    return seen
