"""Foreign DO-Conv checkpoints by their keys alone: every layout in the wild, folded or refused by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import difference, randomize_and_calibrate, run, varied_images
from support_cli import run_cli, tiny, tiny_file
from support_foreign import Authors, Gated, Main, Older, Scaled, Summed, rebuild, wrapped
from torch import Tensor, nn

from doconv_convert import fold, load
from doconv_convert.artifacts.checkpoints.checkpoint import load_into
from doconv_convert.artifacts.checkpoints.fold_by_keys import fold_foreign_file
from doconv_convert.artifacts.checkpoints.foreign_keys import find_units
from doconv_convert.artifacts.checkpoints.reading import read_checkpoint
from doconv_convert.artifacts.checkpoints.unwrap import Selection
from doconv_convert.errors import CheckFailedError, DoconvError, UsageError
from doconv_convert.rewrite.fold import fold_in_place
from doconv_convert.rewrite.foreign.authors import authors_sites, folded_authors_kernel
from doconv_convert.rewrite.options import Options

# float64; the largest seen was 1e-15.
TOLERANCE = 1e-12
# Of the output's scale: by so much D moves the layer away from its W, or a wrong pairing from the right one.
MOVED = 0.1
ASSUMED = "the authors' formula is assumed for them: keys cannot tell"


def seeded(factory: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return factory().double().eval()


def fold_file(folder: Path, state: Any, *kernels: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What `fold FILE -o OUT` writes for a state, and what it says."""
    torch.save(state, folder / "a.pth")
    made = fold_foreign_file(folder / "a.pth", Selection(), kernels, folder / "out.safetensors")
    assert made is not None
    return load_file(folder / "out.safetensors"), made.notes


