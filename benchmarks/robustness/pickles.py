"""Hostile pickles, thousands of them: read as checkpoints, nothing of them may run, be imported, or end the process.

    python benchmarks/robustness/pickles.py [--count 2000] [--seed 0] [--json docs/data/pickles.json]

Each is drawn: opcodes of every protocol that call, build, look up and nest; calls of functions that would leave a
marker; state given to classes and functions; bombs (memory, time, depth); honest files of trainers with such parts
planted into them; bytes flipped. They come as `torch.save` zips them, as before torch 1.6, bare, and as `.metadata` of
a distributed checkpoint. Python's own audit events are watched: no import, no file but the one, no process, no socket,
no `exec`.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import random
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from peak import peak_bytes

from doconv_convert.artifacts.checkpoints.reading import read_checkpoint
from doconv_convert.artifacts.checkpoints.unwrap import Selection
from doconv_convert.errors import DoconvError

PEAK_BYTES, SECONDS = 2**30, 30.0
WATCHED = (
    "import",
    "exec",
    "compile",
    "open",
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pickle.find_class",
)
NAMES = [
    *("posix system", "os system", "subprocess Popen", "builtins eval", "builtins exec", "builtins __import__"),
    *("builtins getattr", "builtins setattr", "builtins open", "operator attrgetter", "functools partial", "nt system"),
    *(
        "importlib import_module",
        "runpy run_path",
        "pathlib Path.touch",
        "shutil rmtree",
        "torch load",
        "webbrowser open",
    ),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict", "torch Size"),
    *("torch FloatStorage", "torch.storage _load_from_bytes", "numpy.core.multiarray scalar", "builtins type"),
    *("doconv_convert.files atomic_write", "doconv_convert.errors DoconvError", "torch.hub load", "a b"),
    *("torch.serialization add_safe_globals", "copyreg _reconstructor", "types FunctionType", "codecs encode"),
    *("torch._utils _rebuild_tensor_v3", "torch._tensor _rebuild_from_type_v2", "ctypes CDLL", "sys modules"),
]


class Calls:
    """A pickle of this calls a function where it is opened carelessly."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def runs(draw: random.Random, marker: str) -> Any:
    """What would leave the marker."""
    return draw.choice(
        [
            Calls(os.system, f"touch '{marker}'"),
            Calls(Path.touch, Path(marker)),
            Calls(eval, f"open({marker!r}, 'w')"),
            Calls(exec, f"open({marker!r}, 'w').close()"),
            Calls(__import__, "antigravity_of_ours"),
            Calls(open, marker, "w"),
        ]
    )


def opcodes(draw: random.Random, marker: str) -> bytes:
    """A program that does not add up, mostly: pushes, calls and changes at random."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def name() -> bytes:
        module, _, attribute = draw.choice(NAMES).partition(" ")
        if draw.random() < 0.3:
            return text(module) + text(attribute) + b"\x93"
        return f"c{module}\n{attribute}\n".encode()

    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\4tQ"
    pieces: list[Callable[[], bytes]] = [
        name,
        lambda: text(
            draw.choice(["x", marker, f"touch {marker}", "__class__", "__setstate__", "a" * draw.randrange(300)])
        ),
        lambda: b"K" + bytes([draw.randrange(256)]),
        lambda: draw.choice([b"N", b"}", b"]", b")", b"\x8f", b"\x88", b"(", b"("]),
        lambda: draw.choice(
            [b"R", b"R", b"\x81", b"\x92", b"b", b"b", b"o", b"t", b"u", b"s", b"a", b"e", b"\x90", b"\x91"]
        ),
        lambda: draw.choice([b"\x85", b"\x86", b"\x87", b"l", b"d", b"0", b"1", b"2", b"Q"]),
        lambda: draw.choice([b"q\1", b"h\1", b"r\xff\xff\xff\x7f", b"\x94", b"g1\n", b"p1\n", b"\x82\1"]),
        lambda: b"i" + draw.choice(NAMES).replace(" ", "\n").encode() + b"\n",
        lambda: storage,
        lambda: b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\2\x85K\1\x85\x89}tR",
    ]
    body = b"".join(draw.choice(pieces)() for _ in range(draw.randrange(1, 60)))
    return bytes([0x80, draw.randrange(2, 6)]) + body + b"."


def bomb(draw: random.Random, marker: str) -> bytes:
    many = draw.randrange(1, 30_000)
    doubled = b"(t" + b"2\x86" * draw.randrange(30, 200)
    return b"\x80\4" + draw.choice(
        [
            b"]" * many + b"a" * (many - 1) + b".",
            b"(" * many + b"t" * many + b".",
            b"}" + doubled + b"Ns.",
            b"(" + doubled + b"\x91.",
            b"]" + b"2a" * min(many, 5000) + b".",
            b"".join(b"ca%d\nb\n0" % index for index in range(many)) + b"N.",
            b"(" + b"}" * many + b"t.",
            b"}("
            + b"".join(b"\x8a\x0a" + (index * (2**61 - 1)).to_bytes(10, "little") + b"N" for index in range(many // 8))
            + b"u.",
            b"X" + struct.pack("<I", 2**32 - 1) + b"a.",
            b"\x8d" + struct.pack("<Q", 2**60) + b"a.",
            b"\x96" + struct.pack("<Q", 2**40) + b"a.",
            b"r" + struct.pack("<I", 2**32 - 1) + b".",
            b"I" + b"9" * many + b"\n.",
            b"\x8b" + struct.pack("<i", many) + b"\xff" * many + b".",
        ]
    )


def honest(draw: random.Random, marker: str) -> Any:
    """As a trainer leaves it, with something planted."""
    state = collections.OrderedDict((f"conv{index}.weight", torch.ones(2, 2)) for index in range(3))
    planted = runs(draw, marker)
    content: dict[str, Any] = {
        "state_dict": state,
        "loss": np.float64(0.1),
        "rng": np.random.default_rng(0),
        "hyper_parameters": {"act": nn.ReLU, "path": Path("a"), "seen": {1, 2}},
        "optimizer": {"state": {0: {"step": torch.ones(1)}}},
    }
    if draw.random() < 0.3:
        content["model"] = nn.Sequential(nn.Conv2d(1, 1, 1))
    place = draw.choice(["top", "state", "value", "key", "root", "optimizer"])
    if place == "top":
        content["planted"] = planted
    elif place == "state":
        state["planted"] = planted
    elif place == "value":
        content["hyper_parameters"]["planted"] = [planted, {"a": planted}]
    elif place == "key":
        content["hyper_parameters"][draw.choice(["a", 3])] = {("a", "b"): planted}
    elif place == "optimizer":
        content["optimizer"]["state"][0]["step"] = planted
    return planted if place == "root" else content


def zipped(data: bytes) -> bytes:
    """What torch.save would make of a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/version", b"3\n")
    return file.getvalue()


