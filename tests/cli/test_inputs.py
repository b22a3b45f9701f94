"""Inputs on the command line: several, by name, from files, as images; their names and sizes in the ONNX file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
import torchvision
from PIL import Image
from support import varied_images
from support_cli import names, run_cli

from doconv_convert import save, to_doconv
from doconv_convert.artifacts.models import find_inputs, open_model
from doconv_convert.artifacts.sources.inputs import Inputs, InputSpec
from doconv_convert.artifacts.sources.source import build, parse_source
from doconv_convert.check.onnxruntime_run import check_resized
from doconv_convert.check.outputs.expected import ReferenceRun
from doconv_convert.check.torch_runs.device import find_device, full_precision
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.workflows import exports
from doconv_convert.workflows.rehearsal.randomize import randomize_and_calibrate

NETS = """
import torch
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.m = nn.Conv2d(1, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, image, mask):
        x = torch.relu(self.a(image) + self.m(mask))
        y = self.b(x)
        return {"logits": y.mean((2, 3)), "maps": [y, x]}


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * 256, 3)

    def forward(self, image):
        return self.head(self.a(image).flatten(1))


def two():
    return Two()


def fixed():
    return Fixed()
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    (folder / "nets.py").write_text(NETS)
    trained(f"{folder}/nets.py:two", folder / "two.safetensors", (4, 3, 16, 16), (4, 1, 16, 16))
    trained(f"{folder}/nets.py:fixed", folder / "fixed.safetensors", (4, 3, 16, 16))
    y, x = np.mgrid[:60, :90]
    Image.fromarray(np.stack([x * 2, y * 4, (x * y) % 251], -1).astype(np.uint8)).save(folder / "cat.jpg")
    (folder / "torn.jpg").write_bytes((folder / "cat.jpg").read_bytes()[:200])
    samples = {"mask": np.ones((1, 1, 16, 16)), "image": np.linspace(-1, 1, 768).reshape(1, 3, 16, 16)}
    np.savez(folder / "two.npz", **samples)  # type: ignore[arg-type]
    np.savez(folder / "wrong.npz", mask=samples["mask"], picture=samples["image"])
    return folder


def trained(source: str, path: Path, *shapes: tuple[int, ...]) -> None:
    model = to_doconv(build(parse_source(source)))
    randomize_and_calibrate(model, tuple(varied_images(*shape, seed=index) for index, shape in enumerate(shapes)))
    save(model, path, source=source)


def folded(desk: Path, name: str, onnx_file: Path, *options: Any) -> Any:
    result = run_cli(
        *("fold", desk / f"{name}.safetensors", "--model", f"{desk}/nets.py:{name}"),
        *("--onnx", onnx_file, *options, "--json"),
    )
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_two_named_inputs_nested_outputs_and_dynamic_sizes(desk: Path, tmp_path: Path) -> None:
    """The shapes come in another order than forward's arguments."""
    out = tmp_path / "two.onnx"
    shapes = ("--input-shape", "mask=1,1,16,16", "--input-shape", "image=1,3,16,16")
    dynamic = [f"{name}:{axis}={size}" for name in ("image", "mask") for axis, size in ((2, "height"), (3, "width"))]
    options = [word for text in dynamic for word in ("--dynamic", text)]
    document = folded(desk, "two", out, *shapes, *options, "--output-names", "logits,low,high")
    assert document["proven"]
    sizes = ["batch", 3, "height", "width"]
    assert document["export"]["inputs"] == [["image", sizes], ["mask", ["batch", 1, *sizes[2:]]]]
    assert [name for name, _ in document["export"]["outputs"]] == ["logits", "low", "high"]
    (resized,) = (s for s in document["proof"]["statuses"] if s["name"] == "other sizes")
    assert resized["state"] == "passed"
    assert resized["detail"].startswith("on inputs of 3x3x48x80, 3x1x48x80: 3 outputs")

    # the same file, held against the checkpoint once more, on samples by name
    result = run_cli(
        *("verify", out, "--against", desk / "two.safetensors", "--model", f"{desk}/nets.py:two", *options),
        *("--input", desk / "two.npz", "--output-names", "logits,low,high"),
    )
    assert result.exit_code == 0, result.stderr
    assert "proven: true" in result.stdout
    assert "3x3x48x80" in result.stdout


