"""Are two ONNX graphs the same graph? Compared by position in topological order after renaming values.

Each graph is written down as a list of records, one a node, in which a value is known by where it comes from:
a graph input by its index, a node's output by the node's position, an initializer by its rank of first use.
The names an exporter invents (of nodes, intermediate values, initializers) do not count; graph inputs and
outputs are the interface, and theirs do. Then the two lists are compared line by line. Nothing is searched
for: equal graphs listed in another order differ. Documentation, producer and metadata are ignored.
Only onnx and numpy are needed; weights in external files are read in pieces.
"""

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import onnx
from onnx import AttributeProto, TensorProto, helper

from doconv_convert.check.onnx_files.model import ModelSource, present, read_model
from doconv_convert.check.onnx_files.other_fields import other_fields
from doconv_convert.check.onnx_files.tensors import differing, dtype_text, elements, tensor_text
from doconv_convert.errors import DoconvError

_Places: TypeAlias = ChainMap[str, "str | TensorProto"]


@dataclass(frozen=True)
class GraphComparison:
    """The baseline's size (nodes, with those of subgraphs, and initializers) and what differs from it."""

    nodes: int
    initializers: int
    differences: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """True if no difference was found."""
        return not self.differences


def compare_graphs(
    baseline: ModelSource, candidate: ModelSource, *, values: bool = True, max_differences: int = 20
) -> GraphComparison:
    """Compare two ONNX graphs; a difference says what was expected (the baseline) and what was got.

    With `values` every initializer is compared bit by bit; without, only its dtype and shape. What exceeds
    `max_differences` is counted in one last sentence. A model given as a path may keep its weights in
    external files. Raises DoconvError for a file that is broken, not ONNX or without its external data.
    """
    a, b = _Listing.of(baseline), _Listing.of(candidate)
    found = [*_compare_records(a, b), *_compare_initializers(a, b, values)]
    rest = len(found) - max_differences
    shown = found if rest <= 0 else [*found[:max_differences], f"and {rest:,} more differences"]
    return GraphComparison(sum(record.is_node for record in a.records), len(a.declared), tuple(shown))


@dataclass(frozen=True)
class _Record:
    """One line of a listing: a node, or the inputs or outputs of a graph."""

    where: str
    operator: str
    facts: Mapping[str, str]
    attributes: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, TensorProto] = field(default_factory=dict)
    types: Mapping[int, str] = field(default_factory=dict)
    is_node: bool = False


