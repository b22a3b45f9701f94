"""Pickles that are read without running anything: the same tensors as torch reads, stubs for all else, and bounds."""

import collections
import io
import pickle
import pickletools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from doconv_convert.artifacts.checkpoints import inert
from doconv_convert.artifacts.checkpoints.inert import Machine
from doconv_convert.artifacts.checkpoints.pickles import open_pickled, with_modules
from doconv_convert.artifacts.checkpoints.reading import read_checkpoint
from doconv_convert.artifacts.checkpoints.records import ITEM_BYTES, Name, StoredTensor, Stub, Unreadable
from doconv_convert.artifacts.checkpoints.unwrap import Selection
from doconv_convert.errors import DoconvError


@contextmanager
def library(**classes: str) -> Iterator[dict[str, type]]:
    """Classes of a library that is there while a file is written, by their modules; gone when it is read."""
    made = {}
    for name, module in classes.items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        made[name] = type(name, (_BASES.get(name, object),), {"__module__": module})
        setattr(sys.modules[module], name, made[name])
    before = [name for name in sys.modules if name.partition(".")[0] in {m.partition(".")[0] for m in classes.values()}]
    try:
        yield made
    finally:
        for name in before:
            del sys.modules[name]


_BASES: dict[str, type] = {"DetectionModel": nn.Module, "ConfigDict": dict}


def reads_as_torch_does(content: Any, path: Path, zipped: bool = True) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    expected = torch.load(path, weights_only=True)
    with open_pickled(path, "a") as (pickled, file):
        assert pickled.root.keys() == expected.keys()
        for key, stored in pickled.root.items():
            tensor = pickled.tensor(file, stored)
            assert tensor.dtype == expected[key].dtype
            assert tensor.stride() == expected[key].stride()
            assert torch.equal(tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor, raw(expected[key]))


def raw(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


# The older format, which torch itself still writes, does not have these.
NEWER = {getattr(torch, name) for name in ITEM_BYTES if name.startswith(("float8", "uint"))} - {torch.uint8}
DTYPES = [getattr(torch, name) for name in ITEM_BYTES]


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_every_kind_are_what_torch_reads(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    content: dict[str, Any] = {
        "view": base[:, 1:, ::2],
        "transposed": base.transpose(0, 2),
        "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "whole": base,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "nothing": torch.zeros(0),
        "expanded": torch.ones(1).expand(4, 4),
        "parameter": nn.Parameter(torch.randn(3)),
        "frozen": nn.Parameter(torch.randn(3), requires_grad=False),
    }
    for dtype in DTYPES:
        if zipped or dtype not in NEWER:
            content[str(dtype)] = torch.arange(6).to(dtype)
    reads_as_torch_does(content, tmp_path / "a.pth", zipped)
    parameter = nn.Parameter(torch.ones(2))
    parameter.group = "first"  # type: ignore[attr-defined]
    reads_as_torch_does({"with an attribute": parameter}, tmp_path / "a.pth", zipped)


@pytest.mark.parametrize("zipped", [True, False])
def test_shared_memory_stays_shared(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(10)
    torch.save({"a": base, "b": base[2:]}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    state = read_checkpoint(tmp_path / "a.pth").state
    state["a"][3] = 7.0
    assert state["b"][1] == 7.0


def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "optimizer": {"m": torch.ones(3)}}, tmp_path / "a.pth")
    with open_pickled(tmp_path / "a.pth", "a") as (pickled, file):
        pickled.tensor(file, pickled.root["model"]["a"])
        assert len(pickled._read) == 1


def test_a_pickled_module_gives_the_state_dict_of_its_own(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, bias=False)])
            self.norm = nn.BatchNorm2d(2)
            self.again = self.norm
            self.register_buffer("kept", torch.ones(2))
            self.register_buffer("scratch", torch.ones(2), persistent=False)
            self.register_parameter("none", None)

    for protocol in (2, 4):
        with library(DetectionModel="ultralytics.nn.tasks") as made:
            model = made["DetectionModel"]()
            model.inner = Net()  # type: ignore[attr-defined]
            Net.__module__, Net.__qualname__ = "ultralytics.nn.tasks", "Net"
            sys.modules["ultralytics.nn.tasks"].Net = Net  # type: ignore[attr-defined]
            content = {"epoch": 3, "model": None, "ema": model.half(), "optimizer": {"state": {0: torch.ones(3)}}}  # type: ignore[attr-defined]
            torch.save(content, tmp_path / "last.pt", pickle_protocol=protocol)
            expected = model.state_dict()  # type: ignore[attr-defined]
        assert "ultralytics" not in sys.modules
        with pytest.raises(DoconvError, match=r"averaged weights 'ema' beside epoch, model, ema, optimizer.*`ema`"):
            read_checkpoint(tmp_path / "last.pt")
        checkpoint = read_checkpoint(tmp_path / "last.pt", Selection(ema=True))
        assert list(checkpoint.state) == list(expected)
        assert all(torch.equal(checkpoint.state[key], tensor) for key, tensor in expected.items())
        assert any("pickled 'ultralytics.nn.tasks.DetectionModel'" in note for note in checkpoint.notes)
        assert "ultralytics" not in sys.modules


