"""The operators in numpy compute what torch's do, in float64."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor
from torch.nn import functional as F

from doconv_convert.check.twin.operators import OPERATORS

GENERATOR = np.random.default_rng(0)
SAME = 1e-13  # sums of a few hundred products
POOLS: list[tuple[str, list[Callable[..., Tensor]]]] = [
    ("MaxPool", [F.max_pool1d, F.max_pool2d, F.max_pool3d]),
    ("AveragePool", [F.avg_pool1d, F.avg_pool2d, F.avg_pool3d]),
]


def run(operator: str, *inputs: Any, **attributes: Any) -> Any:
    names = [f"input_{index}" for index in range(len(inputs))]
    ports = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in (*names, "y")]
    graph = helper.make_graph([helper.make_node(operator, names, ["y"], **attributes)], "g", ports[:-1], ports[-1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    return ReferenceEvaluator(model, new_ops=OPERATORS).run(None, dict(zip(names, inputs, strict=True)))[0]


def drawn(*shape: int) -> Any:
    return GENERATOR.standard_normal(shape)


def chosen(count: int, least: int, most: int) -> list[int]:
    return GENERATOR.integers(least, most, count, endpoint=True).tolist()


def same(got: Any, expected: Tensor) -> bool:
    return got.shape == tuple(expected.shape) and bool(np.abs(got - expected.numpy()).max() <= SAME)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(rank: int, groups: int) -> None:
    convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    for per_group in (1, 3):
        x = drawn(2, groups * per_group, *chosen(rank, 6, 9))
        size, stride, dilation, pad = (chosen(rank, *ends) for ends in ((1, 3), (1, 3), (1, 2), (0, 1)))
        w, b = drawn(2 * groups, per_group, *size), drawn(2 * groups)
        common = {"strides": stride, "dilations": dilation, "pads": [*pad, *pad], "group": groups}
        t = [torch.from_numpy(one) for one in (x, w, b)]
        assert same(run("Conv", x, w, b, **common), convolve(*t, stride, pad, dilation, groups))
        w = drawn(groups * per_group, 2, *size)
        more = [min(step - 1, 1) for step in stride]
        t[1] = torch.from_numpy(w)
        got = run("ConvTranspose", x, w, b, **common, output_padding=more)
        assert same(got, transposed(*t, stride, pad, more, groups, dilation))


def test_paddings_of_their_own() -> None:
    x, w = drawn(2, 3, 7, 8), drawn(4, 3, 3, 3)
    padded = F.pad(torch.from_numpy(x), (2, 1, 0, 3))
    assert same(run("Conv", x, w, pads=[0, 2, 3, 1]), F.conv2d(padded, torch.from_numpy(w)))
    for way, before in (("SAME_UPPER", (0, 1, 1, 1)), ("SAME_LOWER", (1, 0, 1, 1))):
        padded = F.pad(torch.from_numpy(x), before)
        assert same(run("Conv", x, w, auto_pad=way, strides=[2, 2]), F.conv2d(padded, torch.from_numpy(w), stride=2))
    assert same(run("Conv", x, w, auto_pad="VALID"), F.conv2d(torch.from_numpy(x), torch.from_numpy(w)))


@pytest.mark.parametrize(("operator", "functions"), POOLS, ids=[name for name, _ in POOLS])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("ceil", [False, True])
def test_pools(operator: str, functions: list[Callable[..., Tensor]], rank: int, ceil: bool) -> None:
    for counted in (False, True):
        x, size, stride, pad = drawn(2, 3, *chosen(rank, 6, 9)), *(chosen(rank, *e) for e in ((2, 3), (1, 3), (0, 1)))
        more = {} if operator == "MaxPool" else {"count_include_pad": int(counted)}
        got = run(operator, x, kernel_shape=size, strides=stride, pads=[*pad, *pad], ceil_mode=int(ceil), **more)
        t = torch.from_numpy(x)
        last = (1, ceil) if operator == "MaxPool" else (ceil, counted)
        assert same(got, functions[rank - 1](t, size, stride, pad, *last))


def test_erf_and_gelu() -> None:
    x = np.concatenate([np.linspace(-7, 7, 2001), GENERATOR.standard_normal(2000), [0.0, np.inf, -np.inf]])
    assert np.abs(run("Erf", x) - [math.erf(value) for value in x]).max() < 3e-16
    assert np.isnan(run("Erf", np.array([np.nan])))
    finite = x[np.isfinite(x)]
    for way in ("none", "tanh"):
        assert same(run("Gelu", finite, approximate=way), F.gelu(torch.from_numpy(finite), approximate=way))
