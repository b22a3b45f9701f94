"""The order of things: what is wrapped, compiled or handed to an optimizer before the conversion."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import is_d
from support_training import MOVED, NETS, converted, images, least_moved_d, loss_of, sgd, train
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from doconv_convert import DoconvError, cached, fold, param_groups, save, to_doconv


@pytest.fixture
def process_group(tmp_path: Path, loopback: Callable[..., Any]) -> Iterator[None]:
    start = partial(loopback, torch.distributed.init_process_group)
    start("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def sharded(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


WRAPPERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "DDP": (
        nn.parallel.DistributedDataParallel,
        r"is a DistributedDataParallel already; wrap the converted model instead: DDP\(to_doconv\(model\)\)",
    ),
    "DataParallel": (nn.DataParallel, "is a DataParallel already; wrap the converted model instead"),
    "FSDP2": (sharded, "is a FSDPModule already; call fully_shard on the converted model instead"),
    "torch.compile": (
        partial(torch.compile, backend="eager"),
        r"is a OptimizedModule already; compile the converted model instead: torch\.compile\(to_doconv\(model\)\)",
    ),
    "Module.compile": (compiled_in_place, r"is compiled in place already; call \.compile\(\) on the converted model"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("where", ["whole", "inside", "child"])
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_wrapped_before_the_conversion(wrapper: str, kind: str, where: str, inplace: bool) -> None:
    """Refused with what to do, and nothing was changed; the other way round it trains."""
    wrap, said = WRAPPERS[wrapper]

    def wrapped(model: Any) -> Any:
        if where == "child":
            name = "first" if kind == "layers" else "bounded"
            setattr(model, name, wrap(getattr(model, name)))
            return model
        return nn.Sequential(wrap(model)) if where == "inside" else wrap(model)

    model = wrapped(NETS[kind]())
    keys = list(model.state_dict())
    with pytest.raises(DoconvError, match=said):
        to_doconv(model, inplace=inplace)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_wrapped_after_the_conversion(wrapper: str, kind: str) -> None:
    model = converted(NETS[kind]())
    losses = train(WRAPPERS[wrapper][0](model))
    assert losses[-1] < losses[0] - 0.1
    assert least_moved_d(model) > MOVED


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.usefixtures("process_group")
def test_shards_are_no_whole_model(tmp_path: Path, kind: str) -> None:
    model = sharded(converted(NETS[kind]()))
    said = "is wrapped by fully_shard: its parameters are shards; "
    with pytest.raises(DoconvError, match=f"{said}train it without cached"), cached(model):
        pass
    for inplace in (False, True):
        with pytest.raises(DoconvError, match=f"{said}save it with torch.distributed.checkpoint and fold that folder"):
            fold(model, inplace=inplace)
    with pytest.raises(DoconvError, match=f"{said}save it with torch.distributed.checkpoint"):
        save(model, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kind", NETS)
def test_an_optimizer_built_before_knows_no_d(kind: str) -> None:
    """Nothing can see this from the model: the kernels train (they are the same Parameters, converted in place), D
    stays 0. `param_groups` on the converted model has everything."""
    model: Any = NETS[kind]()
    early = sgd(model.parameters())
    to_doconv(model, inplace=True, d_mul="K+3")
    late = torch.optim.SGD(param_groups(model, weight_decay=1e-4, d_weight_decay=0.0), lr=0.1, momentum=0.9)
    known, every = ({id(p) for group in one.param_groups for p in group["params"]} for one in (early, late))
    assert every == {id(p) for p in model.parameters()}
    assert every - known == {id(p) for name, p in model.named_parameters() if is_d(name) or name.endswith("_extra")}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, early)
    assert not any(p.any() for name, p in model.named_parameters() if is_d(name))
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == {
        name for name, p in model.named_parameters() if id(p) in known
    }
    train(model, late)
    assert least_moved_d(model) > MOVED


@pytest.mark.parametrize("kind", NETS)
def test_an_optimizer_of_the_original_moves_nothing_of_a_copy(kind: str) -> None:
    plain = NETS[kind]()
    early = sgd(plain.parameters())
    model = converted(plain)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_of(model, *images()).backward()
    early.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", NETS)
def test_weight_decay_on_d_alone(kind: str) -> None:
    """It pulls D toward 0, the plain convolution; `param_groups` sets it apart."""
    norms = []
    for decay in (0.0, 0.5):
        model = converted(NETS[kind]())
        train(model, torch.optim.SGD(param_groups(model, d_weight_decay=decay), lr=0.1, momentum=0.9), 16)
        norms.append(sum(float(p.detach().norm()) for name, p in model.named_parameters() if is_d(name)))
    assert norms[1] < 0.8 * norms[0]
