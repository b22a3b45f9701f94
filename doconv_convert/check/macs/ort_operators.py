"""onnxruntime's own operators (domain com.microsoft), which ONNX's shape inference does not know: the shapes of
their outputs, and the MACs of those that multiply.

Quantized files and files that onnxruntime has optimized are full of them. One that is not in `CONTRIB` is unknown:
it is reported as uncounted, and so is what follows from its outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, TypeProto, helper, shape_inference

from doconv_convert.check.macs.rules import (
    OUTPUT,
    Rule,
    Shape,
    ShapeOf,
    attribute,
    conv,
    conv_transpose,
    gemm,
    matmul,
    recurrent,
)

Outputs: TypeAlias = Callable[[onnx.NodeProto, ShapeOf], Sequence[Shape | None]]


@dataclass(frozen=True)
class Contrib:
    """One operator: its outputs' shapes (None: not known) from those of its inputs, its MACs with the inputs that
    are weights or biases (None: it multiplies nothing by convention), the elements of a weight that is stored packed,
    several in a byte, and the input whose element type its outputs have."""

    outputs: Outputs
    macs: tuple[Rule, tuple[int, ...]] | None = None
    packed: Callable[[onnx.NodeProto], int] | None = None
    like: int = 0


def _given(node: onnx.NodeProto, index: int) -> bool:
    return index < len(node.input) and bool(node.input[index])


def _like(*inputs: int) -> Outputs:
    """One output, of the broadcast shape of these inputs."""
    return lambda _, shape: [tuple(np.broadcast_shapes(*(shape(index) for index in inputs)))]


def _standard(op: str, *inputs: int, skip: Sequence[str] = ("activation", "activation_params", "alpha")) -> Outputs:
    """The output that the standard operator `op` has on these inputs; with `channels_last` the first one is
    (N, *positions, C), and so is the output."""

    def outputs(node: onnx.NodeProto, shape: ShapeOf) -> Sequence[Shape | None]:
        last = node.op_type.startswith("Nhwc") or attribute(node, "channels_last", 0)
        shapes = [shape(index) for index in inputs]
        if last:
            shapes[0] = (shapes[0][0], shapes[0][-1], *shapes[0][1:-1])
        names = [f"in{place}" for place in range(len(inputs))]
        stand_in = helper.make_node(op, names, ["out"])
        stand_in.attribute.extend(a for a in node.attribute if a.name not in (*skip, "channels_last"))
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, list(dims))
            for name, dims in zip(names, shapes, strict=True)
        ]
        graph = helper.make_graph([stand_in], op, values, [onnx.ValueInfoProto(name="out")])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        try:
            inferred: TypeProto = shape_inference.infer_shapes(model).graph.output[0].type
        except shape_inference.InferenceError:
            return [None]
        dims = tuple(dim.dim_value for dim in inferred.tensor_type.shape.dim)
        if not inferred.tensor_type.HasField("shape") or min(dims, default=1) < 1:
            return [None]
        return [(dims[0], *dims[2:], dims[1]) if last else dims]

    return outputs


def _gemm_shape(first: int, second: int) -> Outputs:
    def outputs(node: onnx.NodeProto, shape: ShapeOf) -> Sequence[Shape]:
        rows = shape(first)[1 if attribute(node, "transA", 0) else 0]
        columns = shape(second)[0 if attribute(node, "transB", 0) else 1]
        return [(rows, columns)]

    return outputs


def _matmul_shape(first: int, second: int) -> Outputs:
    return _standard("MatMul", first, second)


def _fused_operands(node: onnx.NodeProto, shape: ShapeOf) -> tuple[Shape, Shape]:
    """Both operands of a FusedMatMul in the usual order: transBatch moves the rows behind the batch, trans swaps
    rows and columns."""
    made = []
    for index, side in enumerate("AB"):
        dims = shape(index)
        if attribute(node, f"transBatch{side}", 0):
            dims = (*dims[1:-1], dims[0], dims[-1])
        if attribute(node, f"trans{side}", 0) and len(dims) > 1:
            dims = (*dims[:-2], dims[-1], dims[-2])
        made.append(dims)
    return made[0], made[1]


def _fused_matmul_shape(node: onnx.NodeProto, shape: ShapeOf) -> Sequence[Shape]:
    first, second = _fused_operands(node, shape)
    rows, columns = first[-2:-1], second[-1:] if len(second) > 1 else ()
    return [(*np.broadcast_shapes(first[:-2], second[:-2]), *rows, *columns)]


def _fused_matmul(node: onnx.NodeProto, shape: ShapeOf) -> int:
    return prod(shape(OUTPUT)) * _fused_operands(node, shape)[0][-1]


def _nbits(node: onnx.NodeProto, shape: ShapeOf) -> int:
    return prod(shape(0)[:-1]) * _packed_elements(node)


def _packed_elements(node: onnx.NodeProto) -> int:
    return int(attribute(node, "K")) * int(attribute(node, "N"))


def _concat(node: onnx.NodeProto, shape: ShapeOf) -> Sequence[Shape]:
    """Inputs are the output's scale and zero point, then (tensor, scale, zero point) for each part."""
    parts = [shape(index) for index in range(2, len(node.input), 3)]
    axis = attribute(node, "axis") % len(parts[0])
    return [(*parts[0][:axis], sum(part[axis] for part in parts), *parts[0][axis + 1 :])]