@dataclass
class _Listing:
    """One model written down in canonical names, with its initializers by rank of first use."""

    folder: Path | None
    records: list[_Record] = field(default_factory=list)
    declared: list[TensorProto] = field(default_factory=list)
    used: list[TensorProto] = field(default_factory=list)
    ranks: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, source: ModelSource) -> "_Listing":
        model = read_model(source)
        listing = cls(None if isinstance(source, onnx.ModelProto) else Path(source).parent)
        graph = model.graph
        # before IR version 4 every initializer had to be listed among the inputs as well
        weights = {tensor.name for tensor in graph.initializer} if model.ir_version < 4 else set()
        inputs = [value for value in graph.input if value.name not in weights]
        for what, values in (("input", inputs), ("output", graph.output)):
            facts = {f"{what} {i}": f"'{v.name}' {_type_text(v.type)}" for i, v in enumerate(values)}
            listing.records.append(_Record("graph", f"{len(values)} {what}s", facts))
        functions = sorted(model.functions, key=_function_name)
        names = ", ".join(map(_function_name, functions)) or "none"
        facts = {
            "IR version": str(model.ir_version),
            "opset imports": _opsets(model.opset_import),
            "local functions": names,
            "other fields": ", ".join(other_fields(model)) or "none",
        }
        listing.records.append(_Record("model", "model", facts))
        listing.graph(graph, ChainMap(), "")
        for function in functions:
            where = f"function {_function_name(function)} "
            facts = {"opset imports": _opsets(function.opset_import), "inputs": str(len(function.input))}
            facts["attributes"] = ", ".join(function.attribute) or "none"
            _, tensors, plain = _attributes(function.attribute_proto)
            listing.records.append(_Record(where, "function", facts, plain, tensors))
            places = _Places({name: f"{where}input {i}" for i, name in enumerate(function.input)})
            listing.nodes(function.node, places, _types(function.value_info), where)
            listing.outputs(function.output, {}, places, where)
        return listing

    def graph(self, graph: onnx.GraphProto, outer: _Places, prefix: str) -> None:
        if graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise DoconvError(f"initializer '{name}' is sparse, which cannot be compared: store it dense")
        self.declared.extend(graph.initializer)
        places = outer.new_child({value.name: f"{prefix}input {i}" for i, value in enumerate(graph.input)})
        places.update((tensor.name, tensor) for tensor in graph.initializer)
        types = _types(graph.value_info)
        if prefix:
            shapes = {i: _type_text(value.type) for i, value in enumerate(graph.input)}
            self.records.append(_Record(f"{prefix}graph", f"{len(shapes)} inputs", {}, types=shapes))
        self.nodes(graph.node, places, types, prefix)
        shapes = {i: _type_text(value.type) for i, value in enumerate(graph.output)} if prefix else {}
        self.outputs([value.name for value in graph.output], shapes, places, prefix)

    def nodes(self, nodes: Sequence[onnx.NodeProto], places: _Places, types: Mapping[str, str], prefix: str) -> None:
        for index, node in enumerate(nodes):
            where = f"{prefix}node {index}"
            operator = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
            operator += f".{node.overload}" if node.overload else ""
            inputs, outputs = present(node.input), present(node.output)
            facts = {"number of inputs": str(len(inputs)), "number of outputs": str(len(outputs))}
            facts.update((f"input {i}", self.place(name, places)) for i, name in enumerate(inputs))
            known = {i: types[name] for i, name in enumerate(outputs) if name in types}
            graphs, tensors, plain = _attributes(node.attribute)
            self.records.append(_Record(where, operator, facts, plain, tensors, known, is_node=True))
            for name, graph in graphs.items():
                self.graph(graph, places, f"{where} {name} ")
            places.update((name, f"output {i} of {where}") for i, name in enumerate(outputs) if name)

    def outputs(self, names: Sequence[str], types: Mapping[int, str], places: _Places, prefix: str) -> None:
        facts = {f"output {i}": self.place(name, places) for i, name in enumerate(names)}
        self.records.append(_Record(f"{prefix}graph", f"{len(names)} outputs", facts, types=types))

    def place(self, name: str, places: _Places) -> str:
        found = places.get(name, "an undefined value") if name else "nothing"
        if isinstance(found, str):
            return found
        if id(found) not in self.ranks:
            self.ranks[id(found)] = len(self.used)
            self.used.append(found)
        return f"initializer {self.ranks[id(found)]}"

    def unused(self) -> list[TensorProto]:
        return [tensor for tensor in self.declared if id(tensor) not in self.ranks]


def _compare_records(a: _Listing, b: _Listing) -> Iterator[str]:
    nodes_a, nodes_b = (sum(record.is_node for record in listing.records) for listing in (a, b))
    if nodes_a != nodes_b:
        yield f"number of nodes: expected {nodes_a:,} got {nodes_b:,}"
    for x, y in zip(a.records, b.records, strict=False):
        if (x.where, x.operator) == (y.where, y.operator):
            yield from _compare_record(x, y, a.folder, b.folder)
            continue
        yield f"{x.where}: expected {x.operator} got {y.operator}"
        if len(a.records) != len(b.records):
            return  # the two run apart from here on: the rest would only repeat it


def _compare_record(x: _Record, y: _Record, folder_x: Path | None, folder_y: Path | None) -> Iterator[str]:
    what = f"{x.where} ({x.operator})" if x.is_node else x.where
    for key in {**x.facts, **y.facts}:
        if x.facts.get(key) != y.facts.get(key):
            yield f"{what} {key}: expected {x.facts.get(key, 'nothing')} got {y.facts.get(key, 'nothing')}"
    differ = sorted(k for k in {**x.attributes, **y.attributes} if x.attributes.get(k) != y.attributes.get(k))
    if differ:
        yield f"{x.where}: expected {_node_text(x, differ)} got {_node_text(y, differ)}"
    for index in x.types.keys() & y.types.keys():
        expected, got = x.types[index], y.types[index]
        if "[...]" in expected or "[...]" in got:  # one of the two does not state the shape
            expected, got = expected.split("[")[0], got.split("[")[0]
        if expected != got:
            yield f"{what} type {index}: expected {expected} got {got}"
    for name in x.tensors.keys() & y.tensors.keys():
        yield from _compare_tensor(f"{what} {name}", x.tensors[name], y.tensors[name], folder_x, folder_y)


