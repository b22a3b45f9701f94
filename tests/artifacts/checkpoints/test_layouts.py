"""Checkpoints as trainers leave them: swapped averages, wrappers within keys, folders, tied tensors; each into a model.

The layouts are those of mmengine 0.10 (EMAHook), Lightning 2.6 (WeightAveraging), torch 2.14 (DDP, compile, FSDP),
transformers 4 and 5, accelerate 1, diffusers 0.3x and safetensors 0.8.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from support import difference, run, varied_images
from support_cli import run_cli, tiny, tiny_file, trained_tiny
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from doconv_convert import to_doconv
from doconv_convert.artifacts.checkpoints.checkpoint import fitted, load_into
from doconv_convert.artifacts.checkpoints.places import checkpoint_files, find_place
from doconv_convert.artifacts.checkpoints.reading import read_checkpoint
from doconv_convert.artifacts.checkpoints.unwrap import Selection
from doconv_convert.errors import DoconvError


class Net(nn.Module):
    """A child named `module` of its own, and a kernel that two layers share."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.module = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.twin = nn.Conv2d(width, width, 3, padding=1)
        self.twin.weight = self.module[0].weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.twin(self.module(self.stem(x)))
        return out


def drawn(seed: int, model: nn.Module | None = None) -> dict[str, Tensor]:
    """A state dict of its own values."""
    generator = torch.Generator().manual_seed(seed)
    model = Net() if model is None else model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


RAW, AVERAGE = drawn(0), drawn(1)


def is_in(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], tensor) for key, tensor in state.items())


def load(path: Path, **selection: Any) -> tuple[nn.Module, str]:
    """A plain network with the file's tensors, and the notes."""
    model = Net()
    checkpoint = fitted(read_checkpoint(path, Selection(**selection)), model)
    return load_into(model, checkpoint), "; ".join(checkpoint.notes)


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


