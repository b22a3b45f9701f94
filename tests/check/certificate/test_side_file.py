"""The side file's sketches: every element counts, errors keep their size, every machine computes the same."""

import numpy as np
import pytest

from doconv_convert.check.certificate.side_file import BUCKETS, SLACK, Expected, compare_with, sketch
from doconv_convert.check.outputs.compare import FLOOR


def expected(values: np.ndarray, plain_error: float = 0.0, whole: bool = False, dtype: str = "float32") -> Expected:
    kept = values if whole else sketch(values)
    return Expected("y", dtype, values.shape, float(np.linalg.norm(values)), whole, plain_error, kept)


def test_a_sketch_is_the_same_everywhere() -> None:
    """Pinned: a certificate made on one machine is checked on another."""
    sums = sketch(np.arange(1, 6, dtype=np.float64))
    assert {int(i): float(sums[i]) for i in np.flatnonzero(sums)} == {
        52655: 1.0,
        26100: -2.0,
        17743: -3.0,
        33260: 4.0,
        29851: -5.0,
    }
    assert sums.shape == (BUCKETS,)


@pytest.mark.parametrize(("share", "slack"), [(1.0, SLACK), (1e-3, 1.1)])
def test_errors_keep_their_size(share: float, slack: float) -> None:
    """Dense errors, which rounding makes, within the slack; of 200 wrong elements a few share a bucket."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        error = rng.standard_normal(200_000) * (rng.random(200_000) < share)
        assert 1 / slack < np.linalg.norm(sketch(error)) / np.linalg.norm(error) < slack


def test_one_wrong_element_is_noticed_wherever_it_is() -> None:
    truth = np.random.default_rng(0).standard_normal((2, 7, 100, 100))
    one = expected(truth)
    clean = truth.astype(np.float32)
    assert compare_with([one], [clean], [])[0][3] is None
    for index in ((0, 0, 0, 0), (1, 6, 99, 99), (1, 3, 50, 7)):
        wrong = clean.copy()
        wrong[index] += np.float32(4 * FLOOR * one.norm)
        assert "is off by" in str(compare_with([one], [wrong], [])[0][3])


@pytest.mark.parametrize(
    ("got", "problem"),
    [
        (np.zeros((2, 3), np.float64), "is float64 (2, 3), expected float32 (2, 3)"),
        (np.zeros((6,), np.float32), "is float32 (6,), expected float32 (2, 3)"),
        (np.full((2, 3), np.nan, np.float32), "NaN or infinite"),
        (np.ones((2, 3), np.float32) * 1.001, "is off by 1.0e-03 of its scale"),
        (np.ones((2, 3), np.float32), None),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_shape_dtype_finiteness_and_values(got: np.ndarray, problem: str | None, whole: bool) -> None:
    found = compare_with([expected(np.ones((2, 3)), whole=whole)], [got], [])[0][3]
    assert (found is None) if problem is None else (problem in str(found))


@pytest.mark.parametrize("whole", [True, False])
def test_whole_numbers_must_be_equal(whole: bool) -> None:
    truth = np.arange(6, dtype=np.int64)
    one = expected(truth, whole=whole, dtype="int64")
    assert compare_with([one], [truth.copy()], [])[0][3] is None
    assert compare_with([one], [truth + np.eye(1, 6, 3, dtype=np.int64)[0]], [])[0][3] is not None


def test_detections_may_come_in_another_order_with_their_masks() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 50, (4, 2))
    boxes = np.hstack([corners, corners + rng.uniform(10, 20, (4, 2))])
    labels, scores, masks = np.array([1, 2, 3, 4]), rng.random(4), rng.random((4, 1, 150, 150))
    group = {"boxes": 0, "labels": 1, "scores": 2, "masks": 3}
    kept = [
        expected(boxes, whole=True),
        expected(labels, whole=True, dtype="int64"),
        expected(scores, whole=True),
        expected(masks),
    ]
    order = [2, 0, 3, 1]
    got = [boxes[order], labels[order], scores[order], masks[order]]
    got = [array.astype(one.dtype) for array, one in zip(got, kept, strict=True)]
    assert [problem for *_, problem in compare_with(kept, got, [group])] == [None] * 4
    assert all(problem for *_, problem in compare_with(kept, got, []))
