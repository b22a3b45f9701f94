"""Files as found: shards, wrappers, averages, prefixes; and claims that are held against the file before anything."""

import argparse
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import difference, run, varied_images
from support_cli import names, run_cli, run_python, tiny, tiny_file, trained_tiny
from torch import Tensor

from doconv_convert import load, save
from doconv_convert.artifacts.checkpoints.checkpoint import load_into
from doconv_convert.artifacts.checkpoints.prefixes import without_prefixes
from doconv_convert.artifacts.checkpoints.reading import read_checkpoint
from doconv_convert.artifacts.checkpoints.unwrap import Selection
from doconv_convert.errors import DoconvError

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3)}
EMA = {key: tensor + 1 for key, tensor in STATE.items()}


def read(path: Path, **selection: Any) -> tuple[dict[str, Tensor], str]:
    checkpoint = read_checkpoint(path, Selection(**selection))
    return checkpoint.state, "; ".join(checkpoint.notes)


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[key], tensor) for key, tensor in expected.items())


def write_shards(folder: Path, suffix: str = ".safetensors", **weight_map: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, key in (("one", "a.weight"), ("two", "a.bias")):
        part = {key: STATE[key]}
        save_file(part, folder / f"{name}{suffix}") if suffix == ".safetensors" else torch.save(
            part, folder / f"{name}.bin"
        )
    index = {"metadata": {"total_size": 60}, "weight_map": {"a.weight": f"one{suffix}", "a.bias": f"two{suffix}"}}
    index["weight_map"] |= weight_map  # type: ignore[operator]
    path = folder / f"model{suffix}.index.json"
    path.write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_read_by_their_index(tmp_path: Path, suffix: str) -> None:
    index = write_shards(tmp_path / "model", suffix)
    for place in (index, index.parent):
        assert same(read(place)[0], STATE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda i: (i.parent / "two.safetensors").unlink(), "names the shard 'two.safetensors', which is not there"),
        (lambda i: i.write_text("{"), "cannot be read as an index"),
        (lambda i: i.write_text('{"weight_map": [1]}'), "cannot be read as an index"),
        (lambda i: i.write_text('{"weight_map": {"a": 3}}'), "cannot be read as an index"),
        (lambda i: i.write_text('{"weight_map": {}}'), "holds no tensors"),
        (lambda i: write_shards(i.parent, more="one.safetensors"), "lacks more"),
        (lambda i: write_shards(i.parent, **{"a.bias": "one.safetensors"}), "lacks a.bias"),
        (lambda i: write_shards(i.parent, **{"a.bias": "../two.safetensors"}), "outside of its folder"),
        (
            lambda i: (
                i.write_text('{"weight_map": {"a.weight": "one.safetensors"}}')
                and save_file(STATE, i.parent / "one.safetensors")
            ),
            "holds a.bias, which the index does not",
        ),
        (lambda i: (i.parent / "b.index.json").write_text("{}"), "has several indices"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    index = write_shards(tmp_path / "model")
    damage(index)
    with pytest.raises(DoconvError, match=message):
        read(index.parent if "several" in message else index)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_tensors_under_any_suffix(tmp_path: Path, suffix: str, zipped: bool) -> None:
    torch.save(STATE, tmp_path / f"a{suffix}", _use_new_zipfile_serialization=zipped)
    assert same(read(tmp_path / f"a{suffix}")[0], STATE)


def test_a_lightning_checkpoint(tmp_path: Path) -> None:
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{key}": tensor for key, tensor in trained_tiny(tmp_path).state_dict().items()},
        "optimizer_states": [{"state": {0: {"step": torch.ones(())}}}],
        "hyper_parameters": {"lr": 0.1},
        "callbacks": {},
    }
    torch.save(content, tmp_path / "last.ckpt")
    loaded = load(tmp_path / "last.ckpt", model=tiny(tmp_path))
    assert torch.equal(loaded.get_parameter("first.D"), trained_tiny(tmp_path).get_parameter("first.D"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_its_scripts_arguments(tmp_path: Path, zipped: bool) -> None:
    """As timm's train.py leaves it."""
    path, arguments = tmp_path / "model_best.pth.tar", argparse.Namespace(model="resnet10t", lr=0.1)
    content = {"epoch": 3, "arch": "resnet10t", "state_dict": STATE, "state_dict_ema": EMA, "args": arguments}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert same(read(path)[0], STATE)
    assert same(read(path, ema=True)[0], EMA)
    arguments.folder = tmp_path
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    state, notes = read(path)
    assert same(state, STATE)
    assert "left out, and not run: argparse.Namespace, pathlib" in notes


@pytest.mark.parametrize("name", ["ema", "model_ema", "state_dict_ema", "ema_state_dict"])
@pytest.mark.parametrize("inner", [None, "module", "state_dict"])
def test_averaged_weights_only_when_asked_for(tmp_path: Path, name: str, inner: str | None) -> None:
    path = tmp_path / "a.pth"
    torch.save({"state_dict": STATE, name: EMA if inner is None else {inner: EMA, "updates": 3}}, path)
    state, notes = read(path)
    assert same(state, STATE)
    assert f"left the averaged weights '{name}' aside; `ema` takes them" in notes
    assert "took 'state_dict' of state_dict" in notes
    state, notes = read(path, ema=True)
    assert same(state, EMA)
    assert f"took '{name}' of state_dict, {name}" in notes
    torch.save({name: EMA, "epoch": 3}, path)
    with pytest.raises(DoconvError, match=f"holds the averaged weights '{name}' beside {name}, epoch.*`ema`"):
        read(path)
    torch.save({"state_dict": STATE}, path)
    with pytest.raises(DoconvError, match="holds no averaged weights"):
        read(path, ema=True)
    torch.save({**STATE, "n_averaged": torch.ones(())}, path)
    assert same(read(path, ema=True)[0], {**STATE, "n_averaged": torch.ones(())})


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_keys_under_a_prefix(tmp_path: Path, nested: bool, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    flat = {f"generator.{key}": tensor for key, tensor in STATE.items()} | {"critic.b": torch.ones(2)}
    if suffix == ".safetensors":
        save_file(flat, path)
    else:
        torch.save({"generator": STATE, "critic": {"b": torch.ones(2)}, "epoch": 3} if nested else flat, path)
    state, notes = read(path, prefix="generator.")
    assert same(state, STATE)
    assert "took the 2 keys under 'generator.'" in notes
    assert "critic.b" in notes
    with pytest.raises(DoconvError, match=r"no key under 'gen\.'; its keys begin with (generator|critic)\."):
        read(path, prefix="gen.")


def test_several_dictionaries_ask_for_a_prefix(tmp_path: Path) -> None:
    torch.save({"generator": STATE, "critic": STATE}, tmp_path / "a.pth")
    with pytest.raises(DoconvError, match=r"several state dicts \(generator, critic\).*`prefix` generator\."):
        without_prefixes(read_checkpoint(tmp_path / "a.pth"))
    model = f"{tiny_file(tmp_path)}:tiny"
    result = run_cli("fold", tmp_path / "a.pth", "--model", model, "-o", tmp_path / "b.safetensors")
    assert result.exit_code == 1
    assert "and none fits Tiny; take one of them: --prefix generator." in result.stderr


def test_one_command_takes_what_it_is_told_and_says_so(tmp_path: Path) -> None:
    model, averaged = trained_tiny(tmp_path), trained_tiny(tmp_path, d_mul="K+3")
    content = {
        "model": {f"net.{key}": tensor for key, tensor in model.state_dict().items()},
        "ema": {f"net.{key}": tensor for key, tensor in averaged.state_dict().items()} | {"loss.scale": torch.ones(1)},
    }
    torch.save(content, tmp_path / "a.pth")
    command = ["fold", tmp_path / "a.pth", "--model", f"{tiny_file(tmp_path)}:tiny", "-o", tmp_path / "b.safetensors"]
    for options, expected in (([], model), (["--ema"], averaged)):
        result = run_cli(*command, "--prefix", "net.", *options)
        assert result.exit_code == 0, result.stderr
        folded = load_into(tiny(tmp_path), read_checkpoint(tmp_path / "b.safetensors"))
        x = varied_images(2, 2, 6, 6).double()
        assert difference(run(folded.double(), x), run(expected.double(), x)) < 1e-6
        assert "keys under 'net.'" in result.stdout
        assert ("left 1 keys outside of 'net.': loss.scale" in result.stdout) is bool(options)
    save(model, tmp_path / "ours.safetensors")
    command[1] = tmp_path / "ours.safetensors"
    assert "leave out --prefix and --ema" in run_cli(*command, "--ema").stderr


def zip_entry(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(entry for entry in archive.namelist() if entry.endswith(name)))


def rewrite_zip(path: Path, **options: Any) -> None:
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w", **options) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


def claim(path: Path, old: bytes, new: bytes) -> None:
    """Another number in the pickle of a zip file, which stays a proper zip file otherwise."""
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(path, "w") as changed:
        for entry in archive.infolist():
            data = archive.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert data.count(old) == 1
                data = data.replace(old, new)
            changed.writestr(entry.filename, data)


def test_a_storage_that_claims_more_than_the_file_has(tmp_path: Path) -> None:
    """torch would read past the end of its memory."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.arange(77.0)}, path)
    claim(path, b"X\x03\x00\x00\x00cpuq\x06KM", b"X\x03\x00\x00\x00cpuq\x06J\x00\x00\x00\x10")
    with pytest.raises(DoconvError, match="storage 0 claims 1073741824 bytes, the file has 308 for it"):
        read(path)


def test_a_compressed_zip_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(10**6)}, path)
    rewrite_zip(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    with pytest.raises(DoconvError, match="is compressed, which torch"):
        read(path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.ones(1).expand(10**6, 10**6), "the tensors' shapes claims 4000000000000 bytes"),
        (lambda: torch.eye(3).to_sparse(), "'a' is a sparse tensor .*, expected tensors only"),
        (lambda: torch.empty(10**9, device="meta"), "without values"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "that is quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_values_of_their_own_are_refused(tmp_path: Path, tensor: Any, message: str) -> None:
    torch.save({"state_dict": {"a": tensor()}}, tmp_path / "a.pth")
    with pytest.raises(DoconvError, match=message):
        read(tmp_path / "a.pth")


def test_shared_and_expanded_tensors_are_read(tmp_path: Path) -> None:
    shared = {"a": STATE["a.weight"], "b": STATE["a.weight"], "c": torch.ones(1).expand(8, 8)}
    torch.save(shared, tmp_path / "a.pth")
    assert same(read(tmp_path / "a.pth")[0], shared)


def test_a_pickles_memory_table_stays_small(tmp_path: Path) -> None:
    """C's unpickler allocates a table as long as the largest index: 32 GB for these few bytes."""
    (tmp_path / "a.pth").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(DoconvError, match=r"a\.pth' is a pickle that torch\.save did not write"):
        read(tmp_path / "a.pth")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ".metadata").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(DoconvError, match="is no metadata of"):
        read(tmp_path / "d")


# The state (None, {"chunks": 7}) for the class TensorStorageMetadata, not for one of its instances.
STATE_OF_A_CLASS = (
    b"\x80\x02ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\nN}X\x06\x00\x00\x00chunksK\x07s\x86b."
)


def test_metadata_changes_no_class(tmp_path: Path) -> None:
    class Own:
        pass

    class Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
        def find_class(self, module: str, name: str) -> Any:
            return Own

    assert Unpickler(io.BytesIO(STATE_OF_A_CLASS)).load().chunks == 7  # the control: any other class takes it
    assert Own.chunks == 7  # type: ignore[attr-defined]
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ".metadata").write_bytes(STATE_OF_A_CLASS)
    with pytest.raises(DoconvError, match=r"cannot be read \(TypeError: .*__setstate__"):
        read(tmp_path / "d")


class Calls:
    """A pickle of this calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "a call alone"])
def test_a_pickle_with_more_than_tensors_says_what_was_found(tmp_path: Path, form: str) -> None:
    path, marker = tmp_path / "a.pth", tmp_path / "marker"
    content = {"state_dict": STATE, "args": Calls(eval, f"open({str(marker)!r}, 'w')")}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(
            content["args"] if "call" in form else content, path, _use_new_zipfile_serialization=form != "legacy"
        )
    if form in ("zip", "legacy"):
        state, notes = read(path)
        assert same(state, STATE)
        assert "left out, and not run: builtins.eval" in notes
    else:
        with pytest.raises(DoconvError, match=r"nothing of it was run\. Found: .*builtins\.eval.*torch\.save\("):
            read(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"\x89HDF\r\n\x1a\n", "an HDF5"), (struct.pack("<QQ", 0x112, 0), "an MXNet parameter")],
)
def test_files_of_other_frameworks_are_refused_by_name(tmp_path: Path, head: bytes, kind: str) -> None:
    (tmp_path / "a.pth").write_bytes(head + bytes(100))
    with pytest.raises(DoconvError, match=f"is {kind} file"):
        read(tmp_path / "a.pth")


def test_a_header_longer_than_the_file_is_told_before_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 10**6) + b"{}")
    with pytest.raises(DoconvError, match="its header claims 1000000 bytes, the file has 2 for it"):
        read(tmp_path / "a.safetensors")


# Everything that Python reports of imports, files, processes and sockets while a file with a hostile recipe is read.
WATCHER = """
import json, sys
import torch, timm, torchvision.models
from doconv_convert.artifacts.export import child_process as export_child
from doconv_convert.artifacts import models
from doconv_convert.workflows import fold as release
from typer.testing import CliRunner
from doconv_convert.cli.app import app
from doconv_convert import load

seen = []

def watch(event, args):
    if event in ("import", "open", "os.system", "subprocess.Popen", "socket.connect", "exec", "os.listdir"):
        seen.append(event + " " + " ".join(str(a)[:200] for a in args))

CliRunner().invoke(app, ["fold", "absent.pth", "-o", "x"])  # what the first run imports
sys.addaudithook(watch)
told = []
for path in sys.argv[1:]:
    seen.clear()
    result = CliRunner().invoke(app, ["fold", path, "-o", path + ".out.safetensors"])
    try:
        load(path)
    except Exception as error:
        said = str(error)
    told.append({"path": path, "exit": result.exit_code, "said": result.stderr, "load": said, "seen": list(seen)})
print(json.dumps(told))
"""

HOSTILE: list[dict[str, Any]] = [
    {"source": "{folder}/evil.py:factory", "args": {}},
    {"source": "evil:factory", "args": {}},
    {"source": "os:system", "args": {"command": "touch {folder}/ran"}},
    {"source": "{folder}/evil.pt2", "args": {}},
    {"source": "timm:hf-hub:somebody/evil", "args": {}},
    {"source": "timm:hf_hub:evil", "args": {}},
    {"source": "torchvision:../evil", "args": {}},
    {"source": "timm:resnet18", "args": {"checkpoint_path": "{folder}/evil.py"}},
    {"source": "timm:resnet18", "args": {"pretrained_cfg": {"file": "{folder}/evil.py"}}},
    {"source": "torchvision:resnet18", "args": {"weights": "{folder}/evil.py"}},
    {"source": "torchvision:resnet18@{folder}/evil.py", "args": {}},
]


def test_a_hostile_recipe_imports_and_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("open(__file__ + '.ran', 'w')\n\ndef factory():\n    raise SystemExit\n")
    (tmp_path / "evil.pt2").write_bytes(b"PK")
    paths = []
    for index, source in enumerate(HOSTILE):
        named = json.loads(json.dumps(source).replace("{folder}", str(tmp_path)))
        recipe = {"format": 1, "sites": [], "source": named, "aliases": {}, "channels_last": [], "tool_version": "0"}
        paths.append(tmp_path / f"{index}.safetensors")
        save_file(STATE, paths[-1], metadata={"doconv_convert": json.dumps(recipe)})
    before = names(tmp_path)
    for told in json.loads(run_python(WATCHER, *paths)):
        assert told["exit"] == 1, told
        assert told["said"].startswith("error: ")
        assert told["path"] in told["load"]
        assert any(f"open {told['path']}" in event for event in told["seen"]), "nothing was watched"
        bad = ("os.", "subprocess", "socket")
        assert not [event for event in told["seen"] if "evil" in event or event.startswith(bad)]
    assert names(tmp_path) == before
