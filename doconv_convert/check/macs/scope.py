"""What a walk over an ONNX graph knows of its values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, TypeProto, helper, numpy_helper

from doconv_convert.check.macs.rules import Shape
from doconv_convert.check.onnx_files.tensors import elements
from doconv_convert.errors import DoconvError

SMALL = 1024
"""Constants of up to this many elements are evaluated; shapes, scales and sizes are far smaller."""

MOST_DIMS = 64
"""Of a value whose size is known; with a million of them its number of elements takes minutes to compute."""


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
    """What is known of values by name: types, the elements of small constants, the number of weights.

    `claims` names, for a value, one whose size only the file states and on which this one's may depend. `folder` is
    where external data lies, None where it is not read.
    """

    types: dict[str, TypeProto] = field(default_factory=dict)
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    claims: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None

    def inner(self, graph: onnx.GraphProto) -> "Scope":
        """The scope of a subgraph, where what it defines itself hides what is around it under the same name."""
        made = Scope(dict(self.types), dict(self.constants), dict(self.weights), dict(self.claims), self.folder)
        inputs = (value.name for value in graph.input)
        tensors = (tensor.name for tensor in graph.initializer)
        for name in chain(inputs, tensors, *(node.output for node in graph.node)):
            made.forget(name)
        return made

    def forget(self, name: str) -> None:
        for known in (self.types, self.constants, self.weights, self.claims):
            known.pop(name, None)

    def shape(self, name: str) -> Shape | None:
        kind = self.types.get(name, TypeProto()).tensor_type
        if len(kind.shape.dim) > MOST_DIMS:
            return None
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
        return tuple(dims) if kind.HasField("shape") and min(dims, default=0) >= 0 else None

    def size(self, name: str) -> Shape | bytes | None:
        """A tensor's shape; of a sequence or an optional value its whole type, with its elements' shape."""
        kind = self.types.get(name, TypeProto())
        if kind.WhichOneof("value") in ("sequence_type", "optional_type"):
            whole: bytes = kind.SerializeToString(deterministic=True)
            return whole
        return self.shape(name)

    def claim(self, names: Iterable[str]) -> str | None:
        """The claim on which the first of these values depends that depends on one."""
        return next((self.claims[name] for name in names if name in self.claims), None)

    def take(self, name: str, other: "Scope", source: str) -> None:
        """All that `other` knows of the value `source` is true of `name` here, and nothing else is."""
        self.forget(name)
        if not name:
            return
        if source in other.types:
            self.types[name] = other.types[source]
        if source in other.constants:
            self.constants[name] = other.constants[source]
        if source in other.weights:
            self.weights[name] = other.weights[source]
        if source in other.claims:
            self.claims[name] = other.claims[source]

    def set_shape(self, name: str, shape: Shape | None, like: str) -> None:
        """The type of `name`: of that shape where it is known, with the element type of the value `like`."""
        kind = self.types.get(like, TypeProto()).tensor_type.elem_type or TensorProto.FLOAT
        if name and shape is not None:
            self.types[name] = helper.make_tensor_type_proto(kind, list(shape))

    def add_tensor(self, name: str, tensor: TensorProto) -> None:
        self.forget(name)
        if len(tensor.dims) > MOST_DIMS:
            return
        self.types[name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        self.weights[name] = prod(tensor.dims)
        if min(tensor.dims, default=1) >= 0 and prod(tensor.dims) <= SMALL:
            self._read(name, tensor)

    def _read(self, name: str, tensor: TensorProto) -> None:
        """The values of a small constant; unread, its type may still be all that is needed."""
        external = tensor.data_location == TensorProto.EXTERNAL
        if tensor.data_type == TensorProto.STRING or (external and not self._has_own_file(tensor)):
            return
        try:
            flat = elements(tensor, self.folder) if external else numpy_helper.to_array(tensor)
        except (DoconvError, ValueError, TypeError, KeyError):  # broken data
            return
        if flat.size == prod(tensor.dims):
            self.constants[name] = np.array(flat).reshape(tuple(tensor.dims))

    def _has_own_file(self, tensor: TensorProto) -> bool:
        """Whether its external data lies in a regular file of the model's folder. Others are not opened."""
        names = [str(one.value) for one in tensor.external_data if one.key == "location"]
        if self.folder is None or len(names) != 1 or "\0" in names[0]:
            return False
        try:
            place = (self.folder / names[0]).resolve()
            return place.is_relative_to(self.folder.resolve()) and place.is_file()
        except (OSError, RuntimeError):  # links in a circle
            return False

    def add_sparse(self, name: str, tensor: onnx.SparseTensorProto) -> None:
        """A sparse weight is counted like the dense one it stands for, as onnxruntime runs it."""
        self.forget(name)
        if len(tensor.dims) > MOST_DIMS:
            return
        self.types[name] = helper.make_tensor_type_proto(tensor.values.data_type, list(tensor.dims))
        self.weights[name] = prod(tensor.dims)

    def add_constant(self, node: onnx.NodeProto) -> None:
        """The value of a Constant node, in whichever of its attributes it stands."""
        name = node.output[0]
        self.forget(name)
        if len(node.attribute) > 1:  # which one is taken depends on the runtime
            return
        value = helper.get_attribute_value(node.attribute[0])
        if isinstance(value, onnx.SparseTensorProto):
            self.add_sparse(name, value)
        elif isinstance(value, TensorProto):
            self.add_tensor(name, value)
        elif node.attribute[0].name in ("value_int", "value_ints"):
            self.add_tensor(name, numpy_helper.from_array(np.array(value, np.int64)))
        elif node.attribute[0].name in ("value_float", "value_floats"):
            self.add_tensor(name, numpy_helper.from_array(np.array(value, np.float32)))

    def constant(self, name: str) -> Any:
        """The value of a constant of one element, else None."""
        value = self.constants.get(name)
        return value.item() if value is not None and value.size == 1 else None
