"""onnxruntime's own operators: the counted MACs by hand, the learned shapes against what onnxruntime really returns."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from doconv_convert.check.macs.counting import count_macs
from doconv_convert.check.macs.scope import Scope
from doconv_convert.check.macs.walk import Walk

FLOAT, UINT8, INT8, INT32 = np.float32, np.uint8, np.int8, np.int32
Tensors = dict[str, Any]


def tensor(*shape: int, dtype: Any = FLOAT) -> np.ndarray[Any, Any]:
    return np.ones(shape, dtype)


def scale() -> np.ndarray[Any, Any]:
    return np.array(0.5, FLOAT)


def zero(dtype: Any = UINT8) -> np.ndarray[Any, Any]:
    return np.array(0, dtype)


def case(op: str, inputs: Tensors, weights: Tensors, macs: int, parameters: int = 0, **attributes: Any) -> Any:
    """`inputs` first, then `weights`, in the operator's order; a name '' is an input left out."""
    return op, inputs, weights, macs, parameters, attributes


Q = {"s": scale(), "z": zero()}
CASES = {
    "fused convolution": case(
        "FusedConv", {"x": tensor(2, 4, 9, 8)}, {"w": tensor(6, 2, 3, 3), "b": tensor(6)},
        2 * 6 * 5 * 4 * 18, 6 * 18 + 6, group=2, strides=[2, 2], pads=[1, 1, 1, 1], activation="Relu",
    ),
    "quantized convolution, channels last": case(
        "QLinearConv", {"x": tensor(1, 9, 8, 4, dtype=UINT8)},
        {"xs": scale(), "xz": zero(), "w": tensor(6, 4, 3, 3, dtype=UINT8), "ws": scale(), "wz": zero(),
         "ys": scale(), "yz": zero(), "b": tensor(6, dtype=INT32)},
        6 * 7 * 6 * 36, 6 * 36 + 6, channels_last=1,
    ),
    "fused gemm": case(
        "FusedGemm", {"x": tensor(7, 2)}, {"w": tensor(5, 7), "b": tensor(5)},
        2 * 5 * 7, 40, transA=1, transB=1, activation="Relu",
    ),
    "quantized gemm": case(
        "QGemm", {"x": tensor(2, 7, dtype=UINT8)},
        {"xs": scale(), "xz": zero(), "w": tensor(5, 7, dtype=UINT8), "ws": scale(), "wz": zero(),
         "b": tensor(5, dtype=INT32), "ys": scale(), "yz": zero()},
        2 * 5 * 7, 40, transB=1,
    ),
    "fused product": case(
        "FusedMatMul", {"x": tensor(3, 7, 2), "v": tensor(3, 5, 7)}, {}, 3 * 2 * 5 * 7, transA=1, transB=1, alpha=0.5,
    ),
    "fused product, batch inside": case(
        "FusedMatMul", {"x": tensor(2, 3, 7), "v": tensor(3, 7, 5)}, {}, 3 * 2 * 5 * 7, transBatchA=1,
    ),
    "fused product, batch inside and transposed": case(
        "FusedMatMul", {"x": tensor(7, 3, 2), "v": tensor(3, 7, 5)}, {}, 3 * 2 * 5 * 7, transBatchA=1, transA=1,
    ),
    "integer product to float": case(
        "MatMulIntegerToFloat", {"x": tensor(2, 3, 7, dtype=UINT8)},
        {"w": tensor(7, 5, dtype=UINT8), "s": scale(), "t": scale()}, 2 * 3 * 5 * 7, 35,
    ),
    "dynamically quantized product": case(
        "DynamicQuantizeMatMul", {"x": tensor(2, 3, 7)},
        {"w": tensor(7, 5, dtype=UINT8), "s": scale(), "z": zero(), "b": tensor(5)}, 2 * 3 * 5 * 7, 40,
    ),
    "product with 4-bit weights": case(
        "MatMulNBits", {"x": tensor(2, 3, 32)},
        {"w": tensor(5, 1, 16, dtype=UINT8), "s": tensor(5, 1)}, 2 * 3 * 32 * 5, 160, K=32, N=5, bits=4, block_size=32,
    ),
    "attention with its projection": case(
        "Attention", {"x": tensor(2, 5, 8)}, {"w": tensor(8, 12), "b": tensor(12)},
        2 * 5 * 8 * 12 + 2 * 5 * 5 * (4 + 4), 8 * 12 + 12, num_heads=2,
    ),
    "attention with a past": case(
        "Attention", {"x": tensor(2, 5, 8)},
        {"w": tensor(8, 12), "b": tensor(12), "": None, "p": tensor(2, 2, 2, 3, 2)},
        2 * 5 * 8 * 12 + 2 * 5 * (5 + 3) * (4 + 4), 8 * 12 + 12, num_heads=2,
    ),
    "quantized attention": case(
        "QAttention", {"x": tensor(2, 5, 8, dtype=UINT8)},
        {"w": tensor(8, 12, dtype=UINT8), "b": tensor(12), "xs": scale(), "ws": scale(), "": None, "xz": zero(),
         "wz": zero()},
        2 * 5 * 8 * 12 + 2 * 5 * 5 * (4 + 4), 8 * 12 + 12, num_heads=2,
    ),
    "multi-head attention": case(
        "MultiHeadAttention", {"x": tensor(2, 5, 8), "k": tensor(2, 7, 8), "v": tensor(2, 7, 12)}, {},
        2 * 5 * 7 * (8 + 12), num_heads=2,
    ),
    "multi-head attention, keys by head": case(
        "MultiHeadAttention", {"x": tensor(2, 5, 8), "k": tensor(2, 2, 7, 4), "v": tensor(2, 2, 7, 4)}, {},
        2 * 5 * 7 * (8 + 8), num_heads=2,
    ),
    "grouped-query attention": case(
        "GroupQueryAttention",
        {"x": tensor(1, 5, 32), "k": tensor(1, 5, 16), "v": tensor(1, 5, 16)},
        {"": None, "-": None, "l": np.array([4], INT32), "t": np.array(5, INT32)},
        1 * 5 * 5 * (32 + 32), num_heads=4, kv_num_heads=2,
    ),
    "dynamically quantized LSTM": case(
        "DynamicQuantizeLSTM", {"x": tensor(5, 2, 3)},
        {"w": tensor(1, 3, 16, dtype=UINT8), "r": tensor(1, 4, 16, dtype=UINT8), "": None, "-": None, "--": None,
         "---": None, "----": None, "ws": tensor(1), "wz": tensor(1, dtype=UINT8), "rs": tensor(1),
         "rz": tensor(1, dtype=UINT8)},
        5 * 2 * 16 * (3 + 4), 16 * 7, hidden_size=4,
    ),
    "quantized sum": case(
        "QLinearAdd", {"x": tensor(2, 3, 4, dtype=UINT8)},
        {"xs": scale(), "xz": zero(), "w": tensor(4, dtype=UINT8), "ws": scale(), "wz": zero(), "ys": scale(),
         "yz": zero()}, 0,
    ),
    "quantized concatenation": case(
        "QLinearConcat", {},
        {"ys": scale(), "yz": zero(), "x": tensor(2, 3, 4, dtype=UINT8), "xs": scale(), "xz": zero(),
         "w": tensor(2, 5, 4, dtype=UINT8), "ws": scale(), "wz": zero()}, 0, axis=1,
    ),
    "quantized global pooling": case(
        "QLinearGlobalAveragePool", {"x": tensor(2, 3, 5, 4, dtype=UINT8)},
        {"xs": scale(), "xz": zero(), "ys": scale(), "yz": zero()}, 0,
    ),
    "quantized global pooling, channels last": case(
        "QLinearGlobalAveragePool", {"x": tensor(2, 5, 4, 3, dtype=UINT8)},
        {"xs": scale(), "xz": zero(), "ys": scale(), "yz": zero()}, 0, channels_last=1,
    ),
    "quantized pooling": case(
        "QLinearAveragePool", {"x": tensor(2, 3, 9, 8, dtype=UINT8)},
        {"xs": scale(), "xz": zero(), "ys": scale(), "yz": zero()}, 0, kernel_shape=[3, 3], strides=[2, 2],
    ),
    "pooling, channels last": case(
        "NhwcMaxPool", {"x": tensor(2, 9, 8, 3, dtype=UINT8)}, {}, 0, kernel_shape=[3, 3], strides=[2, 2],
    ),
    "quantized activation": case(
        "QLinearLeakyRelu", {"x": tensor(2, 3, dtype=UINT8)},
        {"xs": scale(), "xz": zero(), "ys": scale(), "yz": zero()}, 0, alpha=0.1,
    ),
    "bias and GELU": case("BiasGelu", {"x": tensor(2, 3, 4)}, {"b": tensor(4)}, 0),
    "fast GELU": case("FastGelu", {"x": tensor(2, 3, 4)}, {}, 0),
    "skip and normalize": case(
        "SkipLayerNormalization", {"x": tensor(2, 3, 4), "k": tensor(2, 3, 4)}, {"g": tensor(4), "b": tensor(4)}, 0,
    ),
    "embed and normalize": case(
        "EmbedLayerNormalization", {"x": tensor(2, 3, dtype=INT32)},
        {"": None, "w": tensor(9, 4), "p": tensor(8, 4), "-": None, "g": tensor(4), "b": tensor(4)}, 0,
    ),
}  # fmt: skip


