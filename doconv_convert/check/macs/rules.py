"""How many MACs each ONNX operator performs, from the shapes of its inputs and outputs."""

from collections.abc import Callable
from math import prod
from typing import Any, TypeAlias

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
"""No MACs by convention: elementwise; reductions, normalization, pooling, resizing; moving data; random."""


def conv(weight: int) -> Rule:
    """Each output element sums over its group's channels and the kernel: weight (C_out, C_in/g, *kernel)."""
    return lambda _, shape: prod(shape(OUTPUT)) * prod(shape(weight)[1:])


def conv_transpose(_: onnx.NodeProto, shape: ShapeOf) -> int:
    """Each input element goes to its group's channels: weight (C_in, C_out/g, *kernel)."""
    return prod(shape(0)) * prod(shape(1)[1:])


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of the node's attribute `name`; the last one's where a broken file has several."""
    found = next((one for one in reversed(node.attribute) if one.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def gemm(first: int) -> Rule:
    """(M, K) times (K, N), each perhaps stored transposed."""
    return lambda node, shape: prod(shape(OUTPUT)) * shape(first)[0 if attribute(node, "transA", 0) else 1]


def matmul(_: onnx.NodeProto, shape: ShapeOf) -> int:
    return prod(shape(OUTPUT)) * shape(0)[-1]


LONGEST_EQUATION = 1000
"""On an equation of a million dots neither onnx's shape inference nor a count ends; real ones have 20 characters."""


def equation(node: onnx.NodeProto) -> str:
    """Of an Einsum. Raises ValueError for one that is too long."""
    text = attribute(node, "equation")
    if len(text) > LONGEST_EQUATION:
        raise ValueError
    return str(text.decode().replace(" ", ""))


def _einsum(node: onnx.NodeProto, shape: ShapeOf) -> int:
    """Operand after operand, from left to right: each step multiplies over all index extents it sees, and sums
    those away that neither the result nor a later operand names."""
    left, arrow, right = equation(node).partition("->")
    terms = [_indices(term, shape(index)) for index, term in enumerate(left.split(","))]
    if not arrow:  # by numpy's rule the result has the indices that occur once
        right = "".join(letter for letter in left if letter.isalpha() and left.count(letter) == 1)
        right += "..." if "..." in left else ""
    macs, seen = 0, terms[0]
    for index, term in enumerate(terms[1:], 1):
        seen = {key: max(seen.get(key, 1), term.get(key, 1)) for key in (*seen, *term)}
        macs += prod(seen.values())
        later = {key for other in terms[index + 1 :] for key in other}
        kept = later | set(right) | ({key for key in seen if key.startswith("...")} if "..." in right else set())
        seen = {key: extent for key, extent in seen.items() if key in kept}
    return macs


def _indices(term: str, dims: Shape) -> dict[str, int]:
    """The extent of every index of one operand; an ellipsis' dimensions are '...0', '...1' from the last one on."""
    before, ellipsis, after = term.partition("...")
    stop = len(dims) - len(after)
    middle = dims[len(before) : stop] if ellipsis else ()
    extents = {f"...{place}": extent for place, extent in enumerate(reversed(middle))}
    for letter, extent in zip(before + after, dims[: len(before)] + dims[stop:], strict=True):
        extents[letter] = max(extent, extents.get(letter, 1))
    return extents


def _attention(node: onnx.NodeProto, shape: ShapeOf) -> int:
    """Queries times keys, and the result times values; packed operands are (batch, length, heads * size)."""
    query, key, value = shape(0), shape(1), shape(2)
    if len(query) == 3:
        (batch, length, width), heads = query, int(attribute(node, "q_num_heads"))
        keys, value_width = key[1], -(-heads * value[2] // int(attribute(node, "kv_num_heads")))
    else:
        (batch, heads, length, size), keys, value_width = query, key[2], query[1] * value[3]
        width = heads * size
    past = shape(4)[2] if len(node.input) > 4 and node.input[4] else 0
    return batch * length * (keys + past) * (width + value_width)


def _affine_grid(_: onnx.NodeProto, shape: ShapeOf) -> int:
    """Every position (with a 1 behind it) times theta, (N, rank, rank + 1)."""
    return prod(shape(OUTPUT)) * shape(0)[-1]


def _linear_model(node: onnx.NodeProto, shape: ShapeOf) -> int:
    """Each row times all coefficients."""
    return shape(0)[0] * len(list(attribute(node, "coefficients")))


def recurrent(_: onnx.NodeProto, shape: ShapeOf) -> int:
    """Each step of each sequence multiplies by both weights, which hold all gates and directions."""
    return prod(shape(0)[:2]) * (prod(shape(1)) + prod(shape(2)))


def unknown(_: onnx.NodeProto, __: ShapeOf) -> int:
    raise LookupError


# operator: how its MACs follow from its shapes, and which of its inputs are weights or biases
RULES: dict[str, tuple[Rule, tuple[int, ...]]] = {
    "Conv": (conv(1), (1, 2)),
    "ConvInteger": (conv(1), (1,)),
    "QLinearConv": (conv(3), (3, 8)),
    "DeformConv": (conv(1), (1, 3)),
    "CausalConvWithState": (conv(1), (1, 2)),
    "ConvTranspose": (conv_transpose, (1, 2)),
    "Gemm": (gemm(0), (0, 1, 2)),
    "MatMul": (matmul, (0, 1)),
    "MatMulInteger": (matmul, (0, 1)),
    "QLinearMatMul": (matmul, (0, 3)),
    "Einsum": (_einsum, tuple(range(8))),
    "Attention": (_attention, ()),
    "AffineGrid": (_affine_grid, ()),
    "ai.onnx.ml.LinearClassifier": (_linear_model, ()),
    "ai.onnx.ml.LinearRegressor": (_linear_model, ()),
    "LSTM": (recurrent, (1, 2, 3, 7)),
    "GRU": (recurrent, (1, 2, 3)),
    "RNN": (recurrent, (1, 2, 3)),
}
