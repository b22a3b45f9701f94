"""One kernel's composition, forward and backward: the ways taken, the textbook's, and what was tried and left.

    python benchmarks/speed/compositions.py [--rounds 40] [--json docs/data/benchmarks/compositions.json]

All ways take turns in one process, on a dense 3x3 kernel of C channels (D_mul = K = 9), which they leave contiguous
as a convolution needs it. `custom` stands for an autograd function whose products write straight into the kernel's
memory order, without a copy; `custom, in pieces` for one whose intermediate results stay in the cache: a MiB of rows
at a time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from interleaved import machine, rounds_of
from torch import Tensor
from torch.nn import functional as F

from doconv_convert.nn.composition import compose_kernel
from doconv_convert.nn.product import by_torch

Way = Callable[[Tensor, Tensor], Tensor]
EYE = torch.eye(9)


def block_diagonal(d: Tensor, width: int) -> Tensor:
    channels, k, s = d.shape
    blocks = d.reshape(channels // width, width, k, s).permute(0, 2, 3, 1)
    return torch.diag_embed(blocks, dim1=1, dim2=3).reshape(-1, width * k, width * s)


def by_block(w: Tensor, width: int) -> Tensor:
    """(blocks, C_out, width*9), a view."""
    return w.reshape(w.shape[0], w.shape[1] // width, -1).transpose(0, 1)


def textbook(w: Tensor, d: Tensor) -> Tensor:
    return torch.einsum("jps,ojs->ojp", d + EYE, w.flatten(2)).reshape(w.shape)


def transposed(w: Tensor, d: Tensor) -> Tensor:
    """In (C_in, K, C_out) order, with one transposing copy back."""
    base = w.flatten(1).t().reshape(w.shape[1], 9, w.shape[0])
    return torch.baddbmm(base, d, base).flatten(0, 1).t().reshape(w.shape)


def blocks(width: int) -> Way:
    def compose(w: Tensor, d: Tensor) -> Tensor:
        rows = by_block(w, width)
        product = torch.bmm(rows, block_diagonal(d, width).transpose(1, 2))
        return (rows.transpose(0, 1) + product.transpose(0, 1)).reshape(w.shape)

    return compose


def identity_in_d(w: Tensor, d: Tensor) -> Tensor:
    """Blocks of two, D^ instead of D: one addition less, and W goes through reduced-precision products too."""
    return torch.bmm(by_block(w, 2), block_diagonal(d + EYE, 2).transpose(1, 2)).transpose(0, 1).reshape(w.shape)


def grouped_convolution(w: Tensor, d: Tensor) -> Tensor:
    """Blocks of four as groups of a 1x1 convolution, whose channels-last memory is W's own."""
    outputs, channels = w.shape[:2]
    x = w.reshape(1, outputs, 1, -1).permute(0, 3, 1, 2)
    product = F.conv2d(x, block_diagonal(d, 4).reshape(9 * channels, 36, 1, 1), groups=channels // 4)
    return w + product.permute(0, 2, 3, 1).reshape(w.shape)


def in_blocks(products: Tensor, d: Tensor) -> Tensor:
    """D's gradient from the products of blocks of two channels: their diagonal blocks."""
    return products.view(-1, 2, 9, 2, 9).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(d.shape)


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, d: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(w, d)
        ctx.width = width
        return _Custom.product(w, d, width)

    @staticmethod
    def product(w: Tensor, d: Tensor, width: int) -> Tensor:
        kernel, rows = torch.empty_like(w), by_block(w, width)
        torch.baddbmm(rows, rows, block_diagonal(d, width).transpose(1, 2), out=by_block(kernel, width))
        return kernel

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        w, d = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        products = torch.bmm(by_block(gradient, 2).transpose(1, 2), by_block(w, 2))
        return _Custom.product(gradient, d.transpose(1, 2), ctx.width), in_blocks(products, d), None


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(w, d)
        return _Pieces.product(w, d)

    @staticmethod
    def product(w: Tensor, d: Tensor) -> Tensor:
        kernel, diagonal = torch.empty_like(w), block_diagonal(d, 2).transpose(1, 2)
        for rows, target in zip(w.split(_rows(w)), kernel.split(_rows(w)), strict=True):
            base = by_block(rows, 2)
            torch.add(base, torch.bmm(base, diagonal), out=by_block(target, 2))
        return kernel

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        w, d = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        products = torch.zeros(w.shape[1] // 2, 18, 18)
        for rows, row_gradient in zip(w.split(_rows(w)), gradient.split(_rows(w)), strict=True):
            products += torch.bmm(by_block(row_gradient, 2).transpose(1, 2), by_block(rows, 2))
        return _Pieces.product(gradient, d.transpose(1, 2)), in_blocks(products, d)


def _rows(w: Tensor) -> int:
    return max(1, 2**18 // w[0].numel())


def pieces(w: Tensor, d: Tensor) -> Tensor:
    return _Pieces.apply(w, d)  # type: ignore[no-any-return, no-untyped-call]


def custom(width: int) -> Way:
    return lambda w, d: _Custom.apply(w, d, width)  # type: ignore[no-any-return, no-untyped-call]


WAYS: dict[str, Way] = {
    "ours": compose_kernel,
    "ours, without product.c (blocks of 2)": lambda w, d: by_torch(w, w, d, 1),
    "textbook": textbook,
    "transposed copies": transposed,
    "blocks of 1": blocks(1),
    "blocks of 4": blocks(4),
    "blocks of 8": blocks(8),
    "identity in D": identity_in_d,
    "grouped convolution": grouped_convolution,
    "custom, in pieces": pieces,
    "custom, blocks of 2": custom(2),
    "custom, blocks of 4": custom(4),
    "custom, blocks of 8": custom(8),
}


def measure(channels: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    w = torch.randn(channels, channels, 3, 3, requires_grad=True)
    d = (0.1 * torch.randn(channels, 9, 9)).requires_grad_()
    gradient = torch.randn_like(w)
    for way in WAYS.values():
        expected, got = (torch.autograd.grad(each(w, d), (w, d), gradient) for each in (textbook, way))
        torch.testing.assert_close(way(w, d), textbook(w, d), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)

    def both(way: Way) -> None:
        w.grad = d.grad = None
        way(w, d).contiguous().backward(gradient)  # type: ignore[no-untyped-call]

    seconds = rounds_of({name: lambda way=way: both(way) for name, way in WAYS.items()}, rounds, warm=5)
    return {name: round(1e3 * sorted(each)[rounds // 2], 3) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = {str(channels): measure(channels, options.rounds) for channels in (64, 128, 256, 512)}
    for name in WAYS:
        print(f"{name:38s}" + "".join(f"{row[name]:10.2f}" for row in sizes.values()) + "  ms")
    if options.json:
        result = {**machine(), "rounds": options.rounds, "milliseconds": sizes}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
