"""What DO-Conv costs in training: a step of ours and of a textbook layer, over a plain convolution's.

    python benchmarks/speed/training_step.py [--only resnet18] [--rounds 15]
        [--json docs/data/benchmarks/training_step.json]

Each step is forward, loss, backward and SGD with momentum, on random images; the models take turns in one process.
RetinaNet and RAFT, whose heads and update block run many times in one forward, have one more arm, inside `cached`;
all others one whose compositions are left to torch, without product.c. composition="auto" is one where it takes
features anywhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from interleaved import Arms, machine, ratios, rounds_of
from textbook import to_textbook
from torch import Tensor, nn
from workloads import Trainer, Workload

from doconv_convert import DOConv2d, cached, to_doconv
from doconv_convert.nn import native

WORKLOADS = [
    Workload("resnet18", 16, 224),
    Workload("resnet18", 8, 224),
    Workload("resnet18", 32, 64),
    Workload("resnet50", 8, 224),
    Workload("resnet50", 32, 64),
    Workload("resnext50_32x4d", 8, 224),
    Workload("resnext50_32x4d", 32, 64),
    Workload("mobilenet_v2", 8, 224),
    Workload("mobilenet_v2", 32, 64),
    Workload("convnext_tiny", 8, 224),
    Workload("convnext_tiny", 32, 64),
    Workload("retinanet_resnet50_fpn", 1, 384),
    Workload("retinanet_resnet50_fpn", 1, 192),
    Workload("raft_small", 1, 256),
    Workload("raft_small", 1, 128),
]


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    plain, loss = workload.build(), workload.loss()
    trainers = {
        "plain": Trainer(plain, loss),
        "ours": Trainer(to_doconv(plain), loss),
        "textbook": Trainer(to_textbook(plain), loss),
    }
    if workload.model.startswith(("retinanet", "raft")):
        trainers["cached"] = Trainer(to_doconv(plain), loss, cached)
    else:
        trainers["torch"] = Trainer(to_doconv(plain), loss, without_product)
    auto = to_doconv(plain, composition="auto").train()
    if takes_features(auto, loss):
        trainers["auto"] = Trainer(auto, loss)
    arms: Arms = {name: trainer.step for name, trainer in trainers.items()}
    seconds = rounds_of(arms, rounds)
    over = {name: ratios(seconds, name, "plain") for name in arms if name != "plain"}
    median = sorted(seconds["plain"])[rounds // 2]
    return {"workload": workload.title, "rounds": rounds, "seconds": median, "over_plain": over}


@contextmanager
def without_product(model: nn.Module) -> Iterator[None]:
    libraries = dict(native.LIBRARIES)
    native.LIBRARIES.clear()
    try:
        yield
    finally:
        native.LIBRARIES.update(libraries)


def takes_features(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> bool:
    """Whether any of the model's layers does in a forward."""
    taken: list[bool] = []
    layers = [module for module in model.modules() if isinstance(module, DOConv2d) and module.D is not None]
    handles = [
        layer.register_forward_pre_hook(lambda m, args: taken.append(m.takes_features(*args))) for layer in layers
    ]
    loss(model)
    for handle in handles:
        handle.remove()
    return any(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="workloads whose title has this text")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    old = json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() else []
    rows = {row["workload"]: row for row in old}  # those that are not measured now stay
    for workload in WORKLOADS:
        if options.only not in workload.title:
            continue
        row = rows[workload.title] = measure(workload, options.rounds)
        told = "   ".join(
            f"{n} {r['median']:.3f} ({r['low']:.3f}-{r['high']:.3f})" for n, r in row["over_plain"].items()
        )
        print(f"{row['workload']:42s} {row['seconds']:6.2f} s   {told}", flush=True)
        if options.json:
            options.json.write_text(json.dumps({**machine(), "rows": [*rows.values()]}, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_flush_denormal(True)  # gradients of random targets get tiny; their slow arithmetic is nobody's cost
    main()
