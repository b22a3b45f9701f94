"""Files that ask a checker for endless work or memory, or crash the libraries that it uses: kinds, each from a seed.

Every kind is a function of a numpy generator and a folder, which returns the path of what it wrote there. None of these
files is run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hostile_nets import CHANNELS, FLOAT, HOSTILE, INT64, Rng, value
from onnx import TensorProto, defs, helper, numpy_helper
from onnx.defs import OpSchema

STRING = TensorProto.STRING
_ATTRIBUTE = OpSchema.AttrType


def save(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto] = (),
    tensors: Sequence[onnx.TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
    opset: int = 20,
) -> Path:
    outputs = [onnx.ValueInfoProto(name=name) for name in nodes[-1].output[:1]]
    graph = helper.make_graph(list(nodes), "hostile", list(inputs), outputs, list(tensors))
    versions = {"": opset, "ai.onnx.ml": 3, **dict.fromkeys(domains, 1)}
    model = helper.make_model(
        graph, functions=list(functions), opset_imports=[helper.make_opsetid(*one) for one in versions.items()]
    )
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def constant(name: str, array: Any, kind: Any = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(array, kind), name)


def image(side: int = 8) -> onnx.ValueInfoProto:
    return value("x", [1, CHANNELS, side, side])


def calls(rng: Rng, folder: Path) -> Path:
    """Functions that call the next one twice: 2^depth; a chain of them; one that calls itself, or by way of another."""
    kind, depth = int(rng.integers(4)), int(rng.integers(20, 60))
    ops = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    functions = []
    depth = depth if kind else 1500
    for level in range(depth):
        last = level == depth - 1
        name = f"F{0 if last and kind == 2 else level + 1}"
        ends = helper.make_node("Conv" if kind == 1 else "Relu", ["a", "w"] if kind == 1 else ["a"], ["r"])
        once = helper.make_node(name, ["a", "w"], ["t"], domain="own")
        again = helper.make_node(name, ["t" if kind else "a", "w"], ["r"], domain="own")
        body = [ends] if last and kind != 2 else [once, again] if kind else [again]
        functions.append(helper.make_function("own", f"F{level}", ["a", "w"], ["r"], body, ops))
    weight = constant("w", np.ones((CHANNELS, CHANNELS, 1, 1)), np.float32)
    first = helper.make_node("F0", ["x", "w"], ["y"], domain="own")
    return save(folder, [first], [image()], [weight], functions, ["own"])


def huge_values(rng: Rng, folder: Path) -> Path:
    """Small operators on values that are huge by their declared shape, or that would become so when evaluated."""
    big = int(rng.integers(10**8, 10**12))
    kind = int(rng.integers(8))
    x = value("x", [big], INT64)
    one, axis = constant("one", [1]), constant("axis", [0])
    nodes = {
        0: [helper.make_node("Concat", ["x", "x"], ["y"], axis=0)],
        1: [helper.make_node("Tile", ["one", "n"], ["y"])],
        2: [helper.make_node("Expand", ["one", "n"], ["y"])],
        3: [helper.make_node("ConstantOfShape", ["n"], ["y"])],
        4: [helper.make_node("Range", ["s", "n0", "step"], ["y"])],
        5: [helper.make_node("OneHot", ["one", "n0", "values"], ["y"])],
        6: [helper.make_node("Slice", ["x", "axis", "n"], ["s1"]), helper.make_node("Add", ["s1", "s1"], ["y"])],
        7: [helper.make_node("Unsqueeze", ["x", "axis"], ["u"]), helper.make_node("Gather", ["u", "axis"], ["y"])],
    }[kind]
    tensors = [one, axis, constant("n", [big]), constant("n0", big), constant("s", 0), constant("step", 1)]
    return save(folder, [*nodes, helper.make_node("Relu", ["y"], ["z"])], [x], [*tensors, constant("values", [0, 1])])


def strings(rng: Rng, folder: Path) -> Path:
    """Regular expressions that take for ever, and other operators on constant strings."""
    words = helper.make_tensor("words", STRING, [1], [b"a" * int(rng.integers(28, 60)) + b"!"])
    kind = int(rng.integers(4))
    node = {
        0: helper.make_node(
            "RegexFullMatch", ["words"], ["y"], pattern=str(rng.choice(["(a+)+$", "(a|aa)+$", "(.*)*$"]))
        ),
        1: helper.make_node("StringSplit", ["words"], ["y", "n"], delimiter="a"),
        2: helper.make_node("StringConcat", ["words", "words"], ["y"]),
        3: helper.make_node("StringNormalizer", ["words"], ["y"], case_change_action="UPPER", stopwords=["a"] * 10_000),
    }[kind]
    return save(folder, [node], [], [words])


def einsums(rng: Rng, folder: Path) -> Path:
    size = int(rng.integers(10**5, 2 * 10**6))
    letters = "abcdefghijklmnopqrstuvwxyz"
    kind = int(rng.integers(5))
    equation = [
        "." * size,
        "," * size + "->",
        "..." * (size // 3) + "a,a->a",
        letters * (size // 26) + "->a",
        ",".join(["a"] * (size // 20)) + "->",
    ][kind]
    count = size // 20 if kind == 4 else 2
    return save(folder, [helper.make_node("Einsum", ["x"] * count, ["y"], equation=equation)], [value("x", [4])])


_SIZES = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**62, 2**63 - 1)


def any_attribute(rng: Rng, name: str, kind: Any) -> onnx.AttributeProto | None:
    numbers = [int(rng.choice(_SIZES)) for _ in range(int(rng.integers(0, 6)))]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["g"])], "g", [], [value("g")])
    values: dict[Any, Any] = {
        _ATTRIBUTE.INT: int(rng.choice(_SIZES)),
        _ATTRIBUTE.INTS: numbers,
        _ATTRIBUTE.FLOAT: float(rng.choice([0.0, -1.0, np.nan, np.inf, 1e30])),
        _ATTRIBUTE.FLOATS: [float(one) for one in numbers],
        _ATTRIBUTE.STRING: str(rng.choice(["", "SAME_UPPER", "linear", "x" * 1000, "\x00"])),
        _ATTRIBUTE.STRINGS: ["a"] * len(numbers),
        _ATTRIBUTE.TENSOR: constant("t", numbers),
        _ATTRIBUTE.GRAPH: graph,
    }
    if rng.random() < 0.15:  # of another kind than the operator wants
        kind = list(values)[int(rng.integers(len(values)))]
    return helper.make_attribute(name, values[kind], attr_type=int(kind.value)) if kind in values else None


def any_operator(rng: Rng, folder: Path, names: Sequence[str] = ()) -> Path:
    """Any operator of ONNX's, with inputs and attributes that make no sense: what crashes native shape inference."""
    schemas = sorted(
        (
            one
            for one in defs.get_all_schemas()
            if one.domain in ("", "ai.onnx.ml") and (not names or one.name in names)
        ),
        key=lambda one: (one.domain, one.name),
    )
    nodes, inputs, tensors = [], [], []
    for place in range(int(rng.integers(1, 6))):
        schema = schemas[int(rng.integers(len(schemas)))]
        given = []
        for index in range(int(rng.integers(0, schema.min_input + 3))):
            name = f"i{place}_{index}"
            rank = int(rng.integers(0, 7))
            dims = [int(rng.choice(_SIZES[5:] if rng.random() < 0.98 else _SIZES)) for _ in range(rank)]
            kind = int(rng.choice([FLOAT, FLOAT, INT64, INT64, STRING, TensorProto.BOOL, TensorProto.FLOAT16]))
            choice = rng.random()
            if choice < 0.1:
                name = ""
            elif choice < 0.5:
                numbers = [int(rng.choice(_SIZES)) for _ in range(int(rng.integers(0, 6)))]
                tensors.append(constant(name, numbers if rng.random() < 0.8 else int(rng.choice(_SIZES))))
            else:
                inputs.append(value(name, dims if rng.random() < 0.9 else None, kind))
            given.append(name)
        node = helper.make_node(
            schema.name, given, [f"o{place}_{index}" for index in range(int(rng.integers(1, 4)))], domain=schema.domain
        )
        for name, attribute in sorted(schema.attributes.items()):
            if rng.random() < 0.7 and (made := any_attribute(rng, name, attribute.type)) is not None:
                node.attribute.append(made)
        nodes.append(node)
    return save(folder, nodes, inputs, tensors, opset=int(rng.integers(1, 25)))


