"""The card itself: what a copy and a matrix product reach, as the limits that other figures are held against."""

from __future__ import annotations

import torch
from on_device import Run, quartiles, turns


def main() -> None:
    run = Run(__doc__)
    numbers, side = (2**16, 64) if run.dry else (2**30, 8192)
    source = torch.randn(numbers // 4, device=run.device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    arms = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    seconds = turns(run, arms, rounds=3 if run.dry else 15, block=0.02)
    copied = quartiles([2 * source.nbytes / each / 1e9 for each in seconds["copy"]], 1)
    reached = quartiles([2 * side**3 / each / 1e12 for each in seconds["product"]], 1)
    run.write(copy_gb_per_second=copied, bf16_product_tflops=reached)
    print(f"copy {copied['median']} GB/s (read and written), bf16 product of {side}: {reached['median']} TFLOP/s")


if __name__ == "__main__":
    main()
