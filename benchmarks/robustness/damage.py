"""Checkpoints to be damaged, ways to damage them, and what an undamaged or still valid one must fold to.

The expected tensors are computed by plain loops over numpy arrays from what torch or safetensors itself reads.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

from doconv_convert import save, to_doconv

NET = """
import torch
from torch import nn

INPUT_SHAPE = (1, 2, 6, 6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3)
        self.b = nn.Conv2d(4, 8, 3, groups=2, bias=False)
        self.c = nn.Conv2d(8, 2, 1)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(self.c(self.b(self.a(x))))


def net():
    return Net().double()
"""
LAYERS = {"a": (2, 4, 1), "b": (4, 8, 2)}
# A damaged file is held against what it was before; the one that must never be there shows that code ran.
MARKER = "RAN"


def plain_net() -> nn.Module:
    space: dict[str, Any] = {"__name__": "net"}
    exec(NET, space)
    model: nn.Module = space["net"]()
    return model


def foreign_state(seed: int = 0) -> dict[str, Tensor]:
    """The net's state dict with a and b as the authors' layer, W and D random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    state: dict[str, Tensor] = {}
    for name, (c_in, c_out, groups) in LAYERS.items():
        state |= {f"{name}.W": draw(c_out, c_in // groups, 9), f"{name}.D": draw(c_in, 9, 9)}
        state[f"{name}.d_diag"] = torch.eye(9, dtype=torch.float64).repeat(c_in, 1, 1)
    state |= {"a.bias": draw(4), "c.W": draw(2, 8, 1), "c.bias": draw(2)}
    norm = {key: tensor for key, tensor in plain_net().state_dict().items() if key.startswith("norm.")}
    return state | norm | {"norm.weight": draw(2)}


def our_model() -> nn.Module:
    model = to_doconv(plain_net())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def write_bases(folder: Path) -> None:
    """One undamaged checkpoint of each kind: files, and folders with files in them."""
    foreign = foreign_state()
    wrapped = {"state_dict": {f"module.{key}": tensor for key, tensor in foreign.items()}, "epoch": 3}
    torch.save(wrapped, folder / "zip.pth")
    torch.save(wrapped, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(foreign, folder / "foreign.safetensors")
    ours = our_model()
    save(ours, folder / "ours.safetensors")
    torch.save(ours.state_dict(), folder / "ours.pth")
    (folder / "shards").mkdir()
    first = {key: foreign[key] for key in list(foreign)[:5]}
    second = {key: foreign[key] for key in list(foreign)[5:]}
    for name, part in (("one.safetensors", first), ("two.safetensors", second)):
        save_file(part, folder / "shards" / name)
    index = {"weight_map": dict.fromkeys(first, "one.safetensors") | dict.fromkeys(second, "two.safetensors")}
    (folder / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    dcp.save({"model": foreign}, checkpoint_id=str(folder / "distributed"), no_dist=True)


# What each damage to bytes does with three drawn numbers.
Bytes = Callable[[bytearray, int, int, int], bytes]


def flip_bits(data: bytearray, a: int, b: int, c: int) -> bytes:
    for index in range(1 + c % 4):
        data[(a + index * b) % len(data)] ^= 1 << ((b + index) % 8)
    return bytes(data)


def lie_in_header(data: bytearray, a: int, b: int, c: int) -> bytes:
    """A huge number where a length is expected: the first 8 bytes, or a field of the zip's directory."""
    number = [2**63 + a, 2**40, 2**31 + b, 10**9, len(data) + 1 + a % 64, 100 * 2**20][c % 6] % 2**64
    place = data.rfind(b"PK\x01\x02")
    if data[:2] == b"PK" and place >= 0:
        data[place + 20 : place + 28] = struct.pack("<II", number % 2**32, number % 2**32)
    else:
        data[:8] = struct.pack("<Q", number)
    return bytes(data)


BYTES: dict[str, Bytes] = {
    "truncated": lambda data, a, b, c: bytes(data[: a % len(data)]),
    "bits flipped": flip_bits,
    "a bit flipped in the first 600 bytes": lambda data, a, b, c: flip_bits(data[:600], a, b, c) + bytes(data[600:]),
    "bytes lost": lambda data, a, b, c: bytes(data[: a % len(data)] + data[a % len(data) + 1 + b % 64 :]),
    "bytes put in": lambda data, a, b, c: (
        bytes(data[: a % len(data)]) + os.urandom(0) + bytes([c % 256]) * (1 + b % 64) + bytes(data[a % len(data) :])
    ),
    "a block zeroed": lambda data, a, b, c: (
        bytes(data[: a % len(data)]) + bytes(min(512, len(data) - a % len(data))) + bytes(data[a % len(data) + 512 :])
    ),
    "a huge header length": lie_in_header,
}

States = Callable[[dict[str, Any], str, int], Any]


class Runs:
    """A pickle of this runs code when it is opened."""

    def __init__(self, call: int, marker: str) -> None:
        self.call, self.marker = call, marker

    def __reduce__(self) -> Any:
        calls: list[Any] = [
            (Path.touch, (Path(self.marker),)),
            (os.system, (f"touch '{self.marker}'",)),
            (eval, (f"open({self.marker!r}, 'w')",)),
            (exec, (f"open({self.marker!r}, 'w').close()",)),
        ]
        return calls[self.call % len(calls)]


def _with(state: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {**state, key: value}


def _units(state: dict[str, Any], key: str) -> str:
    """The unit that `key` belongs to, or the first."""
    owner = key.rpartition(".")[0]
    return owner if f"{owner}.D" in state else "a"


def _lost(state: dict[str, Any], key: str, *parts: str) -> dict[str, Any]:
    """Without parts of the unit that `key` belongs to."""
    lost = {f"{_units(state, key)}.{part}" for part in parts}
    return {name: value for name, value in state.items() if name not in lost}


# What each damage to a foreign state dict does with a drawn key and number.
STATES: dict[str, States] = {
    "another shape": lambda s, k, n: _with(s, k, s[k][..., :-1] if s[k].dim() and n % 2 else s[k].unsqueeze(0)),
    "transposed": lambda s, k, n: _with(
        s, k, s[k].transpose(0, -1).contiguous() if s[k].dim() > 1 else s[k].reshape(-1)[:0]
    ),
    "NaN": lambda s, k, n: _with(s, k, s[k].double() * float("nan")),
    "infinite": lambda s, k, n: _with(s, k, s[k].double() + float("inf")),
    "integers": lambda s, k, n: _with(s, k, s[k].long()),
    "complex": lambda s, k, n: _with(s, k, s[k] * 1j),
    "a layer twice": lambda s, k, n: s | {f"{_units(s, k)}.D_diag": s[f"{_units(s, k)}.d_diag"]},
    "a layer beside its kernel": lambda s, k, n: _with(s, f"{_units(s, k)}.weight", torch.ones(2, 2, 3, 3)),
    "a key lost": lambda s, k, n: {key: value for key, value in s.items() if key != k},
    "W without D": lambda s, k, n: {
        x: v for x, v in s.items() if x not in (f"{_units(s, k)}.D", f"{_units(s, k)}.d_diag")
    },
    "D without W": lambda s, k, n: {x: v for x, v in s.items() if x != f"{_units(s, k)}.W"},
    "one D lost": lambda s, k, n: {x: v for x, v in s.items() if x != f"{_units(s, k)}.D"},
    "no identity": lambda s, k, n: {x: v for x, v in s.items() if x != f"{_units(s, k)}.d_diag"},
    "expanded to 8 TB": lambda s, k, n: _with(s, k, torch.ones(1, dtype=torch.float64).expand(10**6, 10**6)),
    "empty": lambda s, k, n: _with(s, k, torch.zeros(0, 3)),
    "sparse": lambda s, k, n: _with(s, k, torch.eye(3).to_sparse()),
    "without values": lambda s, k, n: _with(s, k, torch.empty(10**6, 10**6, device="meta")),
    "no tensor": lambda s, k, n: _with(s, k, [1, "two", None][n % 3]),
    "renamed": lambda s, k, n: {x if x != k else x + "2": v for x, v in s.items()},
    "unharmed": lambda s, k, n: s,
}


def write_hostile(path: Path, state: dict[str, Any], marker: str, call: int, form: int) -> None:
    """A pickle that runs code where it is opened carelessly, in one of five forms."""
    runs = Runs(call, marker)
    content: Any = [runs, {"state_dict": state, "args": runs}, {**state, "a.W": runs}][form % 3]
    if form % 5 == 3:
        path.write_bytes(pickle.dumps(content, protocol=form % 6))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form % 5 != 4)


def compressed(path: Path) -> None:
    """The same zip file, deflated, with a hundred megabytes of zeros in one entry."""
    data = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(data) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, bytes(10**8) if entry.filename.endswith("data/0") else content)


def read_plainly(path: Path) -> dict[str, Tensor]:
    """The state dict in a file or folder, as torch or safetensors itself reads it, unwrapped."""
    if path.is_dir() and (path / "model.safetensors.index.json").exists():
        return {k: t for name in ("one", "two") for k, t in load_file(path / f"{name}.safetensors").items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    content = content.get("state_dict", content)
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}


def expected_fold(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """What a state dict folds to, by loops in float64: foreign units by the authors' pairing, ours by the paper's."""
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    made: dict[str, np.ndarray] = {}
    for key, value in arrays.items():
        owner, _, last = key.rpartition(".")
        identity = arrays.get(f"{owner}.d_diag", arrays.get(f"{owner}.D_diag"))
        d = arrays.get(f"{owner}.D")
        if last == "W" and d is not None and identity is not None:
            made[f"{owner}.weight"] = _authors(value, d + identity).reshape(*value.shape[:2], 3, 3)
        elif last == "W" and value.ndim > 2:  # with fewer it is some other layer's
            made[f"{owner}.weight"] = value.reshape(*value.shape[:2], *(value.shape[2:] if value.ndim == 4 else (1, 1)))
        elif last == "weight" and d is not None:
            full, slots = d + np.eye(*d.shape[1:]), value.reshape(*value.shape[:2], -1)
            groups = d.shape[0] // value.shape[1]
            rows = [(o // (value.shape[0] // groups)) * value.shape[1] for o in range(value.shape[0])]
            kernel = [[full[r + j] @ slots[o, j] for j in range(value.shape[1])] for o, r in enumerate(rows)]
            made[key] = np.array(kernel).reshape(value.shape)
        elif last not in ("D", "d_diag", "D_diag"):
            made[key] = value
    return made


def _authors(w: np.ndarray, full: np.ndarray) -> np.ndarray:
    groups = full.shape[0] // w.shape[1]
    return np.array(
        [[full[(o % groups) * w.shape[1] + j] @ w[o, j] for j in range(w.shape[1])] for o in range(w.shape[0])]
    )
