"""What an un-folded DO-Conv leaves in a saved ONNX file."""

import re
from collections.abc import Iterable, Iterator, Mapping

import onnx
from onnx import AttributeProto, TensorProto

from doconv_convert.check.onnx_files.model import CARRIERS, ModelSource, present, read_model

_KERNEL_INPUT = {"Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "DeformConv": 1, "QLinearConv": 3}
_COMPOSITION_NAME = re.compile(r"(?:.*[./])?(?:D|weight_extra|[^./]*_D|[^./]*_extra)")


def leftover_composition(model: ModelSource) -> list[str]:
    """A sentence for each thing that a DO-Conv which was not folded leaves in a saved file; empty if none.

    These are initializers and nodes named like D or weight_extra, and convolutions whose kernel the graph
    computes from constants. (A kernel computed from the network's input is none of these; weight norm left
    in place is one, so read the list beside the original's.) Raises DoconvError if the file is not ONNX.
    """
    proto = read_model(model)
    found = list(_leftovers(proto.graph.node, proto.graph.initializer, {}))
    for function in proto.functions:
        found += _leftovers(function.node, (), {})
    return found


def _leftovers(
    nodes: Iterable[onnx.NodeProto], initializers: Iterable[TensorProto], outer: Mapping[str, bool]
) -> Iterator[str]:
    # the values that depend on constants alone: True if computed from them, False if one of them
    computed = {**outer, **{tensor.name: False for tensor in initializers}}
    for tensor in initializers:
        if _COMPOSITION_NAME.fullmatch(tensor.name):
            yield f"initializer '{tensor.name}' is named like a part of a DO-Conv kernel"
    for node in nodes:
        name = node.name or next(iter(node.output), "")
        if _COMPOSITION_NAME.fullmatch(name):
            yield f"node '{name}' ({node.op_type}) is named like a part of a DO-Conv kernel"
        kernel = _KERNEL_INPUT.get(node.op_type, len(node.input))
        if kernel < len(node.input) and computed.get(node.input[kernel]):
            source = node.input[kernel]
            yield f"node '{name}' ({node.op_type}) takes a kernel that the graph computes: '{source}'"
        inputs = present(node.input)
        if node.op_type == "Constant" or (inputs and all(value in computed for value in inputs if value)):
            carried = node.op_type in CARRIERS and not computed[inputs[0]]
            constant = carried or node.op_type in ("Constant", "ConstantOfShape")
            computed.update((value, not constant) for value in node.output)
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _leftovers(attribute.g.node, attribute.g.initializer, computed)
