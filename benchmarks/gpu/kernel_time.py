"""One kernel's composition on the card, forward and backward: its time against what the memory traffic takes.

Every way runs over as many tensors as the card's caches cannot hold, recorded as one CUDA graph: no launch from the
host is in these times. `limit` is the bytes that must move (each input read once, each output written once) over what
a copy of this card reaches. `host` is what one composition with its backward costs the process that launches it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from on_device import Run, quartiles, reported, turns
from torch import Tensor

from doconv_convert.nn import cuda
from doconv_convert.nn.composition import compose_kernel
from doconv_convert.nn.product import by_torch

Way = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Shape:
    """A kernel (C_out, C_in/g, k, k) with D of D_mul = K."""

    c_out: int
    c_in: int
    kernel: int
    groups: int = 1
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @property
    def title(self) -> str:
        layout = ", channels_last" if self.channels_last else ""
        size = f"{self.c_out} x {self.c_in // self.groups} x {self.kernel} x {self.kernel}"
        return f"{size}, {self.groups} groups, {str(self.dtype).removeprefix('torch.')}{layout}"

    def draw(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """W, D, and a gradient of the kernel."""
        positions = self.kernel**2
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        size = self.c_out, self.c_in // self.groups, self.kernel, self.kernel
        weight, gradient = (
            torch.randn(size, device=device).to(self.dtype).contiguous(memory_format=layout) for _ in range(2)
        )
        d = torch.randn(self.c_in, positions, positions, device=device).to(self.dtype) / positions
        return weight.requires_grad_(), d.requires_grad_(), gradient


SHAPES = [
    Shape(512, 512, 3),
    Shape(512, 512, 3, channels_last=True),
    Shape(768, 768, 7, groups=768, channels_last=True),
    Shape(960, 960, 3, groups=960, channels_last=True),
    Shape(256, 256, 3, channels_last=True),
    Shape(64, 64, 3, channels_last=True),
    Shape(64, 3, 7, channels_last=True),
    Shape(512, 512, 3, dtype=torch.bfloat16),
    Shape(1024, 1024, 3, groups=32),
    Shape(256, 256, 3),
    Shape(64, 64, 3),
    Shape(768, 768, 7, groups=768),
]
DRY = [Shape(16, 8, 3), Shape(16, 8, 3, channels_last=True), Shape(8, 8, 3, groups=8, dtype=torch.bfloat16)]


def ours(weight: Tensor, d: Tensor, groups: int) -> Tensor:
    return compose_kernel(weight, d, None, groups)


def torch_operations(weight: Tensor, d: Tensor, groups: int) -> Tensor:
    wide = weight.float()
    kernel = by_torch(wide, wide, d.float(), groups).to(weight.dtype)
    return kernel.contiguous(memory_format=layout_of(weight))


def textbook(weight: Tensor, d: Tensor, groups: int) -> Tensor:
    d_hat = (d + torch.eye(d.shape[1], dtype=d.dtype, device=d.device)).view(groups, -1, *d.shape[1:])
    w = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    kernel = torch.einsum("gjps,gojs->gojp", d_hat, w).reshape(weight.shape)
    return kernel.contiguous(memory_format=layout_of(weight))


def layout_of(weight: Tensor) -> torch.memory_format:
    return torch.contiguous_format if weight.is_contiguous() else torch.channels_last


WAYS: dict[str, Way] = {"ours": ours, "torch": torch_operations, "textbook": textbook}


def recorded(run: Run, function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` as a CUDA graph's replay; itself on a CPU."""
    if run.dry:
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def bytes_moved(shape: Shape, weight: Tensor, d: Tensor) -> dict[str, int]:
    return {"forward": 2 * weight.nbytes + d.nbytes, "both": 5 * weight.nbytes + 3 * d.nbytes}


