"""What torchrun starts: trains every net with DDP and with FSDP2 on CPUs, and saves folders of
torch.distributed.checkpoint. `train_distributed.py FOLDER`; the losses go to FOLDER/losses.json."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support import is_d
from support_training import NETS, STEPS, converted, images, sgd
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from doconv_convert.nn.overlay import stored_kernels


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    """As people do it: the blocks first, one parameter group each, then the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model.children():
        if stored_kernels(child):
            fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_root(model: nn.Module) -> nn.Module:
    """One parameter group for all; every D stays whole on every process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {parameter for name, parameter in model.named_parameters() if is_d(name)}
    return fully_shard(model, mesh=mesh, ignored_params=whole)


ENGINES = {"ddp": ddp, "fsdp2": fsdp2, "fsdp2-root": fsdp2_root}


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Each process takes its part of the same global batch; the losses are the whole batch's."""
    x, labels = (part.chunk(dist.get_world_size())[dist.get_rank()] for part in images())
    losses = []
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(x.double()), labels)
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            if isinstance(model, FSDPModule) and not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad, dist.ReduceOp.AVG)
        optimizer.step()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        losses.append(float(whole) / dist.get_world_size())
    return losses


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    losses = {}
    for engine, wrap in ENGINES.items():
        for kind, make in NETS.items():
            model = converted(make(norm="group").double(), d_mul="K+3")
            wrapped = wrap(model)
            optimizer = sgd(wrapped.parameters())
            name = f"{engine}-{kind}"
            losses[name] = train(wrapped, optimizer)
            if engine != "ddp":
                dcp.save(model.state_dict(), checkpoint_id=folder / f"{name}-flat")
            own, state = get_state_dict(wrapped, optimizer)
            content = {"app": {"model": own, "optim": state, "epoch": 3}}
            dcp.save(content, checkpoint_id=folder / f"{name}-nested")
    if dist.get_rank() == 0:
        (folder / "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    # No orderly end: gloo's threads race with the interpreter's, and now and then abort a process that is done.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