def image(channels: int) -> Tensor:
    return torch.randn(2, channels, 11, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain_like(layer: Authors, c_in: int, c_out: int) -> nn.Conv2d:
    has_bias = layer.bias is not None
    return nn.Conv2d(c_in, c_out, layer.size, padding=layer.padding, groups=layer.groups, bias=has_bias).double()


# (C_in, C_out, groups)
CHANNELS = {"one group": (4, 6, 1), "two groups": (4, 6, 2), "depthwise": (4, 4, 4), "multiplier 2": (4, 8, 4)}
SIZES = [(3, 3), (5, 5), (1, 7)]
D_MULS = {"K": 0, "K+3": 3, "2K": None}


@pytest.mark.parametrize("d_mul", D_MULS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("cls", [Authors, Older, Scaled])
def test_units_become_the_layers_they_were(
    tmp_path: Path, cls: Any, channels: str, size: tuple[int, int], d_mul: str
) -> None:
    (c_in, c_out, groups), more = CHANNELS[channels], D_MULS[d_mul]
    positions = size[0] * size[1]
    slots = 2 * positions if more is None else positions + more
    padding = (size[0] // 2, size[1] // 2)
    layer = seeded(lambda: cls(c_in, c_out, size, d_mul=slots, groups=groups, padding=padding))
    expected = run(layer, image(c_in))

    conv = plain_like(layer, c_in, c_out)
    state, notes = fold_file(tmp_path, layer.state_dict(), *(["*=1x7"] if size == (1, 7) else []))
    conv.load_state_dict(state, strict=True)
    assert difference(run(conv, image(c_in)), expected) <= TOLERANCE
    assert any(ASSUMED in note for note in notes)
    assert any("assumed to be square" in note for note in notes) is (size != (1, 7))
    assert any("eval_conv" in note for note in notes) is (cls is Scaled)

    # into a model, which knows the size; unfolded it is the same function, too
    model = nn.Sequential(plain_like(layer, c_in, c_out))
    torch.save({f"0.{key}": value for key, value in layer.state_dict().items()}, tmp_path / "b.pth")
    trained = load_into(model, read_checkpoint(tmp_path / "b.pth"), Options())
    assert difference(run(trained, image(c_in)), expected) <= TOLERANCE
    report = fold_in_place(trained)
    assert report.folded == ["0"]
    assert list(report.model.state_dict()) == ["0.weight", "0.bias"]
    assert type(report.model[0]) is nn.Conv2d  # type: ignore[index]
    assert difference(run(report.model, image(c_in)), expected) <= TOLERANCE

    # the controls: D moved the layer, and another pairing of its rows would show
    with torch.no_grad():
        rolled = layer.D.roll(1, 0)
        for wrong in (torch.zeros_like(rolled), rolled):
            layer.D.copy_(wrong)
            assert difference(run(layer, image(c_in)), expected) > MOVED


def test_the_stored_identity_is_used(tmp_path: Path) -> None:
    layer = seeded(lambda: Authors(3, 4))
    with torch.no_grad():
        layer.d_diag.mul_(1.5)
    conv = plain_like(layer, 3, 4)
    conv.load_state_dict(fold_file(tmp_path, layer.state_dict())[0])
    assert difference(run(conv, image(3)), run(layer, image(3))) <= TOLERANCE


@pytest.mark.parametrize("groups", [1, 2])
def test_a_1x1_layer_is_reshaped(tmp_path: Path, groups: int) -> None:
    layer = seeded(lambda: nn.Sequential(Authors(4, 6, (1, 1), groups=groups), Authors(6, 2)))
    state, notes = fold_file(tmp_path, layer.state_dict())
    assert tuple(state["0.weight"].shape) == (6, 4 // groups, 1, 1)
    plain = nn.Sequential(nn.Conv2d(4, 6, 1, groups=groups), nn.Conv2d(6, 2, 3)).double()
    plain.load_state_dict(state, strict=True)
    assert difference(run(plain, image(4)), run(layer, image(4))) <= TOLERANCE
    assert any("1 more have no D" in note for note in notes)


def test_a_folded_unit_is_renamed(tmp_path: Path) -> None:
    state, notes = fold_file(tmp_path, {"a.W": torch.ones(4, 3, 1, 5), "a.bias": torch.ones(4)})
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == {"a.weight": (4, 3, 1, 5), "a.bias": (4,)}
    assert not any(ASSUMED in note for note in notes)


def test_units_are_grouped_by_the_last_part_of_their_keys_alone(tmp_path: Path) -> None:
    net = seeded(lambda: nn.Sequential(Main(Authors(3, 4)), nn.BatchNorm2d(4)))
    keys = list(net.state_dict())
    assert "0._Main__conv.W" in keys
    assert "0.main.0.W" in keys
    for prefix in ("module.", "_orig_mod.", "model.", "module._orig_mod.model."):
        state, notes = fold_file(tmp_path, {**wrapped(net, prefix), "n_averaged": torch.ones(())})
        kernel = net[0].main[0].kernel()
        for owner in ("0.main.0", "0._Main__conv"):
            assert difference(state[f"{owner}.weight"], kernel) <= TOLERANCE
        assert torch.equal(state["1.running_var"], net[1].running_var)
        assert set(state) == {re.sub(r"\.W$", ".weight", k) for k in keys if not k.endswith((".D", ".d_diag"))}
        assert "took 'state_dict' of" in notes[0]
        assert f"stripped '{prefix.split('.')[0]}.' from every key" in notes


@pytest.mark.parametrize("cls", [Gated, Summed])
def test_keys_alone_cannot_tell_and_the_class_can(tmp_path: Path, cls: Any) -> None:
    layer = seeded(lambda: cls(3, 4))
    state, notes = fold_file(tmp_path, layer.state_dict())
    assert any(ASSUMED in note and "through a gate" in note and "over all channels" in note for note in notes)
    by_keys, by_graph = plain_like(layer, 3, 4), fold(nn.Sequential(layer))
    by_keys.load_state_dict(state)
    expected = run(layer, image(3))
    assert difference(run(by_keys, image(3)), expected) > MOVED
    assert type(by_graph[0]) is nn.Conv2d  # type: ignore[index]
    assert difference(run(by_graph, image(3)), expected) <= TOLERANCE


W, D, BIAS = torch.ones(4, 3, 9), torch.ones(3, 9, 9), torch.ones(4)
SHAPE = {"s.weight": torch.ones(4, 3, 3, 3), "s.Shape": torch.ones(9, 9), "s.Base": torch.ones(1), "s.D_diag": D[0]}
TENSORFLOW = torch.ones(9, 3, 4), torch.ones(9, 9, 3)
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "bias0": (
        {"a.b.W": W, "a.b.D": D, "a.b.d_diag": D, "a.b.bias0": BIAS},
        "'a.b' has a 'bias0'.*when bias=True",
    ),
    "ShapeConv": (SHAPE, "'s' is a ShapeConv layer .*not DO-Conv"),
    "TensorFlow": ({"conv/kernel:0": TENSORFLOW[0], "conv/D:0": TENSORFLOW[1]}, "'conv' has the layout .*TensorFlow"),
    "TensorFlow, dotted": ({"c.kernel": TENSORFLOW[0], "c.D": TENSORFLOW[1]}, "'c' has the layout .*TensorFlow"),
    "TensorFlow, W": ({"c.W": TENSORFLOW[0], "c.D": TENSORFLOW[1]}, "'c' has the layout .*TensorFlow"),
    "MXNet": ({"x0_weight": torch.ones(4, 3, 3, 3), "x0_D": torch.ones(9, 9, 3)}, "'x0' has the layout .*MXNet"),
    "no W": ({"a.D": D, "a.d_diag": D}, "'a' has 'D' and 'd_diag' but no 'W'"),
    "no D": ({"a.W": W, "a.d_diag": D}, "'a' has 'W' and 'd_diag' but no 'D'"),
    "no identity": ({"a.W": W, "a.D": D}, "'a' has 'W' and 'D' but no 'd_diag' or 'D_diag'"),
    "W alone": ({"a.W": W}, r"'a' has a 'W' of shape \(4, 3, 9\) but no 'D'"),
    "one lost all": (
        {"a.W": W, "a.D": D, "a.d_diag": D, "b.W": W},
        r"'b' has a 'W' of shape \(4, 3, 9\) but no 'D'",
    ),
    "one lost W": ({"a.W": W, "a.D": D, "a.d_diag": D, "b.D": D}, "'b' has a 'D' but no 'W'"),
    "twice": ({"a.W": W, "a.D": D, "a.d_diag": D, "a.D_diag": D}, "'a' has both 'd_diag' and 'D_diag'"),
    "a kernel beside": ({"a.W": W, "a.D": D, "a.d_diag": D, "a.weight": W}, "'a' has both a 'W' and a 'weight'"),
    "slots": ({"a.W": W[..., :8], "a.D": D, "a.d_diag": D}, r"do not go together: got W \(4, 3, 8\), D \(3, 9, 9\)"),
    "channels": ({"a.W": W[:, :2], "a.D": D, "a.d_diag": D}, "do not go together"),
    "identity": ({"a.W": W, "a.D": D, "a.d_diag": D[:1]}, "do not go together"),
    "outputs": ({"a.W": torch.ones(3, 1, 9), "a.D": D[:2], "a.d_diag": D[:2]}, "do not go together"),
    "empty": ({"a.W": W[:0], "a.D": D, "a.d_diag": D}, "do not go together"),
    "dimensions": ({"a.W": W[0], "a.D": D, "a.d_diag": D}, "do not go together"),
    "bias": ({"a.W": W, "a.D": D, "a.d_diag": D, "a.bias": BIAS[:3]}, r"'bias' of shape \(3,\), expected \(4,\)"),
    "mul": ({"a.W": W, "a.D": D, "a.d_diag": D, "a.mul": BIAS}, r"'mul' of shape \(4,\)"),
    "integers": ({"a.W": W.long(), "a.D": D, "a.d_diag": D}, "'W' of dtype torch.int64"),
    "NaN": ({"a.W": W * float("nan"), "a.D": D, "a.d_diag": D}, "NaN or infinite values in 'a.W'"),
    "no square": (
        {"a.W": W[..., :7], "a.D": D[:, :7, :7], "a.d_diag": D[:, :7, :7]},
        "7 kernel pos.*`kernels` 'a=1x7'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_only_resembles_a_unit_is_refused_by_name(tmp_path: Path, case: str) -> None:
    state, message = REFUSED[case]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(DoconvError, match=message):
        fold_foreign_file(tmp_path / "a.pth", Selection(), (), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_no_unit_is_none(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2)).state_dict()
    attention = {"a.W": torch.ones(4, 4), "a.D": torch.ones(4)}
    assert find_units({**plain, **attention}, "file") == ()
    foreign = {"a.W": W, "a.D": D, "a.d_diag": D}
    assert find_units(foreign, "file", own=foreign.keys()) == ()
    torch.save(plain, tmp_path / "a.pth")
    assert fold_foreign_file(tmp_path / "a.pth", Selection(), (), tmp_path / "out.safetensors") is None


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("a", "expected GLOB=HEIGHTxWIDTH"),
        ("a=0x9", "expected GLOB=HEIGHTxWIDTH"),
        ("a=2x4", "'a' has 9 kernel positions, 2x4 does not fit"),
        ("b*=3x3", r"'b\*' matches no layer; the file's are a"),
    ],
)
def test_a_kernel_size_that_fits_nothing_is_wrong_usage(tmp_path: Path, kernel: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fold_file(tmp_path, {"a.W": W, "a.D": D, "a.d_diag": D}, kernel)


def test_the_last_kernel_size_wins(tmp_path: Path) -> None:
    state = {f"{name}.{key}": tensor for name in "ab" for key, tensor in {"W": W, "D": D, "d_diag": D}.items()}
    made, notes = fold_file(tmp_path, state, "*=1x9", "b=9x1")
    assert (made["a.weight"].shape[2:], made["b.weight"].shape[2:]) == ((1, 9), (9, 1))
    assert not any("square" in note for note in notes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 5)), "'0' has 9 kernel positions, the model's 'weight' there"),
        (nn.Sequential(nn.Conv2d(6, 4, 3, groups=2)), "'0' has 1 groups by its shapes, the model's 2"),
        (nn.Sequential(nn.Conv2d(3, 5, 3)), "of another shape or kind: '0.weight' got"),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)), "missing: '1.weight'.*unexpected: '0.W', '0.D'"),
    ],
)
def test_a_unit_without_its_convolution_is_named(tmp_path: Path, model: nn.Module, message: str) -> None:
    torch.save({f"0.{k}": t for k, t in Authors(3, 4).state_dict().items()}, tmp_path / "a.pth")
    with pytest.raises(DoconvError, match=message):
        load(tmp_path / "a.pth", model=model)


