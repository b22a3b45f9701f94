"""Exported programs (.pt2) as sources: convert the graph, train its module, fold, save, export, prove."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import difference, equal, is_d, is_factor, outputs, randomize, run, varied_images
from support_cli import names, read_file, rewrite_file, run_cli
from torch import Tensor, nn

from doconv_convert import fold, load, save, to_doconv
from doconv_convert.artifacts.sources.programs import fixed_batch, load_program, untied_notes
from doconv_convert.rewrite.tracing import set_eval_mode


class Tied(nn.Module):
    """Two convolutions with one kernel, and an output in a dict."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second, self.third = (nn.Conv2d(8, 8, 3, padding="same") for _ in range(2))
        if tie:
            self.third.weight = self.second.weight
        self.drop = nn.Dropout()

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.norm(self.first(image)))
        x = self.third(torch.relu(self.second(x)))
        return {"mean": self.drop(x).mean((2, 3)), "map": x}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(1, 8, 3)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return torch.relu(self.a(image) + self.b(mask)).mean((2, 3))


def export(path: Path, model: nn.Module, *inputs: Tensor, dynamic: bool = False, **named: Tensor) -> Path:
    shapes = tuple({0: torch.export.Dim("samples")} for _ in inputs) if dynamic else None
    with torch.random.fork_rng():
        torch.export.save(torch.export.export(model.eval(), inputs, named or None, dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    image, mask = varied_images(2, 3, 12, 12), varied_images(1, 1, 12, 12)
    with torch.random.fork_rng():
        export(folder / "tied.pt2", Tied(), image, dynamic=True)
        export(folder / "pair.pt2", Pair(), image[:1], mask)
        export(folder / "named.pt2", Pair(), image[:1], mask=mask)
    return folder


def train(program: nn.Module, *inputs: Tensor) -> None:
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01, momentum=0.9)
    for _ in range(10):
        loss = sum(((out - 1) ** 2).mean() for out in outputs(program(*inputs)))
        assert isinstance(loss, Tensor)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def said(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_from_the_file_to_a_proven_onnx(files: Path, tmp_path: Path) -> None:
    source, start = files / "tied.pt2", tmp_path / "start.safetensors"
    converted = run_cli("to-doconv", source, "-o", start)
    assert converted.exit_code == 0, converted.stderr
    assert f"opening '{source}', an exported program: loading one can run code" in converted.stdout
    assert "'second.weight' and 'third.weight' hold the same values" in converted.stdout
    assert "come back untied" in converted.stdout

    x = varied_images(3, 3, 12, 12)
    model, original = load(start, model=load_program(str(source))), load_program(str(source))
    assert equal(run(model, x), run(original, x))
    assert sum(is_d(name) for name in model.state_dict()) == 2  # the tied kernel's one, and the first's
    train(model, x)
    assert difference(run(model, x), run(original, x)) > 0.01
    assert all(model.get_parameter(name).abs().max() > 0 for name in model.state_dict() if is_d(name))
    save(model, tmp_path / "trained.safetensors", source=str(source))

    onnx, plain = tmp_path / "out.onnx", tmp_path / "plain.safetensors"
    arguments = ("fold", tmp_path / "trained.safetensors", "--onnx", onnx, "-o", plain)
    untrusted = run_cli(*arguments)
    assert untrusted.exit_code == 1
    assert f"its code is only run if you name it: --model {source.name}" in untrusted.stderr
    assert not onnx.exists()

    document = said(run_cli(*arguments, "--model", source, "--json"))
    assert document["proven"]
    assert any("come back untied" in note for note in document["notes"])
    assert document["export"]["inputs"] == [["image", ["batch", 3, 12, 12]]]
    assert [name for name, _ in document["export"]["outputs"]] == ["mean", "map"]
    assert len(document["proof"]["outputs"]) == 2
    network = Tied(tie=False).eval()
    network.load_state_dict(read_file(plain)[0])
    network.second.weight = network.third.weight  # the name that the graph reads
    assert difference(run(network, x), run(model, x)) < 1e-5


@pytest.mark.zoo
def test_a_fixed_batch_stays_and_two_inputs_go_through(files: Path, tmp_path: Path) -> None:
    source = files / "pair.pt2"
    assert fixed_batch(load_program(str(source))) == 1
    assert fixed_batch(load_program(str(files / "tied.pt2"))) is None
    said(run_cli("to-doconv", source, "-o", tmp_path / "a.safetensors", "--d-mul", "K+2", "--json"))
    model = load(tmp_path / "a.safetensors", model=load_program(str(source)))
    train(model, varied_images(1, 3, 12, 12), varied_images(1, 1, 12, 12, seed=1))
    torch.save(model.state_dict(), tmp_path / "a.pth")  # as people bring it, without a recipe
    document = said(run_cli("fold", tmp_path / "a.pth", "--model", source, "--onnx", tmp_path / "a.onnx", "--json"))
    assert document["proven"]
    assert document["export"]["inputs"] == [["image", [1, 3, 12, 12]], ["mask", [1, 1, 12, 12]]]


@pytest.mark.parametrize("d_mul", ["K", "K+3"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_graph_that_composes_comes_back_from_its_file(files: Path, tmp_path: Path, d_mul: str, suffix: str) -> None:
    model = randomize(to_doconv(load_program(str(files / "tied.pt2")), d_mul=d_mul), seed=1)
    path, x = tmp_path / f"a{suffix}", varied_images(3, 3, 12, 12)
    save(model, path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    if suffix == ".safetensors":
        loaded = load(path, model=load_program(str(files / "tied.pt2")))
        assert equal(run(loaded, x), run(model, x))
        assert equal(run(load(path, model=loaded), x), run(model, x))  # an equally converted one takes it too
        assert list(fold(loaded).state_dict()) == [key for key in model.state_dict() if not is_factor(key)]
    plain = tmp_path / "plain.safetensors"
    said(run_cli("fold", path, "--model", files / "tied.pt2", "-o", plain, "--json"))
    folded = load_program(str(files / "tied.pt2"))
    folded.load_state_dict(read_file(plain)[0])
    assert difference(run(folded, x), run(model, x)) < 1e-5
    assert difference(run(folded, x), run(load_program(str(files / "tied.pt2")), x)) > 0.1


def test_a_lost_d_of_a_graph_is_refused(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(to_doconv(load_program(str(files / "tied.pt2"))), path)
    tensors, recipe = read_file(path)
    assert [site["owner"] for site in recipe["sites"]] == ["first", "third"]
    del tensors["third.D"]
    rewrite_file(path, tensors, recipe)
    result = run_cli("fold", path, "--model", files / "tied.pt2", "-o", tmp_path / "plain.safetensors")
    assert result.exit_code == 1
    assert "needs 'third.D'" in result.stderr
    assert not (tmp_path / "plain.safetensors").exists()


def test_modes_are_set_where_the_model_refuses(files: Path) -> None:
    program = load_program(str(files / "tied.pt2"))
    with pytest.raises(NotImplementedError):
        program.eval()
    assert set_eval_mode(program) is program
    assert not any(module.training for module in program.modules())


def test_only_equal_weights_are_told_to_be_untied(tmp_path: Path) -> None:
    image = varied_images(2, 3, 12, 12)
    apart = Tied(tie=False)
    assert untied_notes(load_program(str(export(tmp_path / "a.pt2", apart, image)))) == ()
    with torch.no_grad():
        apart.third.weight.copy_(apart.second.weight)  # biases differ, batch norm's ones and zeros do not count
    (note,) = untied_notes(load_program(str(export(tmp_path / "b.pt2", apart, image))))
    assert "'second.weight' and 'third.weight'" in note
    assert "they train apart from here on" in note
    (note,) = untied_notes(load_program(str(export(tmp_path / "c.pt2", Tied(), image))))
    assert "the graph only uses 'third.weight'" in note


def test_verify_flops_and_rehearse_take_a_program(files: Path) -> None:
    source = files / "tied.pt2"
    counted = run_cli("rehearse", source, "--no-export", "--json")
    assert said(counted)["models"][0]["status"] == "passed"
    assert f"opening '{source}'" in counted.stderr
    flops = said(run_cli("flops", source, "--json"))
    assert flops["total"] == 144 * 9 * (3 * 8 + 2 * 8 * 8)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["absent.pt2"], 1, ["'absent.pt2' is no file", "torch.export.save"]),
        (["{files}/bad.pt2"], 1, ["bad.pt2' cannot be loaded as an exported program", "save it again"]),
        (["{files}/named.pt2"], 1, ["takes 'mask' by keyword", "expected positional", "`args`"]),
        (["{files}/tied.pt2", "--model-args", '{{"tie": false}}'], 2, ["takes no model arguments, got ['tie']"]),
        (["{files}/tied.pt2", "--weights", "DEFAULT"], 2, ["no named weights", "'DEFAULT'", "checkpoint file"]),
        (["{files}/tied.pt2", "--input-shape", "1,3,9,12"], 2, ["(2, 3, 9, 12)", "--input-shape"]),
        (["{files}/tied.pt2", "--input", "{files}/cat.png"], 2, ["cat.png' is an image", "does not say", ".npy"]),
    ],
)
def test_bad_programs_are_told_in_words(
    files: Path, tmp_path: Path, arguments: list[str], code: int, words: list[str]
) -> None:
    (files / "bad.pt2").write_bytes(b"PK no program")
    (files / "cat.png").write_bytes(b"no image")
    given = [text.format(files=files) for text in arguments]
    result = run_cli("to-doconv", *given, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    assert names(tmp_path) == []