SWAPPED: dict[str, tuple[dict[str, Any], str, str]] = {
    "mmengine": (
        {
            "meta": {"mmengine_version": "0.10.7"},
            "state_dict": AVERAGE,
            "ema_state_dict": {"steps": torch.tensor(7), **under("module.", RAW)},
            "message_hub": {},
        },
        "ema_state_dict.module.",
        "mmengine's EMAHook",
    ),
    "Lightning": (
        {
            "state_dict": AVERAGE,
            "current_model_state": RAW,
            "averaging_state": {"n_averaged": torch.tensor(7)},
            "callbacks": {},
        },
        "current_model_state.",
        "Lightning's WeightAveraging",
    ),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_a_file_whose_state_dict_is_the_average_is_taken_for_what_it_is(tmp_path: Path, name: str) -> None:
    content, raw, trainer = SWAPPED[name]
    torch.save(content, tmp_path / "a.pth")
    for ema in (False, True):
        model, notes = load(tmp_path / "a.pth", ema=ema)
        assert is_in(model, AVERAGE)
        assert f"'state_dict' holds the averaged weights ({trainer} swaps them)" in notes
        assert f"`prefix` {raw} takes them" in notes
        assert "left the averaged weights" not in notes
    model, notes = load(tmp_path / "a.pth", prefix=raw)
    assert is_in(model, RAW)


def test_an_average_that_is_not_swapped_stays_an_average(tmp_path: Path) -> None:
    """The same names, with torch's own counter: `state_dict` is the model."""
    averaged = AveragedModel(Net())
    averaged.module.load_state_dict(AVERAGE)
    torch.save({"state_dict": RAW, "ema_state_dict": averaged.state_dict()}, tmp_path / "a.pth")
    assert is_in(load(tmp_path / "a.pth")[0], RAW)
    assert is_in(load(tmp_path / "a.pth", ema=True)[0], AVERAGE)


WRAPPED: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "DDP": lambda state: under("module.", state),
    "compile": lambda state: under("_orig_mod.", state),
    "compile of DDP": lambda state: under("_orig_mod.module.", state),
    "DDP of compile": lambda state: under("module._orig_mod.", state),
    "a compiled child": lambda state: {key.replace("module.0", "module._orig_mod.0"): t for key, t in state.items()},
    "a child in DDP": lambda state: {key.replace("stem.", "stem.module."): tensor for key, tensor in state.items()},
    "FSDP and checkpointing": lambda state: {
        "_fsdp_wrapped_module." + key.replace("twin.", "twin._checkpoint_wrapped_module."): tensor
        for key, tensor in state.items()
    },
    "a compiled child in Lightning": lambda state: under("net._orig_mod.", state) | {"criterion.weight": torch.ones(2)},
    "Lightning": lambda state: (
        under("net.", state) | {"criterion.weight": torch.ones(2), "metric.total": torch.ones(1)}
    ),
    "Lightning, compiled": lambda state: under("_orig_mod.model.", state) | {"_orig_mod.loss.w": torch.ones(1)},
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("converted", [False, True])
def test_wrappers_anywhere_in_a_key_and_the_prefix_that_fits(tmp_path: Path, name: str, converted: bool) -> None:
    trained = to_doconv(Net()) if converted else Net()
    state = drawn(3, trained)
    torch.save({"state_dict": WRAPPED[name](state), "epoch": 3}, tmp_path / "a.pth")
    model, notes = load(tmp_path / "a.pth")
    assert is_in(model, state)
    assert "stripped '" in notes or "the only prefix that fits the model; left " in notes
    assert ("criterion.weight" in notes) is (name in ("Lightning", "a compiled child in Lightning"))


def test_a_child_of_the_models_own_keeps_its_name(tmp_path: Path) -> None:
    torch.save(RAW, tmp_path / "a.pth")
    model, notes = load(tmp_path / "a.pth")
    assert is_in(model, RAW)
    assert notes == ""


def test_where_several_prefixes_fit_they_are_named(tmp_path: Path) -> None:
    parts = {"student": RAW, "teacher": AVERAGE}
    flat = under("student.", RAW) | under("teacher.", AVERAGE)
    for content in (
        parts,
        {"state_dict": flat},
        {**parts, "epoch": 3, "optimizer": {"state": {0: {"m": torch.ones(1)}}}},
    ):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(
            DoconvError, match=r"2 parts that fit Net; say which one: `prefix` student\., `prefix` teach"
        ):
            load(tmp_path / "a.pth")
        assert is_in(load(tmp_path / "a.pth", prefix="teacher.")[0], AVERAGE)
    torch.save({"small": drawn(2, Net(3)), "large": RAW}, tmp_path / "a.pth")  # only one has the model's shapes
    model, notes = load(tmp_path / "a.pth")
    assert is_in(model, RAW)
    assert "under 'large.', the only prefix that fits the model" in notes


@pytest.mark.parametrize("lost", ["stem.weight", "module.0.bias"])
def test_a_prefix_that_lacks_a_key_does_not_fit(tmp_path: Path, lost: str) -> None:
    state = under("net.", {key: tensor for key, tensor in RAW.items() if key != lost})
    torch.save({"state_dict": state | {"criterion.weight": torch.ones(2)}}, tmp_path / "a.pth")
    with pytest.raises(DoconvError, match=r"does not fit Net: .*missing"):
        load(tmp_path / "a.pth")


def test_of_a_shared_tensor_one_name_is_enough(tmp_path: Path) -> None:
    """safetensors' save_model names the others in its metadata; save_pretrained and accelerate only leave them out."""
    for trained in (Net(), to_doconv(Net())):
        state = drawn(4, trained)
        save_model(trained, str(tmp_path / "a.safetensors"))
        model, notes = load(tmp_path / "a.safetensors")
        assert is_in(model, state)
        assert "tensors stored once, by the file's own metadata: " in notes
        assert "'twin.weight' is 'module.0.weight'" in notes
        stored = {key: tensor for key, tensor in state.items() if not key.startswith("twin.") or key == "twin.bias"}
        save_file(stored, tmp_path / "b.safetensors", metadata={"format": "pt"})
        assert is_in(load(tmp_path / "b.safetensors")[0], state)
        del stored["module.0.weight"]
        save_file(stored, tmp_path / "c.safetensors")
        with pytest.raises(DoconvError, match=r"missing: 'module\.0\.weight', 'twin\.weight'"):
            load(tmp_path / "c.safetensors")


def shards(folder: Path) -> None:
    first, second = dict(list(RAW.items())[:2]), dict(list(RAW.items())[2:])
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(second, folder / "model-00002-of-00002.safetensors")
    names = dict.fromkeys(first, "model-00001-of-00002.safetensors") | dict.fromkeys(
        second, "model-00002-of-00002.safetensors"
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


# What is in a folder: (a function that writes it, what is said).
FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "save_pretrained": (lambda f: save_file(RAW, f / "model.safetensors"), "took 'model.safetensors' of the folder"),
    "save_pretrained, sharded": (shards, "took the shards of 'model.safetensors.index.json'"),
    "diffusers": (lambda f: save_file(RAW, f / "diffusion_pytorch_model.safetensors"), "took 'diffusion_pytorch_model"),
    "Trainer": (
        lambda f: [
            save_file(RAW, f / "model.safetensors"),
            *(torch.save({"a": 1}, f / name) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")),
            torch.save(object(), f / "training_args.bin"),
        ],
        "took 'model.safetensors'",
    ),
    "accelerate": (
        lambda f: [
            save_file(RAW, f / "model.safetensors"),
            *(
                torch.save({"a": 1}, f / name)
                for name in ("optimizer.bin", "scheduler.bin", "sampler.bin", "scaler.pt")
            ),
            (f / "random_states_0.pkl").write_bytes(b"\x80\x04N."),
        ],
        "took 'model.safetensors'",
    ),
    "two formats": (
        lambda f: [save_file(RAW, f / "model.safetensors"), torch.save(AVERAGE, f / "pytorch_model.bin")],
        "took 'model.safetensors'",
    ),
    "pytorch_model.bin": (lambda f: torch.save(RAW, f / "pytorch_model.bin"), "took 'pytorch_model.bin'"),
    "Lightning": (lambda f: torch.save({"state_dict": RAW}, f / "last.ckpt"), "took 'last.ckpt'"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_as_libraries_save_them(tmp_path: Path, name: str) -> None:
    write, said = FOLDERS[name]
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path)
    model, notes = load(tmp_path)
    assert is_in(model, RAW)
    assert said in notes
    opened = {path.name for path in checkpoint_files(tmp_path)}
    assert opened == {path.name for path in tmp_path.iterdir() if path.name.startswith("model")} or len(opened) == 1


def test_folders_that_do_not_say_which_model_name_them(tmp_path: Path) -> None:
    two, pipeline, both, lfs = (tmp_path / name for name in ("two", "pipeline", "both", "lfs"))
    for folder in (two, pipeline / "unet", pipeline / "vae", both, lfs):
        folder.mkdir(parents=True)
    save_file(RAW, two / "model.safetensors")
    save_file(RAW, two / "model_1.safetensors")
    save_file(RAW, pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(RAW, pipeline / "vae" / "diffusion_pytorch_model.safetensors")
    shards(both)
    save_file(RAW, both / "model.safetensors")
    (lfs / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    said = {
        two: r"several checkpoints \(model\.safetensors, model_1\.safetensors\); name one of them",
        pipeline: r"models in folders of their own \(unet, vae\); name one of them: '.*pipeline/unet'",
        both: r"a whole model and shards \(model\.safetensors, model\.safetensors\.index\.json\); name one",
        lfs: r"is a pointer of Git LFS, without the file itself \(git lfs pull\)",
    }
    for folder, message in said.items():
        with pytest.raises(DoconvError, match=message):
            read_checkpoint(folder)
    assert find_place(pipeline / "unet").file.name == "diffusion_pytorch_model.safetensors"


def test_one_command_folds_a_trainers_folder(tmp_path: Path) -> None:
    trained, folder = trained_tiny(tmp_path), tmp_path / "checkpoint-500"
    folder.mkdir()
    state = {f"net.{key}": tensor.contiguous() for key, tensor in trained.state_dict().items()}
    save_file({**state, "criterion.weight": torch.ones(3)}, folder / "model.safetensors")
    torch.save(object(), folder / "training_args.bin")
    out = tmp_path / "plain.safetensors"
    result = run_cli("fold", folder, "--model", f"{tiny_file(tmp_path)}:tiny", "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "under 'net.', the only prefix that fits the model; left 1: criterion.weight" in result.stdout
    folded = load_into(tiny(tmp_path), read_checkpoint(out))
    x = varied_images(2, 2, 6, 6).double()
    assert difference(run(folded.double(), x), run(trained.double(), x)) < 1e-6