def build(name: str) -> tuple[onnx.ModelProto, Tensors]:
    op, inputs, weights, _, _, attributes = CASES[name]
    given = {**inputs, **weights}
    node = helper.make_node(
        op,
        [key if array is not None else "" for key, array in given.items()],
        ["y", *(["m"] if op == "EmbedLayerNormalization" else [])],
        domain="com.microsoft",
        **({"epsilon": 1e-5} if "Normalization" in op else {}),
        **attributes,
    )
    if name == "attention with a past":
        node.output.append("present")
    if op == "GroupQueryAttention":
        node.output.extend(["pk", "pv"])
    graph = helper.make_graph(
        [node],
        "test",
        [
            helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for key, array in inputs.items()
        ],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(array, key) for key, array in weights.items() if array is not None],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), inputs


@pytest.mark.parametrize("name", CASES)
def test_macs_are_those_of_the_formula(name: str) -> None:
    _, _, _, macs, parameters, _ = CASES[name]
    counted = count_macs(build(name)[0])
    assert counted.uncounted == {}
    assert [(n.macs, n.parameters) for n in counted.nodes] == ([(macs, parameters)] if macs else [])


@pytest.mark.parametrize("name", CASES)
def test_learned_shapes_are_onnxruntimes_own(name: str) -> None:
    proto, inputs = build(name)
    scope = Scope(types={value.name: value.type for value in proto.graph.input})
    Walk.of(proto, {}).graph(proto.graph, scope)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(["y"], inputs)
    assert scope.shape("y") == result.shape


