"""Detections are compared box to box: their order is free, nothing else is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from doconv_convert.artifacts.export.exporter import export_onnx
from doconv_convert.check.onnxruntime_run import check_outputs
from doconv_convert.check.outputs.compare import Array
from doconv_convert.check.outputs.detections import detection_groups, in_order_of
from doconv_convert.check.outputs.expected import ReferenceRun
from doconv_convert.check.torch_runs.reference_run import reference_run

COUNT = 6
ORDER = [3, 0, 5, 1, 4, 2]
GENERATOR = np.random.default_rng(0)


def detections() -> dict[str, Array]:
    corners = GENERATOR.uniform(0, 50, (COUNT, 2))
    return {
        "boxes": np.concatenate([corners, corners + GENERATOR.uniform(5, 30, (COUNT, 2))], 1),
        "labels": np.array([1, 1, 2, 2, 3, 3]),
        "scores": np.sort(GENERATOR.uniform(0, 1, COUNT))[::-1].copy(),
        "masks": GENERATOR.uniform(0, 1, (COUNT, 1, 4, 4)),
    }


def order(truth: dict[str, Array], got: dict[str, Array]) -> dict[str, Array]:
    group = {key: index for index, key in enumerate(truth)}
    return dict(zip(truth, in_order_of(list(truth.values()), list(got.values()), [group]), strict=True))


def test_a_permuted_set_comes_back_in_the_truths_order() -> None:
    truth = detections()
    ordered = order(truth, {key: array[ORDER] for key, array in truth.items()})
    assert all(np.array_equal(ordered[key], truth[key]) for key in truth)


def test_equal_boxes_are_told_apart_by_their_label_and_boxes_without_an_area_by_their_score() -> None:
    truth = detections()
    truth["boxes"][1] = truth["boxes"][2]  # labels 1 and 2
    truth["boxes"][4:, 2:] = truth["boxes"][4:, :2]  # both have label 3
    ordered = order(truth, {key: array[ORDER] for key, array in truth.items()})
    assert all(np.array_equal(ordered[key], truth[key]) for key in truth)


def test_each_box_is_taken_once_and_another_number_is_left_alone() -> None:
    truth = detections()
    twice = {key: array.copy() for key, array in truth.items()}
    for array in twice.values():
        array[1] = array[0]
    ordered = order(truth, twice)
    assert not np.array_equal(ordered["boxes"], truth["boxes"])
    assert sorted(ordered["scores"]) == sorted(twice["scores"])
    fewer = {key: array[:-1] for key, array in truth.items()}
    assert all(np.array_equal(a, b) for a, b in zip(order(truth, fewer).values(), fewer.values(), strict=True))
    nan = {**truth, "boxes": truth["boxes"] * np.nan}
    assert sorted(order(truth, nan)["labels"]) == sorted(truth["labels"])


def test_the_dicts_of_a_detectors_output_are_found() -> None:
    one = {"boxes": torch.zeros(2, 4), "labels": torch.zeros(2), "scores": torch.zeros(2)}
    other = {"features": torch.zeros(1), "boxes": torch.zeros(1)}
    found = detection_groups([one, other, {**one, "masks": torch.zeros(2, 1)}])
    assert found == [
        {"boxes": 0, "labels": 1, "scores": 2},
        {"boxes": 5, "labels": 6, "scores": 7, "masks": 8},
    ]
    assert detection_groups(torch.zeros(1)) == []
    assert detection_groups({"out": torch.zeros(1)}) == []


class Detector(nn.Module):
    """Boxes from a convolution, listed in `order`; `shift` moves the third."""

    def __init__(self, order: Sequence[int], shift: float = 0.0, relabel: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, COUNT, 3)
        self.order = list(order)
        self.shift = torch.zeros(COUNT, 4)
        self.shift[2] = shift
        self.labels = torch.arange(COUNT) % 3
        self.labels[2] += relabel

    def forward(self, images: list[Tensor]) -> list[dict[str, Any]]:
        x = self.conv(images[0][None])[0].mean((1, 2))
        boxes = 10 * torch.stack([x, x, x + 2, x + 3 + x.abs()], 1) + self.shift
        found = {"boxes": boxes, "labels": self.labels + 0 * x.long(), "scores": x.sigmoid()}
        return [{key: value[self.order] for key, value in found.items()}]


@pytest.fixture(scope="module")
def reference() -> ReferenceRun:
    model = Detector(range(COUNT)).eval()
    image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    return reference_run(model, Detector(range(COUNT)), ([image],), 1)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (Detector(range(COUNT)), None),
        (Detector(ORDER), None),
        (Detector(ORDER, shift=0.1), "is off by"),
        (Detector(range(COUNT), shift=0.1), "is off by"),
        (Detector(ORDER, relabel=1), "differs in 1 of 6 values"),
        (Detector([*ORDER[:-1], ORDER[0]]), "is off by"),
        (Detector(ORDER[:-1]), "has shape (5, 4), expected (6, 4)"),
    ],
)
def test_a_file_may_list_its_detections_in_another_order_but_not_change_one(
    reference: ReferenceRun, tmp_path: Path, model: Detector, problem: str | None
) -> None:
    image = torch.randn(3, 8, 8)
    export_onnx(model, ([image],), tmp_path / "m.onnx", dynamic_batch=False)
    status, _ = check_outputs(tmp_path / "m.onnx", reference)
    assert status.state == ("failed" if problem else "passed"), status
    assert problem is None or any(problem in finding for finding in status.findings), status
