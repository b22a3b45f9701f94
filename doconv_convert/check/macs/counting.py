"""How many multiply-accumulates (MACs) an ONNX graph performs, as exact integers; one MAC is two FLOPs.

The convention is that of torch.utils.flop_counter: convolutions and matrix products count, without their
biases. What works element by element, reduces, normalizes, pools or resizes does not: `NOT_COUNTED` in rules
lists those operators. Every other operator, and a product whose shape is not known before the graph runs, is
reported as uncounted: nothing is silently zero.

Where the graph alone does not say what runs, the count says what it assumed (`MacCount.assumed`):
- a dynamic dimension 0 that is not given is a batch of 1;
- an If whose condition is not a constant counts its costlier branch, and lists what neither branch can count;
- a Loop counts its body times its turns where they are a constant, else it is uncounted; a Scan its body times
  the length of what it scans;
- recurrent layers run over the full sequence length, attention has no discount for masks and reads its whole past;
- Einsum contracts its operands from left to right, each step the product of all index extents that it sees.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from doconv_convert.check.macs.result import MacCount
from doconv_convert.check.macs.scope import MOST_DIMS, Scope, bound_type, dim_name
from doconv_convert.check.macs.walk import Walk
from doconv_convert.check.macs.work import CannotCountError
from doconv_convert.check.onnx_files.model import ModelSource, read_model
from doconv_convert.errors import DoconvError
from doconv_convert.words import clipped


def count_macs(model: ModelSource, dims: Mapping[str, int] | None = None, ignore: Collection[str] = ()) -> MacCount:
    """Count the multiply-accumulates (MACs; FLOPs are twice as many) of one run of an ONNX `model` (a path or a
    ModelProto). Exact integers: `.total`, and node by node `.nodes`; `.uncounted` names operators not understood.

    `dims` gives sizes to dynamic dimensions by name (`input[axis]` for one that has no name). A dimension 0 that
    is not given is a batch of 1. The operators in `ignore` ('com.example.Mask') are taken to multiply nothing
    where they cannot be counted.

    Raises DoconvError if another dimension is not given, if `dims` names one that the model does not have or gives
    less than 1, or if the file is not a valid ONNX model.
    """
    proto = read_model(model)
    inputs, defaults = _inputs(proto), _open_defaults(proto)
    sizes, assumed = _sizes(inputs, dims or {})
    scope = Scope(types={value.name: bound_type(value, sizes) for value in inputs}, folder=_folder(model))
    for value in inputs:
        if value.type.WhichOneof("value") != "tensor_type":  # onnxruntime does not look at the sizes of its elements
            scope.claims[value.name] = clipped(value.name)
    for value, tensor in defaults:
        _take_default(scope, value, tensor)
    file = "the model" if isinstance(model, onnx.ModelProto) else f"'{os.fspath(model)}'"
    try:
        count = Walk.of(proto, sizes, (value.name for value, _ in defaults)).graph(proto.graph, scope)
    except CannotCountError as error:
        raise DoconvError(f"{file} cannot be counted: {error}") from error
    except RecursionError as error:
        raise DoconvError(f"{file} cannot be counted: its functions or subgraphs are nested too deeply") from error
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        detail = "a node lacks an input or attribute, or has one of another kind"
        raise DoconvError(f"{file} cannot be counted: {detail}; see what onnx.checker says of it") from error
    uncounted = {op: number for op, number in count.uncounted.items() if op not in ignore}
    stated = [f"'{name}' has the size that the file states; no operator confirms it" for name in count.claimed]
    shapes = {clipped(value.name): scope.shape(value.name) for value in inputs}
    return MacCount(count.nodes, uncounted, (*assumed, *count.assumed, *stated), count.claimed, shapes)


def dynamic_dims(model: ModelSource) -> list[str]:
    """The names by which `count_macs` takes sizes for the model's dynamic dimensions."""
    return sorted({name for name, _, _ in _open_dims(_inputs(read_model(model)))})


def count_as_json(path: str, dims: Mapping[str, int], ignore: Collection[str]) -> dict[str, Any]:
    """`count_macs` for `check.confined`."""
    return count_macs(path, dims, ignore).to_json()


def _inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    weights = {tensor.name for tensor in proto.graph.initializer}
    weights |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    for value in inputs:
        if len(value.type.tensor_type.shape.dim) > MOST_DIMS:
            raise DoconvError(f"input '{clipped(value.name)}' has more than {MOST_DIMS} dimensions")
    return inputs


def _open_defaults(proto: onnx.ModelProto) -> list[tuple[onnx.ValueInfoProto, onnx.TensorProto]]:
    """The inputs that have a default value, which is no constant: a caller may give another one. Before IR version 4
    every initializer was listed among the inputs, and none could be replaced."""
    if proto.ir_version < 4:
        return []
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for sparse in proto.graph.sparse_initializer:
        made = onnx.TensorProto(name=sparse.values.name, data_type=sparse.values.data_type, dims=sparse.dims)
        tensors[made.name] = made
    return [(value, tensors[value.name]) for value in proto.graph.input if value.name in tensors]


def _take_default(scope: Scope, value: onnx.ValueInfoProto, tensor: onnx.TensorProto) -> None:
    """Its declared type, which onnxruntime demands of what a caller gives; a size that it leaves open is the default's,
    and so a mere claim."""
    name = value.name
    scope.add_tensor(name, tensor)
    scope.constants.pop(name, None)
    if scope.shape(name) != tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim):
        scope.claims[name] = clipped(name)


def _folder(model: ModelSource) -> Path | None:
    return None if isinstance(model, onnx.ModelProto) else Path(model).parent


def _open_dims(inputs: Sequence[onnx.ValueInfoProto]) -> list[tuple[str, int, str]]:
    """(name, axis, input) of every dynamic dimension."""
    return [
        (dim_name(value.name, axis, dim), axis, value.name)
        for value in inputs
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        if dim.dim_value < 1
    ]


def _sizes(inputs: Sequence[onnx.ValueInfoProto], dims: Mapping[str, int]) -> tuple[dict[str, int], list[str]]:
    """A size for every dynamic dimension of the graph's inputs, and which of them were assumed."""
    names = _open_dims(inputs)
    known = sorted({name for name, _, _ in names})
    for name, size in dims.items():
        if name not in known:
            raise DoconvError(f"no dynamic dimension is named '{name}': the model has {known or 'none'}")
        if size < 1:
            raise DoconvError(f"dimension '{name}' must be at least 1, got {size}")
    elsewhere = {name for name, axis, _ in names if axis > 0}  # a height is no batch because it is named like one
    batches = {name: 1 for name, axis, _ in names if axis == 0 and name not in dims and name not in elsewhere}
    sizes = batches | dict(dims)
    for name, axis, value in names:
        if name not in sizes:
            raise DoconvError(
                f"dimension {axis} of input '{value}' is dynamic: give its size, as in `dims` '{name}=224'"
            )
    return sizes, [f"dimension '{name}' is 1; `dims` '{name}=N' for another size" for name in batches]
