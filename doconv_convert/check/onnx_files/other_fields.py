"""What a model's file holds beside what `graph_diff` compares and what no runtime looks at (names, documentation).

Two files are the same only if these fields are: training graphs, device configurations, annotations, segments, fields
that this version of onnx does not know, and values that stand twice, of which each runtime takes the one it likes.
"""

import hashlib
from collections.abc import Iterator, Mapping

from google.protobuf.message import Message  # type: ignore[import-untyped]
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-untyped]
from onnx import AttributeProto, ModelProto, TensorProto

_IDLE = frozenset({"name", "doc_string", "metadata_props"})
_ONE, _MANY = {"f", "i", "s", "t", "g", "tp", "sparse_tensor"}, {"floats", "ints", "strings", "tensors", "graphs"}
_VALUES = frozenset(_ONE | _MANY | {"sparse_tensors", "type_protos"})
_FLOATS, _INTEGERS = {"float_data", "double_data"}, {"int32_data", "int64_data", "uint64_data"}
_DATA = frozenset(_FLOATS | _INTEGERS | {"string_data", "raw_data"})
_LONG = {"f": "float", "i": "int", "s": "string", "t": "tensor", "g": "graph", "tp": "type_proto"}
# by message: the fields that are compared, or that change nothing
_KNOWN: Mapping[str, frozenset[str]] = {
    name: frozenset(fields.split()) | _IDLE
    for name, fields in {
        "ModelProto": "ir_version opset_import producer_name producer_version domain model_version graph functions",
        "GraphProto": "node initializer sparse_initializer input output value_info",
        "NodeProto": "input output op_type domain overload attribute",
        "AttributeProto": f"ref_attr_name type {' '.join(_VALUES)}",
        "TensorProto": f"dims data_type external_data data_location {' '.join(_DATA)}",
        "SparseTensorProto": "values indices dims",
        "ValueInfoProto": "type",
        "FunctionProto": "input output attribute attribute_proto node opset_import domain overload value_info",
        "OperatorSetIdProto": "domain version",
        "StringStringEntryProto": "key value",
        "TypeProto": "tensor_type sequence_type map_type optional_type sparse_tensor_type opaque_type",
        "Tensor": "elem_type shape",
        "SparseTensor": "elem_type shape",
        "Sequence": "elem_type",
        "Optional": "elem_type",
        "Map": "key_type value_type",
        "Opaque": "domain",
        "TensorShapeProto": "dim",
        "Dimension": "dim_value dim_param",
    }.items()
}


def other_fields(model: ModelProto) -> list[str]:
    """Each as 'TensorProto.segment' with a hash of its content, sorted."""
    return sorted(set(_others(model)))


def _others(part: Message) -> Iterator[str]:
    kind = part.DESCRIPTOR.name
    known = _KNOWN.get(kind, frozenset())
    if len(UnknownFieldSet(part)):
        numbers = sorted({field.field_number for field in UnknownFieldSet(part)})
        yield f"{kind} fields {numbers} ({_hash(part.SerializeToString(deterministic=True))})"
    present = part.ListFields()
    for field, value in present:
        if field.name not in known:
            yield f"{kind}.{field.name} ({_hash(repr(value).encode())})"
        elif field.message_type is not None and field.name != "metadata_props":
            for one in value if field.is_repeated else (value,):
                yield from _others(one)
    yield from _double(part, {field.name for field, _ in present})


def _double(part: Message, present: set[str]) -> Iterator[str]:
    """Values that stand in more places than one, or of another kind than the one that is named."""
    if isinstance(part, TensorProto):
        found = (present & _DATA) | ({"external_data"} if part.data_location == TensorProto.EXTERNAL else set())
        if len(found) > 1:
            yield f"tensor '{part.name}' with values in {' and '.join(sorted(found))}"
    elif isinstance(part, AttributeProto):
        found = present & _VALUES
        if len(found) > 1:
            yield f"attribute '{part.name}' with values in {' and '.join(sorted(found))}"
        elif found and AttributeProto.AttributeType.Name(part.type).lower() not in (*found, _LONG.get(min(found))):
            yield f"attribute '{part.name}' of type {part.type} with a value in {min(found)}"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