def test_a_folded_kernel_is_not_turned(tmp_path: Path) -> None:
    torch.save({"0.W": torch.ones(4, 3, 1, 5), "0.bias": torch.ones(4)}, tmp_path / "a.pth")
    load(tmp_path / "a.pth", model=nn.Sequential(nn.Conv2d(3, 4, (1, 5))))
    with pytest.raises(DoconvError, match=r"'0.weight' got \(4, 3, 1, 5\), expected \(4, 3, 5, 1\)"):
        load(tmp_path / "a.pth", model=nn.Sequential(nn.Conv2d(3, 4, (5, 1))))


def test_two_compositions_that_disagree_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = seeded(lambda: Authors(4, 6, groups=2))
    folded_authors_kernel("a", layer.W, layer.D, layer.d_diag, None)
    wrong = layer.kernel().detach().flatten(2).roll(1)
    with monkeypatch.context() as patched:
        patched.setattr("doconv_convert.rewrite.foreign.authors.authors_kernel", lambda *_: wrong)
        with pytest.raises(CheckFailedError, match="'a': kernel and feature composition differ"):
            folded_authors_kernel("a", layer.W, layer.D, layer.d_diag, None)


def test_one_layer_under_two_names_must_be_one(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self, make: Any) -> None:
            super().__init__()
            self.a = self.b = make()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    foreign = seeded(lambda: Twice(lambda: Authors(3, 3, padding=1)))
    torch.save(foreign.state_dict(), tmp_path / "a.pth")
    plain = Twice(lambda: nn.Conv2d(3, 3, 3, padding=1)).double()
    folded = fold(load(tmp_path / "a.pth", model=plain))
    assert difference(run(folded, image(3)), run(foreign, image(3))) <= TOLERANCE
    state = {key: tensor + key.startswith("b") for key, tensor in foreign.state_dict().items()}
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(DoconvError, match="'a' and 'b' are one layer in the model, but differ"):
        load(tmp_path / "b.pth", model=Twice(lambda: nn.Conv2d(3, 3, 3)).double())