def test_samples_by_name_and_new_names(desk: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.onnx"
    document = folded(desk, "two", out, "--input", desk / "two.npz", "--input-names", "pixels,where", "--device", "cpu")
    assert document["proven"]
    assert [value.name for value in onnx.load(out).graph.input] == ["pixels", "where"]
    assert [value.name for value in onnx.load(out).graph.output] == ["logits", "maps_0", "maps_1"]


@pytest.mark.zoo
def test_timm_layers_of_its_own_go_through_on_an_image(desk: Path, tmp_path: Path) -> None:
    """Conv2dSame becomes a run-time subclass; the picture goes through timm's own preprocessing."""
    source = "timm:tf_mobilenetv3_small_minimal_100"
    start = tmp_path / "start.safetensors"
    converted = run_cli("to-doconv", source, "-o", start, "--input-shape", "1,3,64,64")
    assert converted.exit_code == 0, converted.stderr
    trained(source, tmp_path / "a.safetensors", (4, 3, 64, 64))
    arguments = ("--onnx", tmp_path / "a.onnx", "--input", desk / "cat.jpg", "--json")
    result = run_cli("fold", tmp_path / "a.safetensors", *arguments)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["proven"]
    assert document["export"]["inputs"] == [["x", ["batch", 3, 224, 224]]]


def test_timm_standardized_kernels_are_converted(tmp_path: Path) -> None:
    result = run_cli("to-doconv", "timm:test_nfnet", "--dry-run", "--json", "--input-shape", "1,3,64,64")
    counts = json.loads(result.stdout)["plan"]["counts"]
    assert sum(counts.values()) == counts["convert"] + counts["convert, no D (1x1)"]
    assert counts["convert"] > 9


def test_an_image_goes_through_the_weights_own_preprocessing(desk: Path) -> None:
    opened = open_model("torchvision:resnet18", None, {}, 0)
    inputs = find_inputs(opened, None, desk / "cat.jpg")
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    with Image.open(desk / "cat.jpg") as image:
        expected = weights.transforms()(image)
    assert inputs is not None
    assert inputs.own is not None
    assert torch.equal(inputs.own[0], expected[None])
    first, second = inputs.tensors(2)[0]
    assert torch.equal(first, expected)
    assert not torch.equal(first, second)


def test_a_detector_takes_its_own_image_in_a_list(desk: Path) -> None:
    opened = open_model("torchvision:ssdlite320_mobilenet_v3_large", None, {}, 0)
    inputs = find_inputs(opened, None, desk / "cat.jpg")
    assert inputs is not None
    assert inputs.image_list
    ((image,),) = inputs.arguments(1)
    assert image.shape == (3, 60, 90)


def test_other_sizes_of_samples() -> None:
    own = torch.arange(6.0).reshape(1, 1, 2, 3)
    resized = Inputs([InputSpec("x", (1, 1, 2, 3))], (own,)).resized([{2: 3, 3: 2}])
    assert resized.own is not None
    assert resized.own[0].tolist() == [[[[0, 1], [3, 4], [0, 1]]]]
    assert resized.specs[0].shape == (1, 1, 3, 2)


def test_a_file_that_is_wrong_at_other_sizes_alone_fails(tmp_path: Path) -> None:
    """The negative control: right at 8x8, with a border that does not move with the size."""
    from onnx import helper

    value = [helper.make_tensor_value_info(name, 1, ["n", 1, "h", 8]) for name in "xy"]
    cut = helper.make_node("Slice", ["x", "from", "to", "axis"], ["y"])
    numbers = {"from": 0, "to": 8, "axis": 2}
    constants = [helper.make_tensor(name, 7, [1], [number]) for name, number in numbers.items()]
    graph = helper.make_graph([cut], "g", [value[0]], [value[1]], constants)
    opset = helper.make_opsetid("", 18)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "cut.onnx")
    for height, state in ((8, "passed"), (40, "failed")):
        x: npt.NDArray[Any] = varied_images(3, 1, height, 8).numpy()
        assert check_resized(tmp_path / "cut.onnx", ReferenceRun([x], [x.astype(float)], [x], 3, {})).state == state


