"""What a terminal shows while a command works: what is being done, and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from math import ceil

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


@contextmanager
def counting(console: Console, doing: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar over `total` equal parts; what it yields is called once a finished part."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def stepping(console: Console, shares: Mapping[str, float]) -> Iterator[Callable[[str], None]]:
    """A line with the present step, the time so far and, once a step is done, the time left.

    `shares` are the steps' parts of the whole time, in order, as ResNet-18 and MobileNetV2 take them. What it yields is
    called with the name of the step that begins; one that is not among them keeps the estimate.
    """
    columns = SpinnerColumn(), TextColumn("{task.description} ..."), TimeElapsedColumn(), _TimeLeft()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(next(iter(shares)), total=None, whole=None)

        def step(name: str) -> None:
            bar.update(task, description=name)
            done = part_done(shares, name)
            if done:
                bar.update(task, whole=(bar.tasks[0].elapsed or 0.0) / done)

        yield step


def part_done(shares: Mapping[str, float], name: str) -> float:
    """The part of the time that is over when the step `name` begins; 0 where that is not known."""
    names = list(shares)
    return sum(shares[earlier] for earlier in names[: names.index(name)]) if name in names else 0.0


class _TimeLeft(ProgressColumn):
    """The estimated whole less what has passed."""

    def render(self, task: Task) -> Text:
        whole = task.fields["whole"]
        if whole is None:
            return Text()
        left = timedelta(seconds=max(1, ceil(whole - (task.elapsed or 0.0))))
        return Text(f"about {left} left", style="progress.remaining")
