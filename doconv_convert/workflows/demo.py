"""`demo`, step by step: convert a small network, train it on real digits, fold, export, prove, count what is right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doconv_convert.artifacts.checkpoints.checkpoint import load_strictly, save
from doconv_convert.artifacts.checkpoints.reading import read_checkpoint
from doconv_convert.artifacts.sources.factories import load_module
from doconv_convert.artifacts.sources.inputs import Inputs
from doconv_convert.artifacts.sources.source import Source, build, parse_source, sample_models_folder
from doconv_convert.check.outputs.session import run_onnx
from doconv_convert.check.status import Proof
from doconv_convert.check.torch_runs.exact_start import require_same_start
from doconv_convert.errors import DoconvError
from doconv_convert.nn.composition import kernel_macs
from doconv_convert.rewrite.convert import to_doconv
from doconv_convert.rewrite.options import Options
from doconv_convert.rewrite.plan import Plan, plan
from doconv_convert.workflows.fold import Progress, fold_and_prove
from doconv_convert.workflows.overwrites import refuse_overwrites
from doconv_convert.workflows.trained_model import load_trained

_FILES = ("digits.py", "digits.npz", "digits.LICENSE.md")
# Over 8 seeds this recipe reached 97.5 to 98.3 % of the held-out digits with plain convolutions.
_PEAK_RATE, _DECAY, _BATCH = 5e-3, 0.05, 64

Data = tuple[Tensor, Tensor]  # images (N, 1, 8, 8) float32, labels (N,) int64
Bar = Callable[[int], AbstractContextManager[Callable[[float], None]]]


@dataclass(frozen=True)
class Score:
    """One form of the network on the held-out digits. `macs` are one image's."""

    model: str
    parameters: int
    macs: int
    correct: int
    accuracy: str


@dataclass(frozen=True)
class DemoResult:
    """The last batch's `loss`, the proof and, where that holds, the `scores` of the three forms of the network on
    `held_out` digits, and whether they `agree` on every one."""

    folder: Path
    loss: float
    proof: Proof
    held_out: int
    scores: list[Score] = field(default_factory=list)
    agree: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "loss": self.loss,
            "models": [asdict(score) for score in self.scores],
            "agree": self.agree,
            "proof": self.proof.to_json(),
        }


def run_demo(
    folder: Path, epochs: int, seed: int, *, say: Callable[[str], None], training: Bar, progress: Progress
) -> DemoResult:
    """Leaves every file of the run in `folder`. `say` is told what each of the first steps came to; `training` opens
    a bar over so many optimizer steps, which is told each one's loss. Raises DoconvError."""
    _copy_files(folder)
    source = parse_source(f"{folder / 'digits.py'}:digits")
    digits: Any = load_module(source.place)
    train, held_out = digits.split(*digits.load_digits())
    model, planned = _convert(source, held_out[0], folder / "start.safetensors", seed)
    counts = ", ".join(f"{count} {what}" for what, count in planned.counts().items())
    say(f"1. converted: {counts}; the same outputs, bit for bit")

    trained = folder / "trained.safetensors"
    with training(epochs * _steps(train)) as step:
        loss = _train(model, train, digits.jitter, epochs, seed, step)
    save(model, trained, source=source)
    say(f"2. trained on {len(train[0]):,} real digits for {epochs} epochs, last loss {loss:.3f}")

    loaded = load_trained(trained, source, Options())
    plain, onnx = folder / "plain.safetensors", folder / "digits.onnx"
    proof = fold_and_prove(loaded, Inputs([], held_out[:1]), plain=plain, onnx=onnx, progress=progress).proof
    if proof is None:
        raise DoconvError("the demo made no proof; please report it.")
    if not proof.proven:
        return DemoResult(folder, loss, proof, len(held_out[0]))
    forms = _run_forms(source, loaded.trained, plain, onnx, held_out[0], proof.macs or 0, _composition_macs(planned))
    found = [classes for *_, classes in forms]
    scores = [_score(*form, held_out[1]) for form in forms]
    agree = all(torch.equal(classes, found[0]) for classes in found)
    return DemoResult(folder, loss, proof, len(held_out[0]), scores, agree)


def _copy_files(folder: Path) -> None:
    shipped = sample_models_folder()
    refuse_overwrites(
        {f"the demo's {name}": shipped / name for name in _FILES},
        {f"the folder's {name}": folder / name for name in _FILES},
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            shutil.copyfile(shipped / name, folder / name)
    except OSError as error:
        raise DoconvError(f"cannot write '{folder}': {error.strerror}; choose another folder.") from error


def _convert(source: Source, images: Tensor, out: Path, seed: int) -> tuple[nn.Module, Plan]:
    original = build(source, seed=seed)
    planned = plan(original, (images[:2],))
    model = to_doconv(original, seed=seed)
    require_same_start(original, model, (images[:64],))
    save(model, out, source=source)
    return model, planned


def _steps(data: Data) -> int:
    return -(-len(data[0]) // _BATCH)


def _train(
    model: nn.Module,
    data: Data,
    jitter: Callable[[Tensor], Tensor],
    epochs: int,
    seed: int,
    step: Callable[[float], None],
) -> float:
    images, labels = data
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_RATE, total_steps=epochs * _steps(data))
    loss = torch.zeros(())
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for chosen in torch.split(torch.randperm(len(images)), _BATCH):
                loss = F.cross_entropy(model(jitter(images[chosen])), labels[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                step(float(loss.detach()))
    return float(loss.detach())


def _run_forms(
    source: Source, trained: nn.Module, plain: Path, onnx: Path, images: Tensor, macs: int, composition: int
) -> list[tuple[str, int, int, Tensor]]:
    """The name, parameters, MACs and found classes (N,) of the network as trained, folded, and exported."""
    folded = build(source)
    load_strictly(folded, read_checkpoint(plain).state, str(plain))
    with torch.no_grad():
        scores = [trained.eval()(images), folded.eval()(images)]
    scores.append(torch.from_numpy(run_onnx(onnx, [images.numpy()])[1][0]))
    classes = [one.argmax(1) for one in scores]
    more, less = (sum(p.numel() for p in model.parameters()) for model in (trained, folded))
    return [
        ("DO-Conv, as trained", more, macs + composition, classes[0]),
        ("folded, torch", less, macs, classes[1]),
        ("folded, onnxruntime", less, macs, classes[2]),
    ]


def _score(name: str, parameters: int, macs: int, classes: Tensor, labels: Tensor) -> Score:
    correct = int((classes == labels).sum())
    return Score(name, parameters, macs, correct, f"{correct / len(labels):.2%}")


def _composition_macs(planned: Plan) -> int:
    """What composing every kernel once costs (the first term of `kernel_macs`)."""
    return sum(
        kernel_macs(
            in_channels=row.in_channels,
            out_channels=row.out_channels,
            kernel_positions=row.kernel[0] * row.kernel[1],
            d_mul=row.d_mul,
            groups=row.groups,
            batch=0,
        )
        for row in planned.rows
        if row.d_mul is not None
    )
