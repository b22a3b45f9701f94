"""Checkpoints: what is saved comes back to the bit, what is damaged or foreign is refused in words."""

import json
import pickle
import re
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import SAMPLES, build_model, sample_source, signature
from support_cli import TINY, names, read_file, rewrite_file, tiny, trained_sample, trained_tiny
from torch import Tensor, nn

from doconv_convert import fold, load, save, to_doconv
from doconv_convert.artifacts.checkpoints.checkpoint import load_into, load_strictly
from doconv_convert.artifacts.checkpoints.reading import read_checkpoint, require_finite
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.errors import DoconvError
from doconv_convert.nn.overlay import is_overlaid
from doconv_convert.rewrite.options import Options


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    """Keys in order, bits, dtypes and classes."""
    assert signature(got) == signature(expected)
    assert_same_state(got, expected)


def assert_same_state(got: nn.Module, expected: nn.Module) -> None:
    """What a file without a recipe can bring back: it does not tell a 1x1 layer without D from a plain one."""
    assert signature(got)[0] == signature(expected)[0]
    state = expected.state_dict()
    for key, tensor in got.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def saved_tiny(folder: Path, **options: Any) -> tuple[Path, nn.Module]:
    model = trained_tiny(folder, **options)
    save(model, folder / "a.safetensors")
    return folder / "a.safetensors", model