def test_what_follows_an_operator_of_onnxruntimes_is_counted() -> None:
    """As in a file that onnxruntime has optimized: the fused convolution feeds a plain one."""
    proto, _ = build("fused convolution")
    proto.graph.initializer.append(numpy_helper.from_array(tensor(3, 6, 1, 1), "v"))
    proto.graph.node.append(helper.make_node("Conv", ["y", "v"], ["after"]))
    counted = count_macs(proto)
    assert [n.macs for n in counted.nodes] == [2 * 6 * 5 * 4 * 18, 2 * 3 * 5 * 4 * 6]
    assert counted.uncounted == {}


def network() -> onnx.ModelProto:
    """Convolutions, a branch, a sum, a concatenation, pooling and a head: what quantizing meets."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "w3": (4, 16, 1, 1), "w4": (4, 5), "b1": (8,), "b4": (5,)}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("Concat", ["b", "d"], ["e"], axis=1),
        helper.make_node("Conv", ["e", "w3"], ["f"]),
        helper.make_node("GlobalAveragePool", ["f"], ["g"]),
        helper.make_node("Flatten", ["g"], ["h"]),
        helper.make_node("Gemm", ["h", "w4", "b4"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 5])],
        [numpy_helper.from_array(rng.standard_normal(shape, np.float32), name) for name, shape in shapes.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def quantized(path: Path, kind: str) -> Path:
    """The file as onnxruntime's own tools quantize or optimize it."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)]

        def get_next(self) -> Any:
            return {"x": self.left.pop()} if self.left else None

    out = path.with_name(f"{kind}.onnx")
    if kind == "optimized":
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(out)
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    elif kind == "dynamic":
        quantize_dynamic(path, out)
    else:
        form = QuantFormat.QDQ if kind == "qdq" else QuantFormat.QOperator
        quantize_static(path, out, Samples(), quant_format=form)
    return out


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("optimized", {"FusedConv"}),
        ("dynamic", {"ConvInteger", "MatMulInteger"}),
        ("operators", {"QLinearConv", "QLinearConcat", "QLinearAdd", "QGemm"}),
        ("qdq", {"DequantizeLinear"}),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_quantized_or_optimized_network_has_the_macs_it_had(tmp_path: Path, kind: str, found: set[str]) -> None:
    path = tmp_path / "float.onnx"
    onnx.save(network(), path)
    expected, out = count_macs(path), quantized(path, kind)
    assert found <= {node.op_type for node in onnx.load(out).graph.node}
    counted = count_macs(out)
    assert counted.uncounted == {}
    assert [n.macs for n in counted.nodes] == [n.macs for n in expected.nodes]
    assert counted.total == 2 * (64 * 8 * 27 + 64 * 8 * 72 + 64 * 4 * 16 + 4 * 5)