def legacy(data: bytes) -> bytes:
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + data + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(16)


def write(draw: random.Random, folder: Path, marker: str) -> tuple[Path, str]:
    """One file, and its kind."""
    kind = draw.choice(["opcodes", "opcodes", "bomb", "honest", "honest", "flipped"])
    path = folder / "a.pth"
    if kind in ("honest", "flipped"):
        torch.save(
            honest(draw, marker),
            path,
            pickle_protocol=draw.choice([2, 2, 3, 4, 5]),
            _use_new_zipfile_serialization=draw.random() < 0.6,
        )
        if kind == "flipped":
            data = bytearray(path.read_bytes())
            for _ in range(draw.randrange(1, 6)):
                data[draw.randrange(min(len(data), 3000))] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
        return path, kind
    data = (opcodes if kind == "opcodes" else bomb)(draw, marker)
    form = draw.choice(["zip", "zip", "legacy", "bare", "metadata"])
    if form == "metadata":
        (folder / "d").mkdir(exist_ok=True)
        (folder / "d" / ".metadata").write_bytes(data)
        return folder / "d", f"{kind}, metadata"
    path.write_bytes({"zip": zipped, "legacy": legacy, "bare": bytes}[form](data))
    return path, f"{kind}, {form}"


class Watch:
    """Python's audit events while a file is read; those about the file itself are none."""

    def __init__(self) -> None:
        self.place: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.place is None or not event.startswith(WATCHED):
            return
        about = str(arguments[0]) if arguments else ""
        if event in ("open", "os.scandir", "os.listdir") and about.startswith(self.place):
            return
        self.seen.append(f"{event} {about}"[:200])


def read(path: Path, watch: Watch, draw: random.Random) -> str:
    watch.seen.clear()
    watch.place = str(path)
    try:
        read_checkpoint(path, Selection(ema=draw.random() < 0.2))
        return "read"
    except DoconvError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        watch.place = None


def run(count: int, seed: int, folder: Path) -> dict[str, Any]:
    draw, marker, watch = random.Random(seed), folder / "RAN", Watch()
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    slowest = 0.0
    before = peak_bytes()
    import encodings.cp437  # noqa: F401 (the names in zip files)

    # what the first reading imports
    torch.save({"a": torch.ones(1)}, folder / "a.pth")
    read(folder / "a.pth", watch, draw)
    modules = set(sys.modules)
    for index in range(count):
        path, kind = write(draw, folder, str(marker))
        modules |= set(sys.modules)
        start = time.perf_counter()
        outcome = read(path, watch, draw)
        seconds = time.perf_counter() - start
        slowest = max(slowest, seconds)
        found = [f"ended with {outcome}"] if outcome not in ("read", "refused") else []
        found += [f"watched: {one}" for one in watch.seen[:3]]
        found += [f"imported {sorted(new)[:3]}"] if (new := set(sys.modules) - modules) else []
        found += [f"took {seconds:.1f} s"] if seconds > SECONDS else []
        if marker.exists():
            found.append("code was run")
            marker.unlink()
        if found:
            problems.append(f"{index} ({kind}): {'; '.join(found)}")
        outcomes[f"{kind}: {outcome if outcome in ('read', 'refused') else 'other'}"] += 1
    peak = peak_bytes()
    if peak > PEAK_BYTES:
        problems.append(f"{peak / 2**20:.0f} MiB")
    return {
        "files": count,
        "seed": seed,
        "problems": problems,
        "outcomes": dict(sorted(outcomes.items())),
        "slowest_seconds": round(slowest, 2),
        "peak_bytes": peak,
        "peak_bytes_before": before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as text:
        document = run(options.count, options.seed, Path(text))
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    if document["problems"]:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