def test_devices() -> None:
    assert find_device("cpu").type == "cpu"
    for text in ("tpu?", "meta"):
        with pytest.raises(UsageError, match="`device`"):
            find_device(text)
    if not torch.cuda.is_available():
        with pytest.raises(DoconvError, match=r"'cuda'.*0 CUDA devices; use cpu"):
            find_device("cuda")
    place: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = place.fp32_precision
    with full_precision():
        assert place.fp32_precision == "ieee"
    assert place.fp32_precision == before


FIXED = ["fold", "{desk}/fixed.safetensors", "--model", "{desk}/nets.py:fixed", "--onnx", "{out}/a.onnx"]
TWO = ["fold", "{desk}/two.safetensors", "--model", "{desk}/nets.py:two", "--onnx", "{out}/a.onnx"]
SHAPE = ["--input-shape", "1,3,16,16"]
BAD: dict[str, tuple[list[str], int, list[str]]] = {
    "a size that cannot vary": (
        [*FIXED, *SHAPE, "--dynamic", "image:2=height"],
        2,
        ["--dynamic: height", "does not run at other sizes", "(3, 3, 32, 16)"],
    ),
    "a name that forward has not": (
        [*TWO, "--input-shape", "picture=1,3,16,16", "--input-shape", "mask=1,1,16,16"],
        2,
        ["got the inputs picture, mask", "expected image, mask"],
    ),
    "too few shapes": ([*TWO, *SHAPE], 2, ["(2, 3, 16, 16)", "mask"]),
    "names in a file that forward has not": (
        [*TWO, "--input", "{desk}/wrong.npz"],
        2,
        ["wrong.npz", "mask, picture", "expected image, mask"],
    ),
    "an image for a net of one's own": ([*FIXED, "--input", "{desk}/cat.jpg"], 2, ["cat.jpg' is an image", "FILE.npy"]),
    "a torn image": (
        ["to-doconv", "torchvision:resnet18", "-o", "{out}/a.safetensors", "--input", "{desk}/torn.jpg"],
        1,
        ["torn.jpg' cannot be read as an image", "expected a JPEG"],
    ),
    "one image for two": (
        ["to-doconv", "torchvision:raft_small", "-o", "{out}/a.safetensors", "--input", "{desk}/cat.jpg"],
        2,
        ["'torchvision:raft_small' takes several", "FILE.npz"],
    ),
    "an image for an ONNX file": (
        ["verify", "{desk}/id.onnx", "--against", "{desk}/id.onnx", "--input", "{desk}/cat.jpg"],
        2,
        ["cat.jpg' is an image", "FILE.npy"],
    ),
    "a device that is none": ([*FIXED, *SHAPE, "--device", "tpu?"], 2, ["--device: got 'tpu?'", "expected 'cpu'"]),
    "a device that is not there": ([*FIXED, *SHAPE, "--device", "cuda:9"], 1, ["--device: got 'cuda:9'", "use cpu"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_told_in_words(desk: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "export_in_child", lambda *_, **__: [])
    x = onnx.helper.make_tensor_value_info("x", 1, ["n", 3])
    y = onnx.helper.make_tensor_value_info("y", 1, ["n", 3])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), desk / "id.onnx")
    arguments, code, words = BAD[case]
    result = run_cli(*(text.format(desk=desk, out=tmp_path) for text in arguments))
    assert result.exit_code == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert "please report it" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert names(tmp_path) == []
