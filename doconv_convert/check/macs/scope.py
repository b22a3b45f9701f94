"""What a walk over an ONNX graph knows of its values."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, TypeProto, helper, numpy_helper

from doconv_convert.check.macs.rules import Shape

SMALL = 1024
"""Constants of up to this many elements are evaluated; shapes, scales and sizes are far smaller."""


def dim_name(value: str, axis: int, dim: onnx.TensorShapeProto.Dimension) -> str:
    """The name of a dynamic dimension, or its place where it has none (some exporters write '?')."""
    return dim.dim_param if dim.dim_param not in ("", "?") else f"{value}[{axis}]"


def bound_type(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> TypeProto:
    """The value's type with the named dimensions replaced by their sizes."""
    bound = TypeProto()
    bound.CopyFrom(value.type)
    for axis, dim in enumerate(bound.tensor_type.shape.dim if bound.HasField("tensor_type") else ()):
        name = dim_name(value.name, axis, dim)
        if dim.dim_value < 1 and name in sizes:
            dim.dim_value = sizes[name]
    return bound


@dataclass
class Scope:
    """What is known of values by name: types, the elements of small constants, the number of weights."""

    types: dict[str, TypeProto] = field(default_factory=dict)
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)

    def inner(self) -> "Scope":
        return Scope(dict(self.types), dict(self.constants), dict(self.weights))

    def shape(self, name: str) -> Shape | None:
        kind = self.types.get(name, TypeProto()).tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
        return tuple(dims) if kind.HasField("shape") and min(dims, default=0) >= 0 else None

    def take(self, name: str, other: "Scope", source: str) -> None:
        """All that `other` knows of the value `source` is true of `name` here."""
        if source in other.types:
            self.types[name] = other.types[source]
        if source in other.constants:
            self.constants[name] = other.constants[source]
        if source in other.weights:
            self.weights[name] = other.weights[source]

    def set_shape(self, name: str, shape: Shape | None, like: str) -> None:
        """The type of `name`: of that shape where it is known, with the element type of the value `like`."""
        kind = self.types.get(like, TypeProto()).tensor_type.elem_type or TensorProto.FLOAT
        if name and shape is not None:
            self.types[name] = helper.make_tensor_type_proto(kind, list(shape))

    def add_tensor(self, name: str, tensor: TensorProto) -> None:
        self.types[name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        self.weights[name] = prod(tensor.dims)
        if prod(tensor.dims) <= SMALL and tensor.data_location != TensorProto.EXTERNAL:
            with suppress(ValueError):  # broken data: the type may still be all that is needed
                self.constants[name] = numpy_helper.to_array(tensor)

    def add_sparse(self, name: str, tensor: onnx.SparseTensorProto) -> None:
        """A sparse weight is counted like the dense one it stands for, as onnxruntime runs it."""
        self.types[name] = helper.make_tensor_type_proto(tensor.values.data_type, list(tensor.dims))
        self.weights[name] = prod(tensor.dims)

    def add_constant(self, node: onnx.NodeProto) -> None:
        """The value of a Constant node, in whichever of its attributes it stands."""
        name, value = node.output[0], helper.get_attribute_value(node.attribute[0])
        if isinstance(value, onnx.SparseTensorProto):
            self.add_sparse(name, value)
        elif isinstance(value, TensorProto):
            self.add_tensor(name, value)
        else:
            kind = np.float32 if "float" in node.attribute[0].name else np.int64
            if "string" not in node.attribute[0].name:
                self.add_tensor(name, numpy_helper.from_array(np.array(value, kind)))

    def constant(self, name: str) -> Any:
        """The value of a constant of one element, else None."""
        value = self.constants.get(name)
        return value.item() if value is not None and value.size == 1 else None