def known_crashers(rng: Rng, folder: Path) -> Path:
    names = (
        "EyeLike GatherND Split DictVectorizer LabelEncoder TreeEnsemble RegexFullMatch TreeEnsembleRegressor Col2Im"
    )
    return any_operator(rng, folder, names.split())


def dimensions(rng: Rng, folder: Path) -> Path:
    """Negative, huge, or very many."""
    kind = int(rng.integers(4))
    if kind == 0:
        weight = TensorProto(name="w", data_type=FLOAT, dims=[-64, 3, -3, 3], raw_data=b"\x00" * 4)
        return save(folder, [helper.make_node("Conv", ["x", "w"], ["y"])], [image()], [weight])
    if kind == 1:
        weight = TensorProto(name="w", data_type=FLOAT, dims=[2**62] * 4)
        return save(
            folder, [helper.make_node("Conv", ["x", "w"], ["y"])], [value("x", [2**62, 2**62, 2**62, 2**62])], [weight]
        )
    if kind == 2:
        x = value("x", [2] * int(rng.integers(10**5, 10**6)))
        return save(folder, [helper.make_node("MatMul", ["x", "x"], ["y"])], [x])
    nodes = [helper.make_node("Tile", [f"v{i}", "n"], [f"v{i + 1}"]) for i in range(50)]
    return save(folder, nodes, [value("v0", [2, 2])], [constant("n", [2**40, 2**40])])


