"""Fair comparisons: all arms in one process, turn by turn, and the medians of the rounds' ratios."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from doconv_convert.nn import native

Arms = Mapping[str, Callable[[], Any]]


def machine() -> dict[str, Any]:
    """What a figure depends on, without naming the machine; `vectors` are those that product.c was compiled for."""
    model = ""
    try:
        with open("/proc/cpuinfo") as lines:
            model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass
    return {
        "machine": f"{model or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability() if native.LIBRARIES else None,
    }


def rounds_of(arms: Arms, rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each arm in each round; every round starts with another arm."""
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            arms[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], arm: str, base: str) -> dict[str, float]:
    """The median of the rounds' ratios, and the middle half of them (their spread)."""
    each = [a / b for a, b in zip(seconds[arm], seconds[base], strict=True)]
    low, median, high = statistics.quantiles(each, n=4)
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}