STATE = {"conv.weight": torch.arange(12.0).reshape(3, 4), "conv.bias": torch.ones(3)}


def history(made: dict[str, type]) -> Any:
    buffer = made["HistoryBuffer"]()
    buffer._log_history, buffer.max_length = np.arange(3.0), 1000  # type: ignore[attr-defined]
    return buffer


# What trainers leave beside the weights: (the classes of their libraries, the file's content).
LEFT: dict[str, tuple[dict[str, str], Callable[[dict[str, type]], Any]]] = {
    "Lightning, classes in hyper_parameters": (
        {"Backbone": "mine.models", "AttributeDict": "lightning.fabric.utilities.data"},
        lambda made: {
            "state_dict": STATE,
            "hyper_parameters": {"backbone": made["Backbone"], "optimizer": torch.optim.AdamW, "act": nn.ReLU()},
            "hparams_name": "kwargs",
            "callbacks": {"x": made["AttributeDict"]()},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": np.float64(1)}]}],
        },
    ),
    "fastai's learn.save": (
        {"L": "fastcore.foundation"},
        lambda made: {"model": STATE, "opt": {"hypers": made["L"](), "state": [{"mom": torch.ones(2)}]}},
    ),
    "a loss of numpy": (
        {},
        lambda made: {"state_dict": STATE, "loss": np.float64(0.5), "seen": {1, 2}, "rng": object()},
    ),
    "mmengine's message hub": (
        {"HistoryBuffer": "mmengine.logging.history_buffer", "ConfigDict": "mmengine.config.config"},
        lambda made: {
            "meta": {"cfg": made["ConfigDict"](a=1), "dataset_meta": {"classes": ("a",)}},
            "state_dict": collections.OrderedDict(STATE),
            "message_hub": {"log_scalars": {"train/loss": history(made)}, "runtime_info": {}},
        },
    ),
    "pytorch-cifar": ({}, lambda made: {"net": STATE, "acc": 93.1, "epoch": 3}),
    "nnU-Net": (
        {"Logger": "nnunetv2.training.logging"},
        lambda made: {
            "network_weights": STATE,
            "optimizer_state": {"state": {0: {"m": torch.ones(1)}}},
            "logging": made,
        },
    ),
}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_trainers_leave_beside_the_weights_is_neither_run_nor_in_the_way(
    tmp_path: Path, name: str, zipped: bool
) -> None:
    classes, content = LEFT[name]
    with library(**classes) as made:
        torch.save(content(made), tmp_path / "last.ckpt", _use_new_zipfile_serialization=zipped)
    before = set(sys.modules)
    state = read_checkpoint(tmp_path / "last.ckpt").state
    assert {name for name in set(sys.modules) - before if not name.startswith("doconv_convert")} == set()
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in STATE.items())


def load(*opcodes: bytes) -> Any:
    return Machine().load(io.BytesIO(b"".join(opcodes)))


def test_no_class_function_or_module_is_changed() -> None:
    """BUILD, SETITEM and APPEND on what a name stands for."""
    for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"ctorch\nfloat32\n"):
        for change in (
            b"}(S'__defaults__'\nS'x'\nub.",
            b"N}(S'__doc__'\nS'x'\nu\x86b.",
            b"S'k'\nS'v'\ns.",
            b"S'v'\na.",
        ):
            assert isinstance(load(name, change), Name)
    assert (
        torch._utils._rebuild_tensor_v2.__defaults__ is None or "x" not in torch._utils._rebuild_tensor_v2.__defaults__
    )


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cposix\nsystem\n(S'true'\ntR.",
        b"(S'true'\niposix\nsystem\n.",
        b"(cposix\nsystem\nS'true'\no.",
        b"cbuiltins\neval\n(S'1'\nt\x81.",
        b"cbuiltins\neval\n(S'1'\nt}\x92.",
        b"\x8c\x05posix\x8c\x06system\x93(S'true'\ntR.",
        b"cbuiltins\ngetattr\n(cos\npath\nS'join'\ntR(S'a'\ntR.",
        b"cfunctools\npartial\n(cos\nsystem\ntR.",
    ],
)
def test_every_way_to_call_gives_a_stub(opcodes: bytes) -> None:
    assert isinstance(load(opcodes), Stub)


