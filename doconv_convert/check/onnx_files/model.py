"""An ONNX model, from memory or from a file, with its external data left unread."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import helper

from doconv_convert.check.onnx_files.names import undecodable_name
from doconv_convert.errors import DoconvError
from doconv_convert.files import require_file

ModelSource: TypeAlias = onnx.ModelProto | str | os.PathLike[str]

# Operators that hand a constant on in another layout or storage type but compute no new kernel from it.
_LAYOUT = {"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
CARRIERS = frozenset({"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", *_LAYOUT})


# Here onnxruntime has operators of its own, which a function of the same name in the file does not replace (tried with
# 1.32, for operators that ONNX defines by functions, too).
_RUNTIME_DOMAINS = ("", "ai.onnx", "com.microsoft", "com.ms", "org.pytorch.aten")


def in_runtime_domain(domain: str) -> bool:
    return any(domain == one or (one and domain.startswith(f"{one}.")) for one in _RUNTIME_DOMAINS)


def read_model(model: ModelSource) -> onnx.ModelProto:
    """The model itself, or the one in the file at that path with its external data left unread.

    Raises DoconvError if the file cannot be read or is not an ONNX model.
    """
    if isinstance(model, onnx.ModelProto):
        return model
    path = os.fspath(model)
    require_file(Path(path), "an ONNX file")
    try:
        loaded = onnx.load(path, format="protobuf", load_external_data=False)
    except (OSError, DecodeError) as error:
        raise DoconvError(f"'{path}' cannot be read as an ONNX file ({error}): export it again") from error
    if not loaded.HasField("graph") or not loaded.opset_import:
        raise DoconvError(f"'{path}' is not an ONNX model: expected a graph and its opset, got neither")
    domains = ["" if one.domain == "ai.onnx" else one.domain for one in loaded.opset_import]
    if len(domains) > len(set(domains)):
        raise DoconvError(f"'{path}' names the opset of a domain twice: export it again")
    if (name := undecodable_name(loaded)) is not None:
        raise DoconvError(f"'{path}' has the name {name!r}, which is no UTF-8 text: export it again")
    return loaded


def has_branches(model: ModelSource) -> bool:
    """Whether some of the model's nodes run on some inputs only (If) or a number of times (Loop, Scan)."""
    proto = read_model(model)
    nodes = chain(proto.graph.node, *(function.node for function in proto.functions))
    graph = onnx.AttributeProto.GRAPH
    return any(attribute.type == graph for node in nodes for attribute in node.attribute)


def constant_outputs(model: ModelSource) -> set[str]:
    """The outputs that no input's values reach; its sizes may (an operator Shape, a constant expanded to the batch)."""
    graph = read_model(model).graph
    reached = {value.name for value in graph.input} - {value.name for value in graph.initializer}
    for node in graph.node:
        # what a subgraph reads from around it, it does not list: taken for an input's value
        holds_graph = any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute)
        if node.op_type not in ("Shape", "Size") and (holds_graph or reached & set(node.input)):
            reached |= set(node.output)
    return {value.name for value in graph.output} - reached


def tensors(part: Message) -> Iterator[onnx.TensorProto]:
    """Every tensor in a model, wherever it stands: initializers, attributes, subgraphs, functions."""
    if isinstance(part, onnx.TensorProto):
        yield part
        return
    for field, value in part.ListFields():
        if field.message_type is not None:
            for one in value if field.is_repeated else (value,):
                yield from tensors(one)


def present(names: Sequence[str]) -> list[str]:
    """Without the empty names at the end, which stand for optional values left out."""
    count = max((i for i, name in enumerate(names, 1) if name), default=0)
    return list(names[:count])


def onnx_input_shapes(path: Path) -> Mapping[str, list[int | str]]:
    """Input names and shapes of a file; a dynamic dimension is its name, or "?"."""
    return {name: shape for name, (_, shape) in onnx_inputs(path).items()}


def onnx_inputs(path: Path) -> Mapping[str, tuple[np.dtype[Any], list[int | str]]]:
    """Input names, dtypes and shapes of a file. Raises DoconvError where it is no ONNX model."""
    graph = read_model(path).graph
    known = {tensor.name for tensor in graph.initializer}
    found = {}
    for value in graph.input:
        tensor = value.type.tensor_type
        shape: list[int | str] = [dim.dim_value or dim.dim_param or "?" for dim in tensor.shape.dim]
        if value.name not in known:
            found[value.name] = helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape
    return found
