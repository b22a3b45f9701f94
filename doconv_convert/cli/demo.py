"""`doconv-convert demo`: the whole way on real handwritten digits, in under a minute, offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from doconv_convert.cli import options as o
from doconv_convert.cli.console import Output, check_failed, output

if TYPE_CHECKING:
    from doconv_convert.workflows.demo import DemoResult


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
        from doconv_convert.workflows.demo import run_demo

        result = run_demo(
            folder,
            epochs,
            seed,
            say=shown.say,
            training=lambda total: _training(shown, total),
            progress=shown.step,
        )
        shown.document = result.to_json()
        _show(shown, result)
        if not result.agree:
            check_failed()


def _show(shown: Output, result: DemoResult) -> None:
    shown.say("3. folded, exported and proven:")
    shown.proof(result.proof)
    if not result.proof.proven:
        return
    shown.say(f"4. on the {result.held_out} held-out digits (MACs of one image; FLOPs = 2 x MACs):")
    head = ["model", "parameters", "MACs", "correct", "accuracy"]
    shown.table(head, [astuple(score) for score in result.scores], right=(1, 2, 3, 4))
    shown.say("the three agree on every image" if result.agree else "the three do NOT agree on every image")
    shown.say("files: " + ", ".join(sorted(str(path) for path in result.folder.iterdir() if path.is_file())))


@contextmanager
def _training(shown: Output, total: int) -> Iterator[Callable[[float], None]]:
    """A bar with the loss on a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("   training"), BarColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn()
    with Progress(*columns, console=shown.console, transient=True, disable=shown.quiet or not shown.terminal) as bar:
        task = bar.add_task("training", total=total, loss=0.0)
        yield lambda loss: bar.update(task, advance=1, loss=loss)