def loops(rng: Rng, folder: Path) -> Path:
    """Loops inside of loops, each of very many turns; as deep as protobuf allows, or by way of functions."""
    turns = constant("n", 2**62)
    ops = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    depth = int(rng.integers(2, 25)) if rng.random() < 0.5 else int(rng.integers(50, 200))

    def around(inner: onnx.NodeProto, level: int) -> onnx.NodeProto:
        nodes = [helper.make_node("Identity", [f"g{level}"], [f"h{level}"]), inner]
        inputs = [value(f"i{level}", [], INT64), value(f"g{level}", [], TensorProto.BOOL), value(f"s{level}", None)]
        outputs = [value(f"h{level}", [], TensorProto.BOOL), value(f"s{level}", None)]
        body = helper.make_graph(nodes, "b", inputs, outputs)
        return helper.make_node("Loop", ["n", "", "x"], [f"l{level}"], body=body)

    node = helper.make_node("MatMul", ["x", "x"], ["m"])
    if depth < 25:
        for level in range(depth):
            node = around(node, level)
        return save(folder, [node], [value("x", [3, 3])], [turns])
    functions = []
    for level in range(depth):
        call = helper.make_node(f"F{level + 1}", ["x", "n"], ["r"], domain="own") if level < depth - 1 else node
        body = [around(call, level), helper.make_node("Identity", ["x"], ["y"])]
        functions.append(helper.make_function("own", f"F{level}", ["x", "n"], ["y"], body, ops))
    first = helper.make_node("F0", ["x", "n"], ["y"], domain="own")
    return save(folder, [first], [value("x", [3, 3])], [turns], functions, ["own"])


