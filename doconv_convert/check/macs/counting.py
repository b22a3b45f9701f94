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

from collections.abc import Collection, Mapping, Sequence

import onnx

from doconv_convert.check.macs.result import MacCount as MacCount
from doconv_convert.check.macs.result import NodeMacs as NodeMacs
from doconv_convert.check.macs.scope import Scope, bound_type, dim_name
from doconv_convert.check.macs.walk import Walk
from doconv_convert.check.onnx_files.model import ModelSource, read_model
from doconv_convert.errors import DoconvError, UsageError
from doconv_convert.words import UNITS, counted


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
    inputs = _inputs(proto)
    sizes, assumed = _sizes(inputs, dims or {})
    scope = Scope(types={value.name: bound_type(value, sizes) for value in inputs})
    try:
        count = Walk.of(proto, sizes).graph(proto.graph, scope)
    except (LookupError, ValueError) as error:
        raise DoconvError("a node lacks an input or attribute: see what onnx.checker says of the model") from error
    uncounted = {op: number for op, number in count.uncounted.items() if op not in ignore}
    return MacCount(count.nodes, uncounted, (*assumed, *count.assumed))


def dynamic_dims(model: ModelSource) -> list[str]:
    """The names by which `count_macs` takes sizes for the model's dynamic dimensions."""
    return sorted({name for name, _, _ in _open_dims(_inputs(read_model(model)))})


def format_macs(macs: int) -> str:
    """'1.814 GMACs', '312.4 MMACs', '123 MACs': four digits, and always the unit (FLOPs are 2 x MACs)."""
    for prefix, unit in UNITS:
        if macs * 100_000 >= unit * 99_995:  # what rounds to 1.000 of a unit is written in it
            return f"{macs / unit:#.4g} {prefix}MACs"
    return f"{macs} MACs"


def describe_count(count: MacCount) -> str:
    """The total, exact and short, and over how many nodes."""
    nodes = counted(len(count.nodes), "node")
    return f"{count.total:,} MACs ({format_macs(count.total)}; FLOPs = 2 x MACs) in {nodes}"


def parse_macs(text: str) -> int:
    """MACs from '4.1G', '312.4 MMACs' or '1814073344'; exact, no rounding. Raises UsageError."""
    from decimal import Decimal, InvalidOperation

    number = text.strip().removesuffix("MACs").strip()
    scale = next((unit for prefix, unit in UNITS if number.endswith((prefix, prefix.upper()))), 1)
    try:
        macs = Decimal(number[:-1] if scale > 1 else number) * scale
    except InvalidOperation:
        macs = Decimal(-1)
    if not macs.is_finite() or macs < 0 or "FLOP" in text.upper():
        raise UsageError(f"got '{text}', expected MACs such as 4.1G, 312M or 1814073344 (FLOPs are 2 x MACs).")
    return int(macs)  # a fraction of a MAC allows none more


def compare_counts(a: MacCount, b: MacCount) -> list[str]:
    """A sentence for every difference in MACs, `a` being what was expected; nodes are compared by position.

    Parameters are not compared: an exporter drops a bias that happens to be zero.
    """
    found = []
    if a.total != b.total:
        found.append(f"total: expected {_exact(a.total)} got {_exact(b.total)}")
    if len(a.nodes) != len(b.nodes):
        found.append(f"multiplying nodes: expected {len(a.nodes)} got {len(b.nodes)}")
    for index, (x, y) in enumerate(zip(a.nodes, b.nodes, strict=False)):
        if (x.op, x.macs) != (y.op, y.macs):
            expected, got = (f"{n.op} '{n.name}', {_exact(n.macs)}" for n in (x, y))
            found.append(f"multiplying node {index}: expected {expected}; got {got}")
    for op in sorted(a.uncounted.keys() | b.uncounted.keys()):
        expected_nodes, got_nodes = a.uncounted.get(op, 0), b.uncounted.get(op, 0)
        if expected_nodes != got_nodes:
            found.append(f"uncounted {op} nodes: expected {expected_nodes} got {got_nodes}")
    return found


def _exact(macs: int) -> str:
    return f"{format_macs(macs)} ({macs:,})"


def _inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    weights = {tensor.name for tensor in proto.graph.initializer}
    weights |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    return [value for value in proto.graph.input if value.name not in weights]


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
    batches = {name: 1 for name, axis, _ in names if axis == 0 and name not in dims}
    sizes = batches | dict(dims)
    for name, axis, value in names:
        if name not in sizes:
            raise DoconvError(
                f"dimension {axis} of input '{value}' is dynamic: give its size, as in `dims` '{name}=224'"
            )
    return sizes, [f"dimension '{name}' is 1; `dims` '{name}=N' for another size" for name in batches]
