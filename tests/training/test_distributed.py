"""torchrun, DDP, FSDP2 and the folders of torch.distributed.checkpoint."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import support_training
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support import difference, run
from support_cli import ROOT, run_cli
from support_training import MOVED, NETS, converted, images, least_moved_d, train
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from doconv_convert import DoconvError, fold
from doconv_convert.artifacts.checkpoints.checkpoint import load_into
from doconv_convert.artifacts.checkpoints.reading import read_checkpoint

# One process sums a batch in another order than two; the largest difference seen is 3e-16.
ROUNDING = 1e-12
ENGINES = ("ddp", "fsdp2", "fsdp2-root")
SOURCE = f"{support_training.__file__}:{{}}"
GROUP_NORM = ["--model-args", '{"norm": "group"}']

both_kinds = pytest.mark.parametrize("kind", NETS)
# One worker runs torchrun, once, for all tests of this file.
pytestmark = pytest.mark.xdist_group("distributed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, loopback: Callable[..., Any]) -> Path:
    """What two processes under torchrun left: losses and checkpoint folders."""
    target = tmp_path_factory.mktemp("distributed")
    script = Path(__file__).with_name("train_distributed.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = loopback(
        subprocess.run,
        [*launcher, str(script), str(target)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return target


def single_process(kind: str) -> tuple[nn.Module, list[Tensor]]:
    model = converted(NETS[kind](norm="group").double(), d_mul="K+3")
    return model, train(model)


@both_kinds
def test_two_processes_reach_the_losses_of_one(folder: Path, kind: str) -> None:
    losses = json.loads((folder / "losses.json").read_text())
    model, expected = single_process(kind)
    assert least_moved_d(model) > MOVED
    plain = train(NETS[kind](norm="group").double())
    for engine in ENGINES:
        got = losses[f"{engine}-{kind}"]
        assert got == pytest.approx([float(loss) for loss in expected], abs=ROUNDING)
        assert got[0] == pytest.approx(float(plain[0]), abs=ROUNDING)


@both_kinds
@pytest.mark.parametrize("name", ["ddp-{}-nested", "fsdp2-{}-nested", "fsdp2-{}-flat", "fsdp2-root-{}-flat"])
def test_a_folder_is_read_without_a_process_group(folder: Path, kind: str, name: str) -> None:
    """Shards put together, the optimizer's left alone: the weights of the run in one process."""
    checkpoint = read_checkpoint(folder / name.format(kind))
    assert not torch.distributed.is_initialized()
    expected = single_process(kind)[0]
    assert checkpoint.state.keys() == expected.state_dict().keys()
    assert difference(checkpoint.state, {k: expected.state_dict()[k] for k in checkpoint.state}) < ROUNDING
    if name.endswith("nested"):
        assert checkpoint.notes == ("took 'app' of app", "took 'model' of model, optim, epoch")
    loaded = load_into(NETS[kind](norm="group"), checkpoint)
    x = images()[0].double()
    assert difference(run(loaded, x), run(expected, x)) < ROUNDING
    assert difference(run(fold(loaded), x), run(expected, x)) < ROUNDING


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        pytest.param(engine, kind, marks=[] if (engine, kind) == ("fsdp2", "functional") else [pytest.mark.zoo])
        for engine in ("ddp", "fsdp2")
        for kind in NETS
    ],
)
def test_from_a_folder_to_a_proven_file_by_one_command(folder: Path, tmp_path: Path, engine: str, kind: str) -> None:
    result = run_cli(
        *("fold", folder / f"{engine}-{kind}-nested", "--model", SOURCE.format(kind), *GROUP_NORM),
        *("--onnx", tmp_path / "out.onnx", "-o", tmp_path / "plain.safetensors", "--json"),
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["proven"] is True
    assert len(document["folded"]) == (3 if kind == "layers" else 2)
    assert "took 'model' of model, optim, epoch" in document["notes"]
    expected = fold(single_process(kind)[0]).state_dict()
    assert difference(load_file(tmp_path / "plain.safetensors"), dict(sorted(expected.items()))) < ROUNDING


def saved(folder: Path, content: Any = None, kind: str = "layers") -> Path:
    """A folder written by this process alone."""
    if content is None:
        content = converted(NETS[kind]()).state_dict()
    dcp.save(content, checkpoint_id=folder / "ckpt", no_dist=True)
    return folder / "ckpt"


def changed(folder: Path, change: Callable[[Any], None]) -> Path:
    """The folder with other metadata in it."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return folder


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


@pytest.mark.parametrize(
    ("content", "notes"),
    [
        (lambda state: state, ()),
        (lambda state: {"model": state}, ("took 'model' of model",)),
        (lambda state: {"epoch": 3, "state_dict": state}, ("took 'state_dict' of epoch, state_dict",)),
        (lambda state: {"app": {"net": state}}, ("took 'app' of app", "took 'net' of net")),
        (lambda state: state | {"rng": {1}}, ("left 1 pickled entries unread: rng",)),
        (lambda state: {f"model.{k}": v for k, v in state.items()}, ()),
    ],
)
@both_kinds
def test_what_people_save(tmp_path: Path, kind: str, content: Callable[[Any], Any], notes: tuple[str, ...]) -> None:
    model = converted(NETS[kind](), d_mul="K+3")
    train(model)
    checkpoint = read_checkpoint(saved(tmp_path, content(model.state_dict())))
    assert checkpoint.notes == notes
    loaded = load_into(NETS[kind](), checkpoint)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


class HostileName:
    """Names code that is in torch's own allowed modules."""

    def __reduce__(self) -> Any:
        return torch.distributed.checkpoint.metadata.os.system, ("true",)


def plant(value: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        metadata.planner_data = value

    return change


def test_metadata_never_runs_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = saved(tmp_path)
    content = pickle.loads((path / ".metadata").read_bytes())
    content.planner_data = Hostile(marker)
    (path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(DoconvError, match=r"unpickling that can run code; it was not opened: found pathlib\.Path\b"):
        read_checkpoint(path)
    result = run_cli("fold", path, "--model", SOURCE.format("layers"), "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 1
    assert not (tmp_path / "out.safetensors").exists()
    assert not marker.exists()
    pickle.loads((path / ".metadata").read_bytes())  # the control: torch's own reader would have run it
    assert marker.exists()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (HostileName(), "posix.system"),
        (eval, "builtins.eval"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
        (torch.load, "torch.serialization.load"),
        (torch.distributed.checkpoint.FileSystemReader, "torch.distributed.checkpoint.filesystem.FileSystemReader"),
    ],
)
def test_other_names_are_refused_by_name(tmp_path: Path, value: Any, found: str) -> None:
    with pytest.raises(DoconvError, match=f"found {found}"):
        read_checkpoint(changed(saved(tmp_path), plant(value)))


def test_pickled_entries_are_never_read(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    state = converted(NETS["layers"]()).state_dict()
    path = saved(tmp_path, state | {"extra": Hostile(marker)})
    marker.unlink(missing_ok=True)
    checkpoint = read_checkpoint(path)
    assert checkpoint.notes == ("left 1 pickled entries unread: extra",)
    assert checkpoint.state.keys() == state.keys()
    assert not marker.exists()


def shard(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


def truncate(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-600])


def corrupt(folder: Path) -> None:
    shard(folder).write_bytes(bytes(shard(folder).stat().st_size))


def forget(name: str) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        metadata.storage_data = {index: place for index, place in metadata.storage_data.items() if index.fqn != name}

    return change


def move_outside(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("head.bias", [0], 0)].relative_path = "../elsewhere.distcp"


def compress(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("head.bias", [0], 0)].transform_descriptors = ["zstd"]


def enlarge(metadata: Metadata) -> None:
    metadata.state_dict_metadata["head.bias"].size = torch.Size([10**15])


def repeat(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata["head.bias"]
    entry.size, entry.chunks = torch.Size([8]), entry.chunks * 2


def reshape(metadata: Metadata) -> None:
    metadata.state_dict_metadata["head.bias"].chunks[0].sizes = torch.Size([2, 2])


def drop_the_chunks(metadata: Metadata) -> None:
    metadata.state_dict_metadata["head.bias"] = BytesStorageMetadata()


def garble(metadata: Metadata) -> None:
    metadata.state_dict_metadata["head.bias"].chunks = 3


DAMAGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "truncated shard": (truncate, r"'__0_0\.distcp' ends after \d+ bytes, expected at least \d+ for"),
    "missing shard": (
        lambda folder: shard(folder).unlink(),
        r"the shard '__0_0\.distcp' cannot be read \(No such file",
    ),
    "zeroed shard": (corrupt, r"in '__0_0\.distcp' cannot be read \(.*it is damaged"),
    "truncated metadata": (lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:90]), "is damaged"),
    "empty metadata": (lambda f: (f / ".metadata").write_bytes(b""), "is damaged"),
    "other pickle": (lambda f: (f / ".metadata").write_bytes(pickle.dumps([1])), "is no metadata of"),
    "no place": (lambda f: changed(f, forget("head.bias")), r"does not add up .*; it is damaged"),
    "outside": (lambda f: changed(f, move_outside), r"is in '\.\./elsewhere\.distcp', outside of the folder"),
    "compressed": (lambda f: changed(f, compress), "is stored with zstd, which is not read here"),
    "larger": (lambda f: changed(f, enlarge), "the shards of 'head.bias' hold 4 values, expected 1000000000000000"),
    "overlap": (lambda f: changed(f, repeat), "the shards of 'head.bias' overlap and leave holes"),
    "other shape": (lambda f: changed(f, reshape), r"a shard of 'head\.bias' got shape \(4,\), expected \(2, 2\)"),
    "garbled": (lambda f: changed(f, garble), "does not add up"),
    "lost a tensor": (lambda f: changed(f, drop_the_chunks), r"does not fit Layers: 1 missing: 'head\.bias'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(tmp_path: Path, damage: str) -> None:
    path = saved(tmp_path)
    make, said = DAMAGES[damage]
    make(path)
    with pytest.raises(DoconvError, match=said):
        load_into(NETS["layers"](), read_checkpoint(path))


def test_which_of_several_is_asked(tmp_path: Path) -> None:
    state = converted(NETS["layers"]()).state_dict()
    with pytest.raises(DoconvError, match=r"holds 'generator', 'critic'; which is the model\?"):
        read_checkpoint(saved(tmp_path, {"generator": state, "critic": state}))


def test_a_folder_without_metadata_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DoconvError, match="is a folder without weights"):
        read_checkpoint(tmp_path)