def doubling(depth: int) -> bytes:
    """A tuple that holds the one before twice, `depth` times: hashing it takes 2^depth steps."""
    return b"(t" + b"2\x86" * depth


BOMBS: dict[str, tuple[bytes, str | None]] = {
    "marks": (b"(" * 100_000 + b".", None),
    "a list, 100,000 deep": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", None),
    "a key that hashes without end": (b"}" + doubling(60) + b"Ns.", None),
    "a set that hashes without end": (b"(" + doubling(60) + b"\x91.", None),
    "a memo index of two billion": (b"}r\xff\xff\xff\x7f.", None),
    "a memo index without bounds": (b"Np99999999999999\n.", "memo index"),
    "an extension": (b"\x82\x01.", "torch.save never writes"),
    "a text of 4 GB": (b"X\xff\xff\xff\xff.", "expected 4294967295 bytes"),
    "no end": (b"N", "exhausted|ended|before|not enough"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_soon(name: str) -> None:
    opcodes, said = BOMBS[name]
    if said is None:
        with suppress(IndexError):
            load(opcodes)
    else:
        with pytest.raises((Unreadable, ValueError), match=said):
            load(opcodes)


def test_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inert, "MOST_OPERATIONS", 1000)
    with pytest.raises(Unreadable, match="more than 1,000 operations"):
        load(b"N" * 1001 + b".")
    load(b"N" * 999 + b".")


def test_integers_of_one_hash_make_no_slow_dictionary() -> None:
    p = 2**61 - 1
    items = b"".join(pickle.dumps(index * p, 4)[2:-1] + b"N" for index in range(1, 20_000))
    assert len(load(b"\x80\x04}(", items, b"u.")) == 19_999


def test_many_names_are_only_names() -> None:
    opcodes = b"".join(b"ca%d\nb\n0" % index for index in range(20_000)) + b"N."
    machine = Machine()
    machine.load(io.BytesIO(opcodes))
    assert len(machine.names) == 20_000


@pytest.mark.parametrize(
    ("storage", "tensor"),
    [
        ("(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI-4\ntQ", None),
        ("(S'storage'\nctorch\nFloatStorage\nI0\nS'cpu'\nI4\ntQ", None),
        ("(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ", "I1\n(I4\nt(I1\nt"),
        ("(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ", "I-1\n(I4\nt(I1\nt"),
        ("(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ", "I0\n(I2\nI2\nt(I1\nt"),
        ("(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ", "I0\n(I2\nt(I-1\nt"),
        ("(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\n(S'v'\nI2\nI3\nttQ", None),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(storage: str, tensor: str | None) -> None:
    opcodes = f"ctorch._utils\n_rebuild_tensor_v2\n({storage}{tensor}I00\n}}tR." if tensor else f"{storage}."
    with pytest.raises((Unreadable, TypeError)):
        load(opcodes.encode())
    storage = "(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"
    whole = f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I1\n(I3\nt(I1\ntI00\n}}tR."
    assert isinstance(load(whole.encode()), StoredTensor)


def test_modules_within_modules_end(tmp_path: Path) -> None:
    def module(children: dict[str, Any]) -> Stub:
        made = Stub("mine.Net")
        made.state = {"_parameters": {}, "_buffers": {}, "_modules": children}
        return made

    circle = module({})
    circle.state["_modules"]["itself"] = circle
    twice = module({})
    for _ in range(40):
        twice = module({"a": twice, "b": twice})
    for content in (circle, twice):
        with pytest.raises(ValueError, match="without end"):
            with_modules(content, [])


def test_every_opcode_is_known() -> None:
    """A new protocol's opcodes must not be pushed as values."""
    pushes = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING"}
    pushes |= {"BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE"}
    pushes |= {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    assert {one.name for one in pickletools.opcodes} == inert._STEPS.keys() | pushes | {"STOP"}