def _compare_initializers(a: _Listing, b: _Listing, values: bool) -> Iterator[str]:
    pairs = (("initializer", a.used, b.used), ("unused initializer", a.unused(), b.unused()))
    for what, of_a, of_b in pairs:
        if len(of_a) != len(of_b):
            last = max(of_a, of_b, key=len)[-1].name
            yield f"number of {what}s: expected {len(of_a):,} got {len(of_b):,} (the last one is '{last}')"
            continue  # by rank, everything after the first one that is missing would differ
        for rank, (x, y) in enumerate(zip(of_a, of_b, strict=True)):
            name = f"{what} {rank} ('{x.name}', {tensor_text(x)})"
            yield from _compare_tensor(name, x, y, a.folder, b.folder, values=values)


def _compare_tensor(
    what: str,
    x: TensorProto,
    y: TensorProto,
    folder_x: Path | None,
    folder_y: Path | None,
    *,
    values: bool = True,
) -> Iterator[str]:
    if tensor_text(x) != tensor_text(y):
        yield f"{what}: expected {tensor_text(x)} got {tensor_text(y)}"
    elif values:
        yield from (f"{what}: {text}" for text in differing(elements(x, folder_x), elements(y, folder_y)))


def _attributes(
    attributes: Iterable[AttributeProto],
) -> tuple[dict[str, onnx.GraphProto], dict[str, TensorProto], dict[str, str]]:
    """Attributes by name: the subgraphs, its tensors, and the text of everything else."""
    graphs, tensors, plain = {}, {}, {}
    for item in sorted(attributes, key=lambda attribute: attribute.name):
        if item.ref_attr_name:
            plain[item.name] = f"@{item.ref_attr_name}"
        elif item.type == AttributeProto.GRAPH:
            graphs[item.name], plain[item.name] = item.g, "a graph"
        elif item.type == AttributeProto.TENSOR:
            tensors[item.name], plain[item.name] = item.t, "a tensor"
        elif item.type not in AttributeProto.AttributeType.values() or not item.type:
            raise DoconvError(f"attribute '{item.name}' has the type {item.type}, which ONNX does not know")
        else:
            plain[item.name] = repr(helper.get_attribute_value(item))
    return graphs, tensors, plain


def _node_text(record: _Record, names: Sequence[str]) -> str:
    shown = [f"{name}={record.attributes.get(name, '(absent)')}" for name in names]
    rest = ["..."] if record.attributes.keys() - set(names) else []
    return f"{record.operator}({', '.join(shown + rest)})"


def _type_text(value: onnx.TypeProto) -> str:
    kind = value.WhichOneof("value")
    if kind not in ("tensor_type", "sparse_tensor_type"):
        return " ".join(str(value).split()) or "unknown type"
    tensor = getattr(value, kind)
    dims = [_dim_text(dim) for dim in tensor.shape.dim]
    shape = ",".join(dims) if tensor.HasField("shape") else "..."
    return f"{'sparse ' * (kind != 'tensor_type')}{dtype_text(tensor.elem_type)}[{shape}]"


def _dim_text(dim: onnx.TensorShapeProto.Dimension) -> str:
    """A symbol that could be taken for something else is quoted: one may be named '3'."""
    if dim.WhichOneof("value") != "dim_param":
        return str(dim.dim_value) if dim.HasField("dim_value") else "?"
    name: str = dim.dim_param
    return name if name.isidentifier() else repr(name)


def _types(values: Iterable[onnx.ValueInfoProto]) -> dict[str, str]:
    return {value.name: _type_text(value.type) for value in values}


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> str:
    return ", ".join(sorted(f"{item.domain or 'ai.onnx'} {item.version}" for item in imports))


def _function_name(function: onnx.FunctionProto) -> str:
    return ".".join(filter(None, (function.domain, function.name, function.overload)))
