"""How many MACs each ONNX operator performs, from the shapes of its inputs and outputs."""

from collections.abc import Callable
from math import prod
from typing import TypeAlias

import numpy as np
import onnx

Shape: TypeAlias = tuple[int, ...]
ShapeOf: TypeAlias = Callable[[int], Shape]
Rule: TypeAlias = Callable[[onnx.NodeProto, ShapeOf], int]

OUTPUT = -1

NOT_COUNTED = frozenset(
    """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor
    Cast CastLike Ceil Celu Clip Cos Cosh DequantizeLinear Div Dropout DynamicQuantizeLinear Elu Equal Erf
    Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Hardmax IsInf IsNaN LeakyRelu Less
    LessOrEqual Log LogSoftmax Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow QuantizeLinear Reciprocal Relu
    RotaryEmbedding Round Selu Shrink Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Sub Sum SwiGLU
    Swish Tan Tanh ThresholdedRelu Where Xor
    ArgMax ArgMin CumProd CumSum NegativeLogLikelihoodLoss NonMaxSuppression ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
    SoftmaxCrossEntropyLoss TopK BatchNormalization GroupNormalization InstanceNormalization
    LayerNormalization LRN LpNormalization MeanVarianceNormalization RMSNormalization AveragePool
    GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool MaxRoiPool MaxUnpool RoiAlign GridSample
    Resize Upsample
    CenterCropPad Col2Im Compress Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather
    GatherElements GatherND Identity NonZero OneHot Pad Range Reshape ReverseSequence Scatter
    ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze TensorScatter Tile Transpose Trilu
    Unique Unsqueeze ConcatFromSequence Optional OptionalGetElement OptionalHasElement SequenceAt
    SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SplitToSequence
    RegexFullMatch StringConcat StringNormalizer StringSplit BlackmanWindow HammingWindow HannWindow
    Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike
    """.split()  # noqa: SIM905 - a list of strings would take a line each
)
"""No MACs by convention: elementwise; reductions, normalisation, pooling, resizing; moving data; random."""

RANDOM = frozenset(op for op in NOT_COUNTED if op.startswith(("Bernoulli", "Multinomial", "Random")))


def _conv(weight: int) -> Rule:
    """Each output element sums over its group's channels and the kernel: weight (C_out, C_in/g, *kernel)."""
    return lambda _, shape: prod(shape(OUTPUT)) * prod(shape(weight)[1:])


def _conv_transpose(_: onnx.NodeProto, shape: ShapeOf) -> int:
    """Each input element goes to its group's channels: weight (C_in, C_out/g, *kernel)."""
    return prod(shape(0)) * prod(shape(1)[1:])


def _gemm(node: onnx.NodeProto, shape: ShapeOf) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return prod(shape(OUTPUT)) * shape(0)[0 if transposed else 1]


def _matmul(_: onnx.NodeProto, shape: ShapeOf) -> int:
    return prod(shape(OUTPUT)) * shape(0)[-1]


def _einsum(node: onnx.NodeProto, shape: ShapeOf) -> int:
    """The product of all index extents, for two operands."""
    equation = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "equation")
    first, second = equation.replace(" ", "").split("->")[0].split(",")
    extents: dict[str, int] = {}
    batches: list[Shape] = []
    for term, dims in ((first, shape(0)), (second, shape(1))):
        before, ellipsis, after = term.partition("...")
        stop = len(dims) - len(after)
        batches.append(dims[len(before) : stop] if ellipsis else ())
        for letter, extent in zip(before + after, dims[: len(before)] + dims[stop:], strict=True):
            extents[letter] = max(extent, extents.get(letter, 1))
    return prod(extents.values()) * prod(np.broadcast_shapes(*batches))


def _attention(node: onnx.NodeProto, shape: ShapeOf) -> int:
    """Queries times keys, and the result times values; packed operands are (batch, length, heads * size)."""
    heads: dict[str, int] = {attribute.name: attribute.i for attribute in node.attribute}
    query, key, value = shape(0), shape(1), shape(2)
    if len(query) == 3:
        (batch, length, width), q_heads, kv_heads = query, heads["q_num_heads"], heads["kv_num_heads"]
        keys, size, value_size = key[1], width // q_heads, value[2] // kv_heads
    else:
        (batch, q_heads, length, size), keys, value_size = query, key[2], value[3]
    past = shape(4)[2] if len(node.input) > 4 and node.input[4] else 0
    return batch * q_heads * length * (keys + past) * (size + value_size)


def _recurrent(_: onnx.NodeProto, shape: ShapeOf) -> int:
    """Each step of each sequence multiplies by both weights, which hold all gates and directions."""
    return prod(shape(0)[:2]) * (prod(shape(1)) + prod(shape(2)))


def unknown(_: onnx.NodeProto, __: ShapeOf) -> int:
    raise LookupError


# operator: how its MACs follow from its shapes, and which of its inputs are weights or biases
RULES: dict[str, tuple[Rule, tuple[int, ...]]] = {
    "Conv": (_conv(1), (1, 2)),
    "ConvInteger": (_conv(1), (1,)),
    "QLinearConv": (_conv(3), (3, 8)),
    "DeformConv": (_conv(1), (1, 3)),
    "CausalConvWithState": (_conv(1), (1, 2)),
    "ConvTranspose": (_conv_transpose, (1, 2)),
    "Gemm": (_gemm, (0, 1, 2)),
    "MatMul": (_matmul, (0, 1)),
    "MatMulInteger": (_matmul, (0, 1)),
    "QLinearMatMul": (_matmul, (0, 3)),
    "Einsum": (_einsum, (0, 1)),
    "Attention": (_attention, ()),
    "LSTM": (_recurrent, (1, 2, 3, 7)),
    "GRU": (_recurrent, (1, 2, 3)),
    "RNN": (_recurrent, (1, 2, 3)),
}
