"""What the steps share: their options, the device, its clock, and the JSON they leave."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from doconv_convert.nn import composition


class Run:
    """One step's options. `dry`: tiny sizes on the CPU, which measure nothing."""

    def __init__(self, description: str | None) -> None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--json", type=Path, required=True)
        parser.add_argument("--seconds", type=float, default=60.0, help="nothing new starts after them")
        parser.add_argument("--dry", action="store_true")
        options = parser.parse_args()
        self.dry: bool = options.dry
        self._path: Path = options.json
        self._end = time.monotonic() + options.seconds
        if not self.dry and not torch.cuda.is_available():
            raise SystemExit(f"torch {torch.__version__} finds no CUDA device; --dry runs on the CPU.")
        self.device = torch.device("cpu" if self.dry else "cuda")

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def write(self, **result: Any) -> None:
        """What is known so far: a step that is cut short keeps it."""
        text = json.dumps({"dry": self.dry, **environment(self.device), **result}, indent=1)
        temporary = self._path.with_suffix(".part")
        temporary.write_text(text + "\n")
        os.replace(temporary, self._path)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: the card's name (None on a CPU) and the versions."""
    found: dict[str, Any] = {"gpu": None, "torch": torch.__version__, "cuda": torch.version.cuda, "triton": None}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["multiprocessors"] = properties.multi_processor_count
    return found


def turns(run: Run, arms: Mapping[str, Callable[[], Any]], rounds: int, block: float) -> dict[str, list[float]]:
    """Seconds a call of each arm in each round. An arm's turn is as many calls as fill `block` seconds, with one wait
    for the device at its end; every round starts with another arm."""
    names, calls = list(arms), {}
    for name in names:
        arms[name]()
        run.wait()
        start = time.perf_counter()
        arms[name]()
        run.wait()
        calls[name] = max(1, min(50, round(block / max(1e-6, time.perf_counter() - start))))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            run.wait()
            start = time.perf_counter()
            for _ in range(calls[name]):
                arms[name]()
            run.wait()
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return seconds


def quartiles(values: list[float], digits: int = 4) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(median, digits), "low": round(low, digits), "high": round(high, digits)}


def ratios(seconds: Mapping[str, list[float]], arm: str, base: str) -> dict[str, float]:
    """The median of the rounds' ratios, and the middle half of them."""
    return quartiles([a / b for a, b in zip(seconds[arm], seconds[base], strict=True)])


@contextmanager
def reported(failures: list[dict[str, str]], what: str) -> Iterator[None]:
    """A row that fails is written down, and the next one is tried."""
    try:
        yield
    except Exception as error:  # of a compiler, a driver, an allocator: whatever, the figures of the others stand
        print(f"{what}: {type(error).__name__}: {error}", flush=True)
        failures.append({"what": what, "error": f"{type(error).__name__}: {str(error)[:300]}"})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _is_nowhere(weight: torch.Tensor) -> bool:
    """One function: torch.compile would compile anew for another."""
    return False


@contextmanager
def torch_operations(_: nn.Module | None = None) -> Iterator[None]:
    """Compositions in torch's own operations, without the Triton kernels."""
    before = composition._is_on_gpu
    composition._is_on_gpu = _is_nowhere
    try:
        yield
    finally:
        composition._is_on_gpu = before