@pytest.mark.parametrize("d_mul", ["K", "K+3"])
@pytest.mark.parametrize("name", SAMPLES)
def test_round_trip(tmp_path: Path, name: str, d_mul: str) -> None:
    model = trained_sample(name, d_mul)
    save(model, tmp_path / "a.safetensors", source=sample_source(name))
    loaded = load(tmp_path / "a.safetensors", model=build_model(name))
    assert_same(loaded, model)
    assert read_checkpoint(tmp_path / "a.safetensors").state.keys() == model.state_dict().keys()
    # into a model that is converted already, too
    assert_same(load(tmp_path / "a.safetensors", model=to_doconv(build_model(name), d_mul=d_mul)), model)
    assert signature(fold(loaded)) == signature(build_model(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_in_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = trained_tiny(tmp_path).to(dtype)
    save(model, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", model=tiny(tmp_path))
    assert_same(loaded, model)
    assert loaded.get_parameter("first.D").dtype == dtype


def test_torchvision_is_built_from_its_recipe(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_0

    model = to_doconv(squeezenet1_0(num_classes=4))
    save(model, tmp_path / "a.safetensors", source="torchvision:squeezenet1_0")
    with pytest.raises(DoconvError, match=r"'classifier\.1\.weight' got"):
        load(tmp_path / "a.safetensors")
    tensors, recipe = read_file(tmp_path / "a.safetensors")
    recipe["source"]["args"] = {"num_classes": 4}
    rewrite_file(tmp_path / "a.safetensors", tensors, recipe)
    assert_same(load(tmp_path / "a.safetensors"), model)


def test_the_same_model_gives_the_same_bytes_in_an_ordinary_file(tmp_path: Path) -> None:
    for index in range(3):
        save(trained_sample("tied"), tmp_path / f"{index}.safetensors", source="sample_models.tied:tied")
    contents = {(tmp_path / f"{index}.safetensors").read_bytes() for index in range(3)}
    assert len(contents) == 1
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "0.safetensors")}
    assert len(modes) == 1


def test_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    model = trained_sample("tied")
    save(model, tmp_path / "a.safetensors")
    tensors, recipe = read_file(tmp_path / "a.safetensors")
    assert recipe["aliases"] == {
        "right.weight": "left.weight",
        "right.D": "left.D",
        "again.weight": "first.weight",
        "again.D": "first.D",
    }
    assert not recipe["aliases"].keys() & tensors.keys()
    loaded = load(tmp_path / "a.safetensors", model=build_model("tied"))
    assert loaded.get_parameter("left.D") is loaded.get_parameter("right.D")
    assert loaded.get_submodule("first") is loaded.get_submodule("again")


def test_views_of_one_storage_are_all_stored(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    both = torch.randn(2, 8)
    model.norm.weight, model.norm.bias = nn.Parameter(both[0]), nn.Parameter(both[1])
    save(model, tmp_path / "a.safetensors")
    assert_same(load(tmp_path / "a.safetensors", model=tiny(tmp_path)), model)


def test_memory_format_is_restored(tmp_path: Path) -> None:
    model = trained_sample("residual").to(memory_format=torch.channels_last)
    save(model, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", model=build_model("residual"))
    assert_same(loaded, model)
    kernel = loaded.get_parameter("stem.0.weight")
    assert kernel.stride() == model.get_parameter("stem.0.weight").stride()
    assert not kernel.is_contiguous()


def test_functional_kernels_are_restored_as_such(tmp_path: Path) -> None:
    model = trained_sample("functional")
    save(model, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors", model=build_model("functional"))
    assert is_overlaid(loaded.get_submodule("stem"))
    assert is_overlaid(loaded.get_submodule("scales"))
    assert not is_overlaid(loaded.get_submodule("last"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), model(x))


@pytest.mark.parametrize("source", [None, "net.py:tiny", "net:tiny"])
def test_without_a_trusted_source_the_model_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None
) -> None:
    """A recipe is data: what it names is not imported."""
    path, _ = saved_tiny(tmp_path)
    tensors, recipe = read_file(path)
    recipe["source"] = source and {"source": source, "args": {}}
    rewrite_file(path, tensors, recipe)
    marker = tmp_path / "net.imported"
    marker.unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DoconvError, match="model="):
        load(path)
    assert not marker.exists()
    # the control: named by the user it is imported
    (tmp_path / "net.py").write_text(TINY + "\n")
    loaded = load(path, model=build(parse_source(f"{tmp_path}/net.py:tiny")))
    assert marker.exists()
    assert loaded.get_parameter("first.D").any()


@pytest.mark.parametrize(
    ("source", "argument"),
    [
        ("torchvision:resnet18", "weights"),
        ("torchvision:resnet18", "weights_backbone"),
        ("torchvision:resnet18", "norm_layer"),
        ("timm:resnet18", "checkpoint_path"),
        ("timm:resnet18", "pretrained_cfg"),
        ("timm:resnet18", "pretrained"),
    ],
)
def test_a_recipe_may_not_set_every_argument(tmp_path: Path, source: str, argument: str) -> None:
    path, _ = saved_tiny(tmp_path)
    tensors, recipe = read_file(path)
    recipe["source"] = {"source": source, "args": {argument: "/etc/passwd"}}
    rewrite_file(path, tensors, recipe)
    with pytest.raises(DoconvError, match=f"'{argument}', which a recipe may not set"):
        load(path)


def edit(**changes: Any) -> Callable[[Any], Any]:
    return lambda recipe: {**recipe, **changes}


def edit_site(**changes: Any) -> Callable[[Any], Any]:
    return lambda recipe: {**recipe, "sites": [{**recipe["sites"][0], **changes}, *recipe["sites"][1:]]}


@pytest.mark.parametrize(
    "change",
    [
        lambda recipe: "",
        lambda recipe: "[]",
        lambda recipe: "null",
        lambda recipe: "[" * 100_000,
        lambda recipe: json.dumps(recipe)[:-1],
        edit(format=2),
        edit(source="torchvision:resnet18"),
        edit(source=""),
        edit(source={"source": 3, "args": None}),
        edit(sites=None),
        edit(sites=[1]),
        edit(sites=[{"owner": "first"}]),
        edit(aliases=[]),
        edit(aliases={"head.bias": "head.weight"}),
        edit(aliases={"more": "absent"}),
        edit(aliases={"more": ["head.bias"]}),
        edit(channels_last=["absent"]),
        edit(channels_last=["head.bias"]),
        edit(channels_last=3),
        edit_site(owner="absent"),
        edit_site(owner=["first"]),
        edit_site(owner="head"),
        edit_site(owner="norm"),
        edit_site(kernel="bias"),
        edit_site(groups=0),
        edit_site(groups=3),
        edit_site(groups="1"),
        edit_site(groups=True),
        edit_site(d_mul=-1),
        edit_site(d_mul=4),
        edit_site(d_mul=10**12),
        edit_site(d_mul=9.0),
        edit_site(more=1),
    ],
)
def test_a_hostile_recipe_is_an_error_in_words(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    path, _ = saved_tiny(tmp_path)
    tensors, recipe = read_file(path)
    rewrite_file(path, tensors, change(recipe))
    with pytest.raises(DoconvError, match=re.escape(f"'{path}'")):
        load(path, model=tiny(tmp_path))


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path, _ = saved_tiny(tmp_path)
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DoconvError, match="cannot be read as safetensors"):
            read_checkpoint(path)
    path.write_bytes(content)
    read_checkpoint(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}',
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    ],
)
@pytest.mark.parametrize("length", [None, 2, 2**20, 2**40, 2**64 - 1])
def test_a_lying_header_is_noticed(tmp_path: Path, header: bytes, length: int | None) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(4))
    with pytest.raises(DoconvError, match="cannot be read as safetensors"):
        read_checkpoint(path)


