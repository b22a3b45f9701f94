"""Sources: their text forms, building offline and from users' code, and the inputs their models take."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import list_models

from doconv_convert.artifacts.sources.inputs import (
    InputSpec,
    example_inputs,
    forward_names,
    infer_inputs,
    parse_input_shape,
)
from doconv_convert.artifacts.sources.source import Source, build, parse_source, pinned, sample_models_folder
from doconv_convert.errors import DoconvError, UsageError


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the network was reached for")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)


@pytest.fixture
def factory_file(tmp_path: Path) -> str:
    (tmp_path / "doconv_test_layers.py").write_text("from torch import nn\nconv = nn.Conv2d\n")
    path = tmp_path / "net.py"
    path.write_text(
        "import doconv_test_layers\n"
        "from torch import nn\n"
        "INPUT_SHAPE = (4, 3, 20, 20)\n"
        "instance = nn.Conv2d(3, 3, 3)\n"
        "def small(width=4):\n"
        "    return doconv_test_layers.conv(3, width, 3)\n"
        "def fails():\n"
        "    raise ValueError('too wide')\n"
        "def leaves():\n"
        "    raise SystemExit(2)\n"
        "def gives_text():\n"
        "    return 'net'\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("text", "kind", "place", "name"),
    [
        ("torchvision:resnet18", "torchvision", "torchvision", "resnet18"),
        ("torchvision:googlenet@IMAGENET1K_V1", "torchvision", "torchvision", "googlenet"),
        ("timm:resnet18.a1_in1k", "timm", "timm", "resnet18.a1_in1k"),
        ("package.module:factory", "module", "package.module", "factory"),
        ("some dir/net.py:factory", "file", "some dir/net.py", "factory"),
        ("C:/models/net.py:factory", "file", "C:/models/net.py", "factory"),
    ],
)
def test_forms(text: str, kind: str, place: str, name: str) -> None:
    source = parse_source(text, {"num_classes": 7})
    assert (source.kind, source.place, source.name) == (kind, place, name)
    assert Source.from_json(json.loads(json.dumps(source.to_json()))) == source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet18", "names no model: expected 'torchvision:NAME'"),
        ("torchvision:resnet81", "torchvision has no model 'resnet81'; did you mean .*'resnet18'"),
        ("torchvision:ResNet18", "did you mean 'resnet18'"),
        ("timm:convnext_tinny", "timm has no model 'convnext_tinny'; did you mean 'convnext_tiny'"),
        ("timm:resnet18.nope", "has no weights 'nope': choose .*'a1_in1k'"),
        ("torchvision:resnet18@nope", "has no weights 'nope': choose .*'IMAGENET1K_V1'"),
        ("net.py", "names no model"),
        ("net.py:", "names no model"),
        ("net.py:a.b", "names no model"),
        ("a-b:factory", "names no model"),
        ("checkpoint.pth", "names no model"),
    ],
)
def test_other_texts_are_usage_errors(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_source(text)


@pytest.mark.parametrize("name", ["weights", "weights_backbone", "pretrained", "checkpoint_path"])
def test_weights_do_not_come_in_by_the_arguments(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' .* not allowed: choose weights by `weights`"):
        parse_source("torchvision:resnet18", {name: "DEFAULT"})


@pytest.mark.parametrize("data", [[], {"args": {}}, {"source": 3}, {"source": "torchvision:resnet18", "args": [1]}])
def test_broken_json_is_a_usage_error(data: object) -> None:
    with pytest.raises(UsageError):
        Source.from_json(data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "torchvision:squeezenet1_1",
        "torchvision:fcn_resnet50",
        "torchvision:ssdlite320_mobilenet_v3_large",
        "torchvision:googlenet",
        "torchvision:googlenet@DEFAULT",
        "torchvision:fasterrcnn_mobilenet_v3_large_fpn@DEFAULT",
        "timm:resnet10t.c3_in1k",
    ],
)
def test_building_needs_no_network(text: str) -> None:
    assert isinstance(build(parse_source(text)), nn.Module)


def test_seeds_decide_and_the_global_random_state_stays() -> None:
    source = parse_source("torchvision:squeezenet1_1", {"num_classes": 2})
    before = torch.get_rng_state()
    first, again, other = build(source, seed=1), build(source, seed=1), build(source, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.state_dict()["features.0.weight"] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_variant_is_the_network_of_its_weights() -> None:
    fresh, variant = (build(parse_source(f"torchvision:googlenet{end}")) for end in ("", "@DEFAULT"))
    assert (fresh.transform_input, variant.transform_input) == (False, True)
    assert "aux1.conv.conv.weight" in fresh.state_dict()
    assert "aux1.conv.conv.weight" not in variant.state_dict()
    assert all(weight.detach().std() > 0 for weight in variant.parameters() if weight.dim() > 1)


def test_pinned_names_the_variant() -> None:
    assert pinned(Source("torchvision:resnet50"), None) == Source("torchvision:resnet50")
    assert pinned(Source("torchvision:resnet50"), "DEFAULT").text == "torchvision:resnet50@IMAGENET1K_V2"
    assert pinned(Source("timm:resnet18"), "fb_ssl_yfcc100m_ft_in1k").text == "timm:resnet18.fb_ssl_yfcc100m_ft_in1k"
    assert pinned(Source("timm:resnet18"), "DEFAULT").text == "timm:resnet18.a1_in1k"
    with pytest.raises(UsageError, match=r"'net\.py:f' has no named weights, got 'DEFAULT': pass a checkpoint file"):
        pinned(Source("net.py:f"), "DEFAULT")


def test_a_failed_download_says_which_file_to_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = parse_source("torchvision:squeezenet1_1")
    with pytest.raises(DoconvError, match=r"'IMAGENET1K_V1'.*get https://\S+\.pth elsewhere.*`weights` FILE"):
        build(source, "DEFAULT")
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match="has no weights 'V9': choose 'DEFAULT' or 'IMAGENET1K_V1'"):
        build(source, "V9")

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    with pytest.raises(DoconvError, match=r"no route.*huggingface\.co/timm/resnet10t\.c3_in1k.*`weights` FILE"):
        build(parse_source("timm:resnet10t"), "DEFAULT")
    with pytest.raises(UsageError, match="'timm:efficientnet_lite1' has no weights 'DEFAULT': choose no weights"):
        build(parse_source("timm:efficientnet_lite1"), "DEFAULT")


def test_wrong_arguments_are_an_error_in_words() -> None:
    with pytest.raises(DoconvError, match=r"'torchvision:resnet18' raised TypeError: .*'color'"):
        build(parse_source("torchvision:resnet18", {"color": 3}))


def test_a_file_factory_with_a_neighbor(factory_file: str) -> None:
    before = list(sys.path)
    source = parse_source(f"{factory_file}:small", {"width": 6})
    model = build(source)
    assert isinstance(model, nn.Conv2d)
    assert model.out_channels == 6
    assert infer_inputs(source, model) == [InputSpec("input", (1, 3, 20, 20))]
    assert sys.path == before


def test_an_edited_file_is_read_anew_and_an_unchanged_one_keeps_its_classes(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    text = "from torch import nn\nclass Net(nn.Conv2d):\n    pass\ndef make():\n    return Net(1, 1, KERNEL)\n"
    path.write_text(text.replace("KERNEL", "3"))
    source = parse_source(f"{path}:make")
    first, again = build(source), build(source)
    assert type(first) is type(again)
    path.write_text(text.replace("KERNEL", "5"))
    assert build(source).kernel_size == (5, 5)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("smal", r"has no factory 'smal'; did you mean 'small'"),
        ("fails", r"net\.py:fails' raised ValueError: too wide"),
        ("leaves", r"net\.py:leaves' raised SystemExit: 2"),
        ("gives_text", r"net\.py:gives_text' returned a str: return the torch\.nn\.Module"),
        ("instance", r"net\.py:instance' is of type Conv2d, expected a function"),
        ("INPUT_SHAPE", r"net\.py:INPUT_SHAPE' is of type tuple, expected a function"),
    ],
)
def test_factories_that_give_no_model(factory_file: str, factory: str, message: str) -> None:
    with pytest.raises(DoconvError, match=message) as caught:
        build(parse_source(f"{factory_file}:{factory}"))
    assert (caught.value.__cause__ is not None) == ("raised" in message)


def test_files_and_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 +\n")
    (tmp_path / "doconv_test_needs.py").write_text("import doconv_test_absent\n")
    (tmp_path / "doconv_test_works.py").write_text("from torch import nn\nmake = nn.Identity\n")
    messages = {
        "absent.py:make": "cannot read 'absent.py': No such file",
        "broken.py:make": "'broken.py' raised SyntaxError",
        "doconv_test_gone.net:make": "no module 'doconv_test_gone' for 'doconv_test_gone.net': run from its folder",
        "doconv_test_needs:make": "'doconv_test_needs' raised ModuleNotFoundError: .*doconv_test_absent",
    }
    for text, message in messages.items():
        with pytest.raises(DoconvError, match=message):
            build(parse_source(text))
    assert isinstance(build(parse_source("doconv_test_works:make")), nn.Identity)


@pytest.mark.parametrize(
    ("text", "args", "expected"),
    [
        ("torchvision:resnet18", {}, [InputSpec("x", (1, 3, 224, 224))]),
        ("torchvision:inception_v3", {}, [InputSpec("x", (1, 3, 299, 299))]),
        ("torchvision:vit_b_32", {"image_size": 64}, [InputSpec("x", (1, 3, 64, 64))]),
        ("torchvision:lraspp_mobilenet_v3_large", {}, [InputSpec("input", (1, 3, 256, 256))]),
        (
            "torchvision:ssdlite320_mobilenet_v3_large",
            {},
            [InputSpec("images", (3, 320, 320), batched=False)],
        ),
        ("torchvision:r3d_18", {}, [InputSpec("x", (1, 3, 16, 112, 112))]),
        (
            "torchvision:raft_small",
            {},
            [InputSpec("image1", (1, 3, 128, 128)), InputSpec("image2", (1, 3, 128, 128))],
        ),
        ("timm:resnet10t", {}, [InputSpec("x", (1, 3, 176, 176))]),
        ("timm:resnet10t", {"in_chans": 1}, [InputSpec("x", (1, 1, 176, 176))]),
        ("timm:vit_tiny_patch16_224", {"img_size": 64}, [InputSpec("x", (1, 3, 64, 64))]),
    ],
)
def test_inferred_inputs(text: str, args: dict[str, object], expected: list[InputSpec]) -> None:
    source = parse_source(text, args)
    assert infer_inputs(source, build(source)) == expected


def test_every_torchvision_model_tells_its_inputs() -> None:
    for name in list_models():
        specs = infer_inputs(parse_source(f"torchvision:{name}"), nn.Conv2d(3, 3, 3))
        assert specs
        assert all(min(spec.shape[-2:]) >= 112 for spec in specs)


def test_a_vision_transformer_without_weights_takes_what_it_was_built_for() -> None:
    built = nn.Conv2d(3, 3, 3)
    built.image_size = 224  # as vit_h_14 has it, whose weights are for 518
    (spec,) = infer_inputs(parse_source("torchvision:vit_h_14"), built) or []
    assert spec.shape[-2:] == (224, 224)


def test_a_factory_without_a_shape_tells_nothing_and_a_bad_shape_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\nmake = nn.Identity\n")
    (tmp_path / "bad.py").write_text("from torch import nn\nmake = nn.Identity\nINPUT_SHAPE = [1, 3]\n")
    assert infer_inputs(parse_source(f"{tmp_path}/net.py:make"), nn.Identity()) is None
    with pytest.raises(DoconvError, match=r"INPUT_SHAPE beside '.*bad\.py:make' must be a tuple .* got \[1, 3\]"):
        infer_inputs(parse_source(f"{tmp_path}/bad.py:make"), nn.Identity())


def test_input_shapes_are_parsed() -> None:
    assert parse_input_shape("1,3,224,224") == InputSpec("", (1, 3, 224, 224))
    assert parse_input_shape(" x = 1, 3 ") == InputSpec("x", (1, 3))


@pytest.mark.parametrize("text", ["", "x", "x=", "=1,3", "1,,3", "1,0,3", "1,-3", "1x3", "x=y=1,a", "1.5,3", "²,3"])
def test_nonsense_shapes_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="is not understood: expected positive sizes with the batch first"):
        parse_input_shape(text)


def test_examples_are_varied_repeatable_and_leave_the_random_state() -> None:
    specs = [InputSpec("image", (1, 3, 40, 30)), InputSpec("video", (1, 3, 2, 9, 8), "float64")]
    specs += [InputSpec("row", (1, 5)), InputSpec("image_of_list", (3, 20, 20), batched=False)]
    before = torch.get_rng_state()
    tensors = example_inputs(specs, batch=6, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    shapes = [tuple(tensor.shape) for tensor in tensors]
    assert shapes == [(6, 3, 40, 30), (6, 3, 2, 9, 8), (6, 5), (3, 20, 20)]
    assert tensors[1].dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(tensors, example_inputs(specs, batch=6, seed=3), strict=True))
    assert not torch.equal(tensors[0], example_inputs(specs, batch=6, seed=4)[0])
    image = tensors[0]
    assert 0.5 < float(image.std()) < 1.6
    assert float(image.flatten(1).mean(1).std()) > 0.1
    assert float(image.flatten(1).std(1).std()) > 0.1
    # neighbors agree more than strangers: there is a pattern under the noise
    assert float((image[..., 1:] * image[..., :-1]).mean()) > 0.3


def test_meaning_is_not_made_up() -> None:
    with pytest.raises(UsageError, match=r"input 'tokens': got dtype 'int64', .* pass `input_file` FILE"):
        example_inputs([InputSpec("tokens", (1, 9), "int64")], batch=2, seed=0)


def test_forward_names() -> None:
    class Star(nn.Module):
        def forward(self, *images: Tensor) -> Tensor:
            return images[0]

    assert forward_names(nn.Identity(), 1) == ["input"]
    assert forward_names(nn.Bilinear(1, 1, 1), 2) == ["input1", "input2"]
    assert forward_names(Star(), 1) == ["input"]
    assert forward_names(Star(), 2) == ["input_0", "input_1"]


def test_sample_models_are_found() -> None:
    assert sample_models_folder().name == "sample_models"