def _global_pool(node: onnx.NodeProto, shape: ShapeOf) -> Sequence[Shape]:
    dims = shape(0)
    ones = (1,) * (len(dims) - 2)
    return [(dims[0], *ones, dims[-1]) if attribute(node, "channels_last", 0) else (*dims[:2], *ones)]


def _reduce_mean(node: onnx.NodeProto, shape: ShapeOf) -> Sequence[Shape]:
    dims = shape(0)
    axes = {axis % len(dims) for axis in attribute(node, "axes", range(len(dims)))}
    if attribute(node, "keepdims", 1):
        return [tuple(1 if axis in axes else size for axis, size in enumerate(dims))]
    return [tuple(size for axis, size in enumerate(dims) if axis not in axes)]


def _skip_norm(_: onnx.NodeProto, shape: ShapeOf) -> Sequence[Shape | None]:
    """The normalized sum, two statistics, and the sum itself."""
    return [shape(0), None, None, shape(0)]


def _embedding(_: onnx.NodeProto, shape: ShapeOf) -> Sequence[Shape]:
    """(batch, length) token ids become (batch, length, width of the table)."""
    return [(*shape(0), shape(2)[-1]), shape(0)[:1]]


def _projected(past: int) -> tuple[Outputs, Rule]:
    """Attention that projects its input itself: (B, S, C) times (C, Q + K + V), then as `_products`. Input `past`
    is (2, B, heads, length, size)."""

    def sizes(node: onnx.NodeProto, shape: ShapeOf) -> Sequence[int]:
        return list(attribute(node, "qkv_hidden_sizes", [])) or [shape(1)[-1] // 3] * 3

    def outputs(node: onnx.NodeProto, shape: ShapeOf) -> Sequence[Shape]:
        return [(*shape(0)[:2], sizes(node, shape)[2])]

    def macs(node: onnx.NodeProto, shape: ShapeOf) -> int:
        batch, length, width = shape(0)
        query, _, value = sizes(node, shape)
        keys = length + (shape(past)[3] if _given(node, past) else 0)
        return batch * length * (width * shape(1)[-1] + keys * (query + value))

    return outputs, macs


def _multi_head(node: onnx.NodeProto, shape: ShapeOf) -> tuple[int, int, int, int, int]:
    """Batch, queries, keys, and the widths of queries and values over all heads (MultiHeadAttention)."""
    query = shape(0)
    batch, length = query[:2]
    if len(query) == 5:  # (B, S, heads, 3, size): all three packed
        return batch, length, length, query[2] * query[4], query[2] * query[4]
    width = query[2]
    past = shape(6)[2] if _given(node, 6) else 0
    key = shape(1)
    if len(key) == 5:  # (B, T, heads, 2, size): keys and values packed
        return batch, length, key[1] + past, width, key[2] * key[4]
    value = shape(2)
    if len(key) == 4:  # (B, heads, T, size), of cross attention: they hold everything already
        return batch, length, key[2], width, value[1] * value[3]
    return batch, length, key[1] + past, width, value[2]


def _multi_head_shape(node: onnx.NodeProto, shape: ShapeOf) -> Sequence[Shape]:
    batch, length, _, _, width = _multi_head(node, shape)
    return [(batch, length, width)]


def _multi_head_macs(node: onnx.NodeProto, shape: ShapeOf) -> int:
    batch, length, keys, width, value = _multi_head(node, shape)
    return batch * length * keys * (width + value)


def _group_query(node: onnx.NodeProto, shape: ShapeOf) -> tuple[int, int, int, int]:
    """Batch, queries, keys and the queries' width (GroupQueryAttention); without keys all three are packed."""
    batch, length, width = shape(0)
    if not _given(node, 1):
        heads, groups = attribute(node, "num_heads"), attribute(node, "kv_num_heads")
        width = width // (heads + 2 * groups) * heads
    past = shape(3)[2] if _given(node, 3) else 0
    return batch, length, length + past, width


def _group_query_shape(node: onnx.NodeProto, shape: ShapeOf) -> Sequence[Shape]:
    batch, length, _, width = _group_query(node, shape)
    return [(batch, length, width)]


def _group_query_macs(node: onnx.NodeProto, shape: ShapeOf) -> int:
    batch, length, keys, width = _group_query(node, shape)
    return batch * length * keys * 2 * width


def _lstm_shape(node: onnx.NodeProto, shape: ShapeOf) -> Sequence[Shape]:
    length, batch, _ = shape(0)
    directions, hidden = shape(1)[0], attribute(node, "hidden_size")
    return [(length, directions, batch, hidden), *[(directions, batch, hidden)] * 2]


_ATTENTION, _ATTENTION_MACS = _projected(4)
_QATTENTION, _QATTENTION_MACS = _projected(8)
_NBITS = Contrib(lambda node, shape: [(*shape(0)[:-1], attribute(node, "N"))], (_nbits, (5,)), _packed_elements)

_MICROSOFT = {
    "FusedConv": Contrib(_standard("Conv", 0, 1), (conv(1), (1, 2))),
    "NhwcConv": Contrib(_standard("Conv", 0, 1), (conv(1), (1, 2))),
    "NhwcFusedConv": Contrib(_standard("Conv", 0, 1), (conv(1), (1, 2))),
    "QLinearConv": Contrib(_standard("Conv", 0, 3), (conv(3), (3, 8))),
    "ConvTransposeWithDynamicPads": Contrib(lambda *_: [None], (conv_transpose, (1, 3))),
    "FusedGemm": Contrib(_gemm_shape(0, 1), (gemm(0), (0, 1, 2))),
    "GemmFloat8": Contrib(_gemm_shape(0, 1), (gemm(0), (0, 1, 2))),
    "QGemm": Contrib(_gemm_shape(0, 3), (gemm(0), (3, 6))),
    "FusedMatMul": Contrib(_fused_matmul_shape, (_fused_matmul, (0, 1))),
    "TransposeMatMul": Contrib(_fused_matmul_shape, (_fused_matmul, (0, 1))),
    "MatMulIntegerToFloat": Contrib(_matmul_shape(0, 1), (matmul, (1, 6)), like=2),
    "MatMulInteger16": Contrib(_matmul_shape(0, 1), (matmul, (0, 1))),
    "DynamicQuantizeMatMul": Contrib(_matmul_shape(0, 1), (matmul, (1, 4))),
    "MatMulNBits": _NBITS,
    "MatMulBnb4": Contrib(_NBITS.outputs, (_nbits, ()), _packed_elements),
    "DynamicQuantizeLSTM": Contrib(_lstm_shape, (recurrent, (1, 2, 3, 7))),
    "Attention": Contrib(_ATTENTION, (_ATTENTION_MACS, (1, 2))),
    "QAttention": Contrib(_QATTENTION, (_QATTENTION_MACS, (1, 2)), like=3),
    "MultiHeadAttention": Contrib(_multi_head_shape, (_multi_head_macs, (3,))),
    "GroupQueryAttention": Contrib(_group_query_shape, (_group_query_macs, ())),
    "QLinearConcat": Contrib(_concat, like=2),
    "QLinearGlobalAveragePool": Contrib(_global_pool),
    "QLinearAveragePool": Contrib(_standard("AveragePool", 0)),
    "NhwcMaxPool": Contrib(_standard("MaxPool", 0)),
    "QLinearReduceMean": Contrib(_reduce_mean),
    "QLinearAdd": Contrib(_like(0, 3)),
    "QLinearMul": Contrib(_like(0, 3)),
    "BiasGelu": Contrib(_like(0, 1)),
    "BiasSoftmax": Contrib(_like(0)),
    "BiasAdd": Contrib(_like(0)),
    "SkipLayerNormalization": Contrib(_skip_norm),
    "SkipSimplifiedLayerNormalization": Contrib(_skip_norm),
    "EmbedLayerNormalization": Contrib(_embedding, like=2),
    "QuantizeLinear": Contrib(_like(0), like=2),
    "DequantizeLinear": Contrib(_like(0), like=1),
    "QLinearWhere": Contrib(_like(0, 1, 4), like=1),
    **{
        op: Contrib(_like(0))
        for op in (
            "QLinearSigmoid",
            "QLinearLeakyRelu",
            "QLinearSoftmax",
            "FastGelu",
            "Gelu",
            "QuickGelu",
            "RotaryEmbedding",
            "GroupNorm",
            "Trilu",
        )
    },
}

CONTRIB = {
    **{f"com.microsoft.{op}": contrib for op, contrib in _MICROSOFT.items()},
    # onnxruntime's optimizer writes it into the standard domain
    "SimplifiedLayerNormalization": Contrib(_like(0)),
}