@pytest.mark.parametrize("key", ["first.D", "first.weight_extra"])
def test_a_factor_that_the_recipe_lists_must_be_there(tmp_path: Path, key: str) -> None:
    path, _ = saved_tiny(tmp_path, d_mul="K+3")
    tensors, recipe = read_file(path)
    del tensors[key]
    rewrite_file(path, tensors, recipe)
    with pytest.raises(DoconvError, match=f"'first' needs '{key}' with shape .*, got none"):
        load(path, model=tiny(tmp_path))


def lose(folder: Path, *lost: str, **options: Any) -> Path:
    """A plain state dict, as people bring it, some of whose keys were lost."""
    state = trained_tiny(folder, **options).state_dict()
    torch.save({key: value for key, value in state.items() if key not in lost}, folder / "a.pth")
    return folder / "a.pth"


def test_a_file_that_lost_some_of_its_d_is_refused(tmp_path: Path) -> None:
    path = lose(tmp_path, "grouped.D")
    with pytest.raises(DoconvError, match=r"2 kernels have a D, but 1 have none \('grouped'\).*`exclude` 'grouped'$"):
        load(path, model=tiny(tmp_path))
    loaded = load_into(tiny(tmp_path), read_checkpoint(path), Options(exclude=["grouped"]))
    assert loaded.get_parameter("first.D").any()
    assert type(loaded.get_submodule("grouped")) is nn.Conv2d
    path = lose(tmp_path, "grouped.D", "depthwise.D")
    with pytest.raises(DoconvError, match=r"1 kernels have a D, but 2 have none.*`include` 'first'$"):
        load(path, model=tiny(tmp_path))
    load_into(tiny(tmp_path), read_checkpoint(path), Options(include=["first"]))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (["first.weight_extra"], "'first' needs 'first.weight_extra' with shape"),
        (["first.D", "grouped.D", "depthwise.D"], "3 unexpected: 'first.weight_extra'"),
        (["first.weight"], "1 missing: 'first.weight'"),
    ],
)
def test_a_d_without_its_weight_extra_or_kernel_is_refused(tmp_path: Path, lost: list[str], message: str) -> None:
    path = lose(tmp_path, *lost, d_mul="K+3")
    model = tiny(tmp_path)
    with pytest.raises(DoconvError, match=re.escape(message)):
        load(path, model=model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_another_architecture_is_told_by_few_readable_keys(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    model = trained_tiny(tmp_path)
    save(model, path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    target = build_model("residual")
    before = signature(target)
    with pytest.raises(DoconvError) as error:
        load(path, model=target)
    message = str(error.value)
    assert re.search(r"does not fit ResidualNet: \d\d missing: 'stem.0.weight', .*, \.\.\.; 1\d unexpected: '", message)
    assert "`model`" in message
    assert len(message) < 600
    assert signature(target) == before


def test_a_wider_network_is_told_by_its_shapes(tmp_path: Path) -> None:
    path, _ = saved_tiny(tmp_path)
    wider = tiny(tmp_path)
    wider.head = nn.Linear(8, 5)
    with pytest.raises(DoconvError, match=r"of another shape or kind: 'head.weight' got \(3, 8\), expected \(5, 8\)"):
        load(path, model=wider)


class Runs:
    """A pickle of this runs code when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool, wrapped: bool) -> None:
    path, marker = tmp_path / "a.pth", tmp_path / "marker"
    content = {"state_dict": {"a": torch.ones(1)}, "args": Runs(marker)} if wrapped else Runs(marker)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if wrapped:
        checkpoint = read_checkpoint(path)
        assert torch.equal(checkpoint.state["a"], torch.ones(1))
        assert any("left out, and not run: " in note and "pathlib" in note for note in checkpoint.notes)
    else:
        with pytest.raises(DoconvError, match=r"more than tensors.*nothing of it was run.*Found: .*pathlib"):
            read_checkpoint(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the control: opened carelessly it does run
    assert marker.exists()


def test_of_a_whole_model_the_tensors_are_read_and_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    model = nn.Conv2d(1, 1, 1)
    torch.save(model, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.state.keys() == {"weight", "bias"}
    assert torch.equal(checkpoint.state["weight"], model.weight)
    assert "took the tensors of a pickled 'torch.nn.modules.conv.Conv2d'" in checkpoint.notes[0]
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"a": [1, 2]}))
    with pytest.raises(DoconvError, match=r"b\.pth"):
        read_checkpoint(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, expected a state dict"),
        (torch.ones(1), "holds a Tensor, expected a state dict"),
        ({"epoch": 3, "w": torch.ones(1)}, "'epoch' is a int, expected tensors only"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
    ],
)
def test_a_pickle_of_other_things_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(DoconvError, match=message):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_is_an_error_in_words(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.randn(1000)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for length in (0, 1, 2, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DoconvError, match=r"a\.pth"):
            read_checkpoint(path)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DoconvError, match=r"is a folder without weights; expected model\.safetensors"):
        read_checkpoint(tmp_path)
    with pytest.raises(DoconvError, match="is no file; expected a checkpoint"):
        read_checkpoint(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(DoconvError, match="another kind of file"):
        read_checkpoint(tmp_path / "text.pth")


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = trained_tiny(tmp_path)
    with torch.no_grad():
        model.get_parameter("first.D")[0, 0, 0] = float("nan")
        model.get_parameter("head.weight")[0] = float("inf")
    save(model, tmp_path / "a.safetensors")
    with pytest.raises(DoconvError, match=r"'first\.D' \(1 of 162\), 'head\.weight' \(8 of 24\); expected none"):
        require_finite(read_checkpoint(tmp_path / "a.safetensors"))


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": state, "best": torch.ones(())},
        lambda state: {"state_dict": {"model": state}},
        lambda state: with_prefix(state, "module."),
        lambda state: with_prefix(state, "_orig_mod."),
        lambda state: with_prefix(state, "model."),
        lambda state: {"state_dict": with_prefix(state, "module._orig_mod.model.")},
    ],
)
def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    model = trained_tiny(tmp_path)
    torch.save(wrap(model.state_dict()), tmp_path / "a.pth")
    assert_same_state(load(tmp_path / "a.pth", model=tiny(tmp_path)), model)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_child_named_model_keeps_its_name(tmp_path: Path, prefix: str) -> None:
    model = trained_tiny(tmp_path, "wrapped")
    torch.save(with_prefix(model.state_dict(), prefix), tmp_path / "a.pth")
    assert_same_state(load(tmp_path / "a.pth", model=tiny(tmp_path, "wrapped")), model)


def test_a_plain_state_dict_stays_plain(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    save(model, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        assert_same(load(tmp_path / name, model=tiny(tmp_path)), model)


def test_a_state_dict_from_before_batches_were_counted_loads(tmp_path: Path) -> None:
    state = dict(trained_tiny(tmp_path).state_dict())
    del state["norm.num_batches_tracked"]
    torch.save(state, tmp_path / "a.pth")
    assert load(tmp_path / "a.pth", model=tiny(tmp_path)).get_buffer("norm.num_batches_tracked") == 0


def test_what_cannot_be_stored_leaves_the_old_file(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"old")
    with torch.device("meta"):
        model = nn.Conv2d(1, 1, 3)
    with pytest.raises(DoconvError, match="'weight' is a tensor on the meta device"):
        save(model, folder / "a.safetensors")
    assert (folder / "a.safetensors").read_bytes() == b"old"
    for place in (folder, tmp_path / "absent" / "a.safetensors"):
        with pytest.raises(DoconvError, match="cannot write"):
            save(nn.Conv2d(1, 1, 3), place)
    assert names(folder) == ["a.safetensors"]


def test_a_header_whose_length_begins_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    """One file in 32: safetensors pads its header to a multiple of 8, and a pickle begins with 0x80."""
    path, model = tmp_path / "a.safetensors", to_doconv(tiny(tmp_path))
    for length in range(1, 300):
        save(model, path, source=f"{'a' * length}:tiny")
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    recipe = read_checkpoint(path).recipe
    assert recipe is not None
    assert len(recipe.sites) == 4


class Versioned(nn.Module):
    """As torchvision's MNASNet: it asks which version of the class wrote the state."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") not in (1, 2):
            raise ValueError(f"version should be 1 or 2, got {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)  # type: ignore[no-any-return]


def test_a_model_that_asks_for_its_own_version_loads_from_a_file_of_tensors(tmp_path: Path) -> None:
    trained = to_doconv(Versioned())
    nn.init.normal_(trained.get_parameter("body.0.D"))
    save(trained, tmp_path / "v.safetensors")
    assert_same(load(tmp_path / "v.safetensors", Versioned()), trained)
    old = {key: value for key, value in fold(trained).state_dict().items() if "num_batches" not in key}
    with pytest.raises(ValueError, match="version should be 1 or 2, got None"):
        Versioned().load_state_dict(old)
    load_strictly(Versioned(), old, "old.pth")
