"""`doconv-convert demo`: the whole way on real handwritten digits, in under a minute, offline."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from doconv_convert.cli import options as o
from doconv_convert.cli.console import Output, check_failed, output
from doconv_convert.errors import DoconvError

if TYPE_CHECKING:
    from torch import Tensor, nn

_FILES = ("digits.py", "digits.npz", "digits.LICENSE.md")
# Over 8 seeds this recipe reached 97.5 to 98.3 % of the held-out digits with plain convolutions.
_PEAK_RATE, _DECAY, _BATCH = 5e-3, 0.05, 64


def demo(
    folder: Annotated[Path, typer.Argument(help="Where to leave every file of the run.")] = Path("doconv-demo"),
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the 1,437 training digits.")] = 20,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Convert a small network, train it on real digits, fold it, export it, prove it."""
    with output(as_json, quiet, debug) as shown:
        from doconv_convert.artifacts.checkpoints.checkpoint import save
        from doconv_convert.artifacts.sources.factories import load_module
        from doconv_convert.artifacts.sources.inputs import Inputs
        from doconv_convert.artifacts.sources.source import build, parse_source
        from doconv_convert.check.torch_runs.exact_start import require_same_start
        from doconv_convert.rewrite.convert import to_doconv
        from doconv_convert.rewrite.options import Options
        from doconv_convert.rewrite.plan import plan
        from doconv_convert.workflows.fold import fold_and_prove
        from doconv_convert.workflows.trained_model import load_trained

        _lay_out(folder)
        source = parse_source(f"{folder / 'digits.py'}:digits")
        digits: Any = load_module(source.place)
        train, (images, labels) = digits.split(*digits.load_digits())

        original = build(source, seed=seed)
        planned = plan(original, (images[:2],))
        model = to_doconv(original, seed=seed)
        require_same_start(original, model, (images[:64],))
        save(model, folder / "start.safetensors", source=source)
        counts = ", ".join(f"{count} {what}" for what, count in planned.counts().items())
        shown.say(f"1. converted: {counts}; the same outputs, bit for bit")

        with _progress(shown, epochs * -(-len(train[0]) // _BATCH)) as step:
            loss = _train(model, train, digits.jitter, epochs, seed, step)
        save(model, folder / "trained.safetensors", source=source)
        shown.say(f"2. trained on {len(train[0]):,} real digits for {epochs} epochs, last loss {loss:.3f}")

        loaded = load_trained(folder / "trained.safetensors", source, Options())
        inputs = Inputs([], (images,))
        made = fold_and_prove(
            loaded, inputs, plain=folder / "plain.safetensors", onnx=folder / "digits.onnx", progress=shown.step
        )
        proof = made.proof
        if proof is None:
            raise DoconvError("the demo made no proof; please report it.")
        shown.say("3. folded, exported and proven:")
        shown.proof(proof)
        if not proof.proven:
            check_failed()
        rows = _results(folder, source, loaded.trained, images, labels, proof.macs or 0, _composition_macs(planned))
        shown.say(f"4. on the {len(labels)} held-out digits (MACs of one image; FLOPs = 2 x MACs):")
        shown.table(
            ["model", "parameters", "MACs", "correct", "accuracy"], [row[:5] for row in rows], right=(1, 2, 3, 4)
        )
        agree = all(bool((row[5] == rows[0][5]).all()) for row in rows)
        shown.say("the three agree on every image" if agree else "the three do NOT agree on every image")
        shown.say("files: " + ", ".join(sorted(str(path) for path in folder.iterdir() if path.is_file())))
        shown.document = {
            "folder": str(folder),
            "loss": loss,
            "models": [
                dict(zip(("model", "parameters", "macs", "correct", "accuracy"), row, strict=False)) for row in rows
            ],
            "agree": agree,
            "proof": proof.to_json(),
        }
        if not agree:
            check_failed()


def _lay_out(folder: Path) -> None:
    from doconv_convert.artifacts.sources.source import sample_models_folder

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            shutil.copyfile(sample_models_folder() / name, folder / name)
    except OSError as error:
        raise DoconvError(f"cannot write '{folder}': {error.strerror}; choose another folder.") from error


def _train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    jitter: Callable[[Tensor], Tensor],
    epochs: int,
    seed: int,
    step: Callable[[float], None],
) -> float:
    import torch

    images, labels = data
    steps = -(-len(images) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_RATE, total_steps=epochs * steps)
    loss = torch.zeros(())
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for chosen in torch.split(torch.randperm(len(images)), _BATCH):
                loss = torch.nn.functional.cross_entropy(model(jitter(images[chosen])), labels[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                step(float(loss.detach()))
    return float(loss.detach())


def _results(
    folder: Path, source: Any, trained: nn.Module, images: Tensor, labels: Tensor, macs: int, composition: int
) -> list[tuple[Any, ...]]:
    """(name, parameters, MACs, correct, accuracy, predictions) of the three forms of the network."""
    import torch

    from doconv_convert.artifacts.checkpoints.checkpoint import load_strictly
    from doconv_convert.artifacts.checkpoints.reading import read_checkpoint
    from doconv_convert.artifacts.sources.source import build
    from doconv_convert.check.outputs.session import run_onnx

    plain = build(source)
    load_strictly(plain, read_checkpoint(folder / "plain.safetensors").state, "plain.safetensors")
    with torch.no_grad():
        scores = [trained.eval()(images), plain.eval()(images)]
    scores.append(torch.from_numpy(run_onnx(folder / "digits.onnx", [images.numpy()])[1][0]))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (trained, plain, plain)]
    names = ("DO-Conv, as trained", "folded, torch", "folded, onnxruntime")
    rows = []
    for name, size, cost, score in zip(names, sizes, (macs + composition, macs, macs), scores, strict=True):
        found = score.argmax(1)
        correct = int((found == labels).sum())
        rows.append((name, size, cost, correct, f"{correct / len(labels):.2%}", found))
    return rows


def _composition_macs(planned: Any) -> int:
    """What composing every kernel once costs (the first term of `kernel_macs`)."""
    from doconv_convert.nn.composition import kernel_macs

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


class _progress:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, shown: Output, total: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("   training"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeRemainingColumn(),
        )
        visible = shown.terminal and not shown.quiet
        self.bar = Progress(*columns, console=shown.console, transient=True, disable=not visible)
        self.task = self.bar.add_task("training", total=total, loss=0.0)

    def __enter__(self) -> Callable[[float], None]:
        self.bar.start()
        return lambda loss: self.bar.update(self.task, advance=1, loss=loss)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