def measure(shape: Shape, run: Run, copied: float) -> dict[str, Any]:
    """Microseconds a composition, forward alone and with its backward."""
    one = shape.draw(run.device)
    held = sum(tensor.nbytes for tensor in one)
    sets = [one] + [shape.draw(run.device) for _ in range(1 if run.dry else min(99, 256 * 2**20 // held))]
    arms: dict[str, Callable[[], Any]] = {}
    host: dict[str, float] = {}
    for name, way in WAYS.items():

        def forward(way: Way = way) -> None:
            with torch.no_grad():
                for weight, d, _ in sets:
                    way(weight, d, shape.groups)

        def both(way: Way = way) -> None:
            for weight, d, gradient in sets:
                torch.autograd.grad(way(weight, d, shape.groups), (weight, d), gradient)

        arms[f"{name} forward"], arms[f"{name} both"] = recorded(run, forward), recorded(run, both)
        host[name] = launched(run, both) / len(sets)
    seconds = turns(run, arms, 3 if run.dry else 9, 0.005)
    per_call = {name: quartiles([1e6 * each / len(sets) for each in values], 2) for name, values in seconds.items()}
    moved = bytes_moved(shape, one[0], one[1])
    limit = {name: round(number / copied * 1e6, 2) for name, number in moved.items()}
    told = "   ".join(f"{name} {each['median']:.1f}" for name, each in per_call.items())
    print(f"{shape.title:52s} limit {limit['forward']:.1f}/{limit['both']:.1f} us   {told}", flush=True)
    return {
        "shape": shape.title,
        "sets": len(sets),
        "microseconds": per_call,
        "limit_microseconds": limit,
        "bytes": moved,
        "host_microseconds": {name: round(1e6 * each, 1) for name, each in host.items()},
    }


def tiles(run: Run, last: bool) -> list[dict[str, Any]]:
    """Microseconds of both kernels, at other tiles: rows x columns, warps; and more or fewer parts of the rows."""
    from doconv_convert.nn import triton_kernels as kernels

    shape = Shape(16, 8, 3) if run.dry else Shape(512, 512, 3, channels_last=last)
    sets = [shape.draw(run.device) for _ in range(1 if run.dry else 14)]
    before = kernels.product_tile, kernels.correlation_tile
    found = []
    product_tiles = [(8, 128, 4), (16, 128, 4), (16, 128, 8), (32, 128, 8), (16, 64, 4), (32, 64, 4), (16, 256, 8)]
    correlation_tiles = [(4, 64, 4, 14), (8, 64, 4, 14), (4, 32, 4, 8), (4, 128, 4, 28), (2, 64, 2, 14), (4, 64, 4, 28)]

    def timed(what: dict[str, Any], call: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        if run.left < 3 and not run.dry:
            return

        def all_sets() -> None:
            for one in sets:
                call(*one)

        with torch.no_grad():
            seconds = turns(run, {"x": recorded(run, all_sets)}, 5, 0.003)["x"]
        found.append({**what, "microseconds": quartiles([1e6 * each / len(sets) for each in seconds], 2)})
        print(shape.title, found[-1], flush=True)

    try:
        for rows, columns, warps in product_tiles:
            tile = kernels.Tile(rows, columns, 1, warps)
            kernels.product_tile = lambda *_, tile=tile, **__: tile
            timed({"product": [rows, columns, warps]}, lambda w, d, g: kernels.compose(w, d, None, 1))
        for unroll, columns, warps, splits in correlation_tiles:
            tile = kernels.Tile(unroll, columns, 16, warps)
            kernels.correlation_tile = lambda *_, tile=tile, splits=splits: (tile, splits)
            out = torch.empty_like(sets[0][1])
            timed(
                {"correlation": [unroll, columns, warps, splits]},
                lambda w, d, g, out=out: kernels._launch_correlation(out, g, w, None, 1),
            )
    finally:
        kernels.product_tile, kernels.correlation_tile = before
    return found


def launched(run: Run, function: Callable[[], Any]) -> float:
    """Seconds until the host is done with it; the card may be at work still."""
    run.wait()
    start = time.perf_counter()
    function()
    taken = time.perf_counter() - start
    run.wait()
    return taken


def copy_rate(run: Run) -> float:
    """Bytes a second, read and written."""
    source = torch.randn(2**14 if run.dry else 2**28, device=run.device)
    target = torch.empty_like(source)
    seconds = turns(run, {"copy": lambda: target.copy_(source)}, 7, 0.01)["copy"]
    return 2 * source.nbytes / sorted(seconds)[len(seconds) // 2]


def main() -> None:
    run = Run(__doc__)
    copied = copy_rate(run)
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    left_out: list[str] = []
    for shape in DRY if run.dry else SHAPES:
        if run.left < 4 and not run.dry:
            left_out.append(shape.title)
            continue
        with reported(failures, shape.title):
            rows.append(measure(shape, run, copied))
        run.write(copy_gb_per_second=round(copied / 1e9, 1), rows=rows, failures=failures, left_out=left_out)
    others: list[dict[str, Any]] = []
    for last in (False, True):
        # On a CPU only Triton's interpreter could run them, and the tests do that.
        if run.left > 6 and cuda.kernels is not None and not run.dry:
            with reported(failures, "tiles"):
                others += [{"channels_last": last, **each} for each in tiles(run, last)]
    rate = round(copied / 1e9, 1)
    run.write(copy_gb_per_second=rate, rows=rows, tiles=others, failures=failures, left_out=left_out)
    if failures:
        raise SystemExit(f"{len(failures)} shapes failed")


if __name__ == "__main__":
    main()