def many(rng: Rng, folder: Path) -> Path:
    """Very many nodes, names or opsets; long names."""
    kind, size = int(rng.integers(4)), int(rng.integers(50_000, 400_000))
    if kind == 0:
        nodes = [helper.make_node("Relu", ["x"], [f"y{index}"]) for index in range(size)]
        return save(folder, nodes, [image()])
    if kind == 1:  # two bytes each
        path = save(folder, [helper.make_node("Relu", ["x"], ["y"])], [image()])
        path.write_bytes(path.read_bytes() + _field(7, _field(1, b"") * (40 * size)))
        return path
    name = "n" * (10 * size)
    if kind == 2:
        weight = constant("w", np.ones((CHANNELS, CHANNELS, 1, 1)), np.float32)
        nodes = [helper.make_node("Conv", ["x", "w"], [f"{index}"], name=name) for index in range(30)]
        return save(folder, nodes, [image()], [weight])
    model = onnx.load(save(folder, [helper.make_node("Relu", ["x"], ["y"])], [image()]))
    model.opset_import.extend(helper.make_opsetid(f"d{index}", 1) for index in range(size))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def _field(number: int, content: bytes) -> bytes:
    size, prefix = len(content), b""
    while True:
        size, part = size >> 7, size & 127
        prefix += bytes([part | (128 if size else 0)])
        if not size:
            return bytes([number << 3 | 2]) + prefix + content


def no_files(rng: Rng, folder: Path) -> Path:
    """A pipe, a folder, a device, a link in a circle; or external data that is one of these or lies elsewhere."""
    path, kind = folder / "model.onnx", int(rng.integers(8))
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(str(rng.choice(["/dev/zero", "/dev/tty", "/proc/self/mem"])))
    elif kind == 3:
        path.symlink_to(path)
    else:
        place = ["pipe", "/dev/zero", "../../../../../../etc/passwd", "link"][kind - 4]
        os.mkfifo(folder / "pipe")
        (folder / "link").symlink_to("/dev/zero")
        shape = TensorProto(name="n", data_type=INT64, dims=[4], data_location=TensorProto.EXTERNAL)
        shape.external_data.add(key="location", value=place)
        weight = constant("w", np.ones((CHANNELS, CHANNELS, 1, 1)), np.float32)
        nodes = [helper.make_node("Reshape", ["x", "n"], ["r"]), helper.make_node("Conv", ["r", "w"], ["y"])]
        return save(folder, nodes, [image()], [shape, weight])
    return path


def damaged(rng: Rng, folder: Path) -> Path:
    """A hostile net's bytes, flipped, cut or nested."""
    kinds = list(HOSTILE.values())
    model = kinds[int(rng.integers(len(kinds)))](rng).model
    data = bytearray(model.SerializeToString())
    for _ in range(int(rng.integers(1, 20))):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    if rng.random() < 0.3:
        data = data[: int(rng.integers(len(data)))]
    if rng.random() < 0.2:
        inner = b""
        for _ in range(int(rng.integers(50, 3000))):
            inner = _field(7, _field(1, _field(5, _field(6, inner))))
        data += inner
    (folder / "model.onnx").write_bytes(bytes(data))
    return folder / "model.onnx"


def opsets(rng: Rng, folder: Path) -> Path:
    path = save(
        folder,
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        [image()],
        [constant("w", np.ones((4, 3, 3, 3)), np.float32)],
    )
    model = onnx.load(path)
    kind = int(rng.integers(4))
    if kind == 0:
        model.opset_import.append(helper.make_opsetid(str(rng.choice(["", "ai.onnx"])), 1))
    elif kind == 1:
        model.opset_import[0].version = int(rng.choice(_SIZES))
    elif kind == 2:
        del model.opset_import[:]
    else:
        model.graph.node[0].attribute.extend(helper.make_attribute("strides", [step, step]) for step in (1, 50))
    model.ir_version = int(rng.choice([0, 2, 3, 10, 99]))
    path.write_bytes(model.SerializeToString())
    return path


FILES: Mapping[str, Callable[[Rng, Path], Path]] = {
    "calls of functions": calls,
    "huge values": huge_values,
    "strings": strings,
    "einsums": einsums,
    "any operator": any_operator,
    "operators that crashed": known_crashers,
    "dimensions": dimensions,
    "loops in loops": loops,
    "very many": many,
    "no files": no_files,
    "damaged": damaged,
    "opsets": opsets,
}