def foreign_tiny(folder: Path, **options: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = rebuild(tiny(folder), **options)
    return randomize_and_calibrate(net, varied_images(8, 2, 6, 6), seed=0)


@pytest.mark.parametrize("d_mul", [None, 50], ids=["K", "2K and more"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_training_goes_on_from_a_foreign_checkpoint(tmp_path: Path, dtype: torch.dtype, d_mul: int | None) -> None:
    net = foreign_tiny(tmp_path, d_mul=d_mul).to(dtype)
    torch.save(wrapped(net), tmp_path / "a.pth")
    source = f"{tiny_file(tmp_path)}:tiny"
    out = tmp_path / "start.safetensors"
    result = run_cli("to-doconv", source, "--weights", tmp_path / "a.pth", "-o", out)
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stdout.split())
    assert "2 layers go on with their own W and D: first, depthwise" in said
    assert "1 layers were folded and start anew at D = 0" in said
    assert said.count("grouped") >= 2
    assert "computes what the foreign model does" in said
    ours = load(out, model=tiny(tmp_path))
    x = varied_images(4, 2, 6, 6).double()
    # the kernel of 'grouped' was cast once to the file's dtype
    allowed = TOLERANCE if dtype is torch.float64 else torch.finfo(dtype).eps
    assert difference(run(ours.double(), x), run(net.double(), x)) <= allowed
    assert not ours.get_parameter("grouped.D").any()
    expected = net.first.D if d_mul is None else net.first.D + net.first.d_diag - torch.eye(9, 50)  # type: ignore
    assert difference(ours.get_parameter("first.D"), expected) <= allowed
    if d_mul is None:
        assert torch.equal(ours.get_parameter("first.D"), net.first.D)  # type: ignore[union-attr]
        assert torch.equal(ours.first.weight_first_slots.flatten(2), net.first.W)  # type: ignore[union-attr]


def test_a_layer_left_out_is_folded_and_stays_plain(tmp_path: Path) -> None:
    net = foreign_tiny(tmp_path)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    options = ["--weights", tmp_path / "a.pth", "--exclude", "first", "-o", tmp_path / "b.safetensors"]
    result = run_cli("to-doconv", f"{tiny_file(tmp_path)}:tiny", *options)
    assert result.exit_code == 0, result.stderr
    ours = load(tmp_path / "b.safetensors", model=tiny(tmp_path))
    assert type(ours.get_submodule("first")) is nn.Conv2d
    x = varied_images(4, 2, 6, 6).double()
    assert difference(run(ours.double(), x), run(net.double(), x)) <= torch.finfo(torch.float32).eps


def test_a_copy_can_be_folded_without_the_original(tmp_path: Path) -> None:
    """The composing class is shared between copies."""
    net = foreign_tiny(tmp_path)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    trained = load(tmp_path / "a.pth", model=tiny(tmp_path))
    x = varied_images(2, 2, 6, 6)
    before = run(trained, x)
    folded = fold(trained)
    assert not list(authors_sites(folded))
    assert torch.equal(run(trained, x), before)
    assert difference(run(folded.double(), x.double()), run(net.double(), x.double())) <= 1e-6
