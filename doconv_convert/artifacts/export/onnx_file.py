"""An ONNX model onto the disk: without traces of the machine that made it, and never in half."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from doconv_convert.files import (
    atomic_write,
    install_files,
    publish_data,
    remove_stale_data,
    temporary_beside,
)

# protobuf ends at 2 GiB; the rest is room for the graph around the weights
ONE_FILE_BYTES = 2**31 - 2**25

Port = tuple[str, list[int | str]]


@dataclass(frozen=True)
class Header:
    """A file's opset, its inputs and outputs as (name, shape), and whether its weights are in a second file.

    A dynamic dimension is its name, '?' where it has none.
    """

    opset: int
    inputs: list[Port]
    outputs: list[Port]
    external_data: bool


def strip(model: ir.Model) -> None:
    """Removes every doc string and metadata entry: exporters write source paths and stack traces there."""
    _clear(model)
    for graph in _graphs(model):
        _clear(graph)
        for node in graph:
            _clear(node)
            for value in node.outputs:
                _clear(value)
            for attribute in node.attributes.values():
                attribute.doc_string = None
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    _clear_tensor(attribute.as_tensor())
        for value in graph.inputs:
            _clear(value)
        for value in graph.initializers.values() if isinstance(graph, ir.Graph) else ():
            _clear(value)
            if value.const_value is not None:
                _clear_tensor(value.const_value)


def write(model: ir.Model, target: Path) -> None:
    """Writes `model` to `target` in one step; weights above ONE_FILE_BYTES go beside it.

    A kill at any moment leaves the old model or the new one, complete; data of earlier models is deleted at
    the end. Raises DoconvError where the place cannot be written.
    """
    if _weight_bytes(model) <= ONE_FILE_BYTES:
        with atomic_write(target) as temporary:
            ir.save(model, temporary, format="protobuf")
        remove_stale_data(target)
        return
    _write_pair(model, target)


def install_model(finished: Path, target: Path, also: Sequence[tuple[Path, Path]] = ()) -> None:
    """Moves the finished model at `finished` to `target`, the very bytes, its external data before it and `also`, other
    finished files and their places, after it.

    `finished` has the target's name, and everything finished lies in its target's file system. Raises DoconvError where
    a place cannot be written.
    """
    data = _data_files(finished)
    moves = [(finished.with_name(name), target.with_name(name)) for name in data]
    install_files([*moves, (finished, target), *also])
    remove_stale_data(target, keep=next(iter(data), None))


def _data_files(path: Path) -> set[str]:
    """The names of the files with the model's external data."""
    graphs = ir.load(path).graphs()
    tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
    return {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def read_header(path: Path) -> Header:
    """What the file at `path` says of itself."""
    proto = onnx.load(str(path), load_external_data=False)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    graph = proto.graph
    external = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.initializer)
    inputs, outputs = [_port(value) for value in graph.input], [_port(value) for value in graph.output]
    return Header(opset, inputs, outputs, external)


def _write_pair(model: ir.Model, target: Path) -> None:
    with temporary_beside(target) as data, atomic_write(target) as temporary:
        ir.save(model, temporary, format="protobuf", external_data=data.name)
        name = publish_data(data, target)
        saved = ir.load(temporary, format="protobuf")
        _point_to(saved, name)
        ir.save(saved, temporary, format="protobuf")
    remove_stale_data(target, keep=name)


def _port(value: onnx.ValueInfoProto) -> Port:
    dims = value.type.tensor_type.shape.dim
    shape = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims]
    return value.name, shape


def _clear(part: ir.Model | ir.Graph | ir.Function | ir.Node | ir.Value) -> None:
    part.metadata_props.clear()
    part.doc_string = None


def _clear_tensor(tensor: ir.TensorProtocol) -> None:
    tensor.metadata_props.clear()
    if isinstance(tensor, ir.TensorProtoTensor):  # is written as the message that it was read from
        tensor.raw.ClearField("doc_string")
        tensor.raw.ClearField("metadata_props")
    else:
        tensor.doc_string = None


def _graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    yield from model.graphs()
    yield from model.functions.values()


def _weight_bytes(model: ir.Model) -> int:
    weights = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in weights if tensor is not None)


def _point_to(model: ir.Model, location: str) -> None:
    """Makes every external tensor read from the data file `location` in the model's folder."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            old = value.const_value
            if isinstance(old, ir.ExternalTensor):
                value.const_value = ir.ExternalTensor(
                    location, old.offset, old.length, old.dtype, shape=old.shape, name=old.name
                )
