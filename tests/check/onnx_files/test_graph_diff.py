"""Renamed graphs are equal; every planted fault is found and said in a sentence."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from doconv_convert.check.onnx_files.graph_diff import compare_graphs
from doconv_convert.check.onnx_files.leftovers import leftover_composition
from doconv_convert.errors import DoconvError

RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.normal(size=(4, 3, 3, 3)).astype(np.float32),
    "b": RNG.normal(size=4).astype(np.float32),
    "v": RNG.normal(size=(4, 4, 1, 1)).astype(np.float32),
}


def branch(op: str) -> onnx.GraphProto:
    output = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node(op, ["s"], ["r"])], op, [], [output])


def network() -> ModelProto:
    """Two convolutions, a sum, an If with a subgraph in each branch, and two outputs."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["a"], name="first", group=1, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "v"], ["c"], name="second"),
        helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(np.float32([0.5]), "t")),
        helper.make_node("Mul", ["c", "half"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "a"], ["s"]),
        helper.make_node("If", ["q"], ["y"], then_branch=branch("Relu"), else_branch=branch("Abs")),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8]),
            helper.make_tensor_value_info("q", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 8, 8]),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, ["batch", 4, 8, 8]),
        ],
        [numpy_helper.from_array(array, name) for name, array in WEIGHTS.items()],
        value_info=[helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", 4, 8, 8])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def renamed() -> ModelProto:
    """The same network with other names inside, its initializers listed backwards and in typed fields."""
    model = network()
    names = {"w": "p0", "b": "p1", "v": "p2", "a": "t0", "c": "t1", "half": "t2", "scaled": "t3"}
    for node in model.graph.node:
        node.name = f"other_{node.name}"
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    tensors = [
        helper.make_tensor(names[name], TensorProto.FLOAT, array.shape, array.ravel().tolist())
        for name, array in reversed(WEIGHTS.items())
    ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    model.graph.value_info[0].name = "t0"
    model.producer_name = model.doc_string = "another"
    return model


def test_names_inside_do_not_count() -> None:
    comparison = compare_graphs(network(), renamed())
    assert comparison.differences == ()
    assert comparison.equal
    assert (comparison.nodes, comparison.initializers) == (8, 3)


def attribute(model: ModelProto) -> None:
    model.graph.node[0].attribute[0].i = 2


def attribute_dropped(model: ModelProto) -> None:
    del model.graph.node[0].attribute[1]


def subgraph(model: ModelProto) -> None:
    model.graph.node[5].attribute[0].g.node[0].op_type = "Neg"


def constant(model: ModelProto) -> None:
    model.graph.node[2].attribute[0].t.CopyFrom(numpy_helper.from_array(np.float32([0.75]), "t"))


def wiring(model: ModelProto) -> None:
    model.graph.node[4].input[:] = ["a", "scaled"]


def input_dropped(model: ModelProto) -> None:
    del model.graph.node[0].input[2]


def dtype(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def shape(model: ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5


def dim_param(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"


def inner_shape(model: ModelProto) -> None:
    model.graph.value_info[0].type.tensor_type.shape.dim[2].dim_value = 9


def one_ulp(model: ModelProto) -> None:
    array = WEIGHTS["w"].copy()
    array[1, 2, 0, 1] = np.nextafter(array[1, 2, 0, 1], np.float32(9))
    model.graph.initializer[0].raw_data = array.tobytes()


def not_a_number(model: ModelProto) -> None:
    array = WEIGHTS["w"].copy()
    array[0, 0, 0, 0] = np.nan
    model.graph.initializer[0].raw_data = array.tobytes()


def weight_shape(model: ModelProto) -> None:
    model.graph.initializer[1].dims[:] = [2, 2]


def extra_node(model: ModelProto) -> None:
    model.graph.node[3].input[0] = "i"
    model.graph.node.insert(3, helper.make_node("Identity", ["c"], ["i"]))


def output_dropped(model: ModelProto) -> None:
    del model.graph.output[1]


def output_renamed(model: ModelProto) -> None:
    model.graph.node[5].output[0] = model.graph.output[0].name = "z"


def outputs_exchanged(model: ModelProto) -> None:
    """The names keep their order, the values behind them change places."""
    for node in model.graph.node:
        for field in (node.input, node.output):
            field[:] = [{"s": "y", "y": "s"}.get(name, name) for name in field]
    for attribute in model.graph.node[5].attribute:
        attribute.g.node[0].input[0] = "y"


def opset(model: ModelProto) -> None:
    model.opset_import[0].version = 17


def unused(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(2), "conv.D"))


def shared(model: ModelProto) -> None:
    model.graph.node[1].input[1] = "w"


def symbol_like_a_number(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "3"


def ir_version(model: ModelProto) -> None:
    model.ir_version -= 1


def two_values(model: ModelProto) -> None:
    model.graph.initializer[0].float_data.extend([1.0] * 108)


def two_values_of_an_attribute(model: ModelProto) -> None:
    model.graph.node[0].attribute[0].ints.append(1)


def unknown_field(model: ModelProto) -> None:
    model.graph.node[1].MergeFromString(b"\xa2\x06\x03abc")


def training(model: ModelProto) -> None:
    model.training_info.add().algorithm.name = "sgd"


FAULTS: dict[Callable[[ModelProto], None], str] = {
    attribute: "node 0: expected Conv(group=1, ...) got Conv(group=2, ...)",
    attribute_dropped: "node 0: expected Conv(pads=[1, 1, 1, 1], ...) got Conv(pads=(absent), ...)",
    subgraph: "node 5 else_branch node 0: expected Abs got Neg",
    constant: "node 2 (Constant) value: 1 of 1 values differ, largest difference 2.5e-01",
    wiring: "node 4 (Sub) input 0: expected output 0 of node 3 got output 0 of node 0",
    input_dropped: "node 0 (Conv) number of inputs: expected 3 got 2",
    dtype: "graph input 0: expected 'x' float32[batch,3,8,8] got 'x' float64[batch,3,8,8]",
    shape: "graph output 0: expected 'y' float32[batch,4,8,8] got 'y' float32[batch,5,8,8]",
    dim_param: "graph input 0: expected 'x' float32[batch,3,8,8] got 'x' float32[N,3,8,8]",
    inner_shape: "node 0 (Conv) type 0: expected float32[batch,4,8,8] got float32[batch,4,9,8]",
    one_ulp: "initializer 0 ('w', float32 4x3x3x3): 1 of 108 values differ, largest difference ",
    not_a_number: "initializer 0 ('w', float32 4x3x3x3): 1 of 108 values differ, largest difference nan",
    weight_shape: "initializer 1 ('b', float32 4): expected float32 4 got float32 2x2",
    extra_node: "number of nodes: expected 8 got 9",
    output_dropped: "graph: expected 2 outputs got 1 outputs",
    output_renamed: "graph output 0: expected 'y' float32[batch,4,8,8] got 'z' float32[batch,4,8,8]",
    outputs_exchanged: "graph output 0: expected output 0 of node 5 got output 0 of node 4",
    opset: "model opset imports: expected ai.onnx 18 got ai.onnx 17",
    unused: "number of unused initializers: expected 0 got 1 (the last one is 'conv.D')",
    shared: "node 1 (Conv) input 1: expected initializer 2 got initializer 0",
    symbol_like_a_number: "graph input 0: expected 'x' float32[batch,3,8,8] got 'x' float32[batch,'3',8,8]",
    ir_version: "model IR version: expected ",
    two_values: "model other fields: expected none got tensor 'w' with values in float_data and raw_data",
    two_values_of_an_attribute: "model other fields: expected none got attribute 'group' with values in i and ints",
    unknown_field: "model other fields: expected none got NodeProto fields [100] (",
    training: "model other fields: expected none got ModelProto.training_info (",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_planted_fault_is_found(fault: Callable[[ModelProto], None]) -> None:
    model = network()
    fault(model)
    assert any(text.startswith(FAULTS[fault]) for text in compare_graphs(network(), model).differences)
    assert not compare_graphs(model, network()).equal


def with_zeros(
    initializer: float, constant: float, attribute: float, entry: float, dtype: type = np.float32
) -> ModelProto:
    """A network whose numbers are zeros of the given signs, at each place that holds one."""
    value = numpy_helper.from_array(np.array([0.5, constant], dtype), "t")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=value),
        helper.make_node("Constant", [], ["l"], value_floats=[1.0, entry]),
        helper.make_node("Mine", ["w", "c", "l"], ["y"], domain="mine", alpha=attribute),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weights = [numpy_helper.from_array(np.array([initializer, 1.0], dtype), "w")]
    return helper.make_model(helper.make_graph(nodes, "zeros", [], [output], weights))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64])
@pytest.mark.parametrize("place", range(4))
def test_minus_zero_is_not_zero(tmp_path: Path, place: int, dtype: type) -> None:
    """Equal as numbers, other bytes: 1 / x tells them apart."""
    signs = [-0.0 if index == place else 0.0 for index in range(4)]
    plus, minus = with_zeros(0.0, 0.0, 0.0, 0.0, dtype), with_zeros(*signs, dtype)
    assert compare_graphs(plus, plus).equal
    assert len(compare_graphs(plus, minus).differences) == 1
    for name, model in (("plus", plus), ("minus", minus)):
        options = {"location": f"{name}.data", "size_threshold": 0, "convert_attribute": True}
        onnx.save(model, tmp_path / f"{name}.onnx", save_as_external_data=True, **options)
    assert len(compare_graphs(tmp_path / "plus.onnx", tmp_path / "minus.onnx").differences) == 1


def test_without_values_only_values_are_tolerated() -> None:
    for fault in FAULTS:
        model = network()
        fault(model)
        assert compare_graphs(network(), model, values=False).equal == (fault in (one_ulp, not_a_number))


def test_a_file_with_an_unused_initializer_equals_itself() -> None:
    model = network()
    unused(model)
    assert compare_graphs(model, model).equal


def test_beyond_the_limit_differences_are_counted() -> None:
    model = network()
    for node in model.graph.node[:4]:
        node.op_type = "Foo"
    differences = compare_graphs(network(), model, max_differences=2).differences
    assert len(differences) == 3
    assert differences[-1] == "and 2 more differences"


def test_external_data_is_compared_by_its_bytes(tmp_path: Path) -> None:
    half = numpy_helper.from_array(WEIGHTS["v"].astype(np.float16), "half")
    bfloat16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    rounded = numpy_helper.from_array(WEIGHTS["v"].astype(bfloat16), "rounded")
    for name, fault in (("a", None), ("b", one_ulp)):
        model = network()
        if fault:
            fault(model)
        model.graph.initializer.extend([half, rounded, numpy_helper.from_array(np.zeros((0, 2)), "empty")])
        onnx.save(
            model, tmp_path / f"{name}.onnx", save_as_external_data=True, location=f"{name}.data", size_threshold=0
        )
    embedded = onnx.load(tmp_path / "a.onnx")
    assert compare_graphs(tmp_path / "a.onnx", embedded).equal
    (difference,) = compare_graphs(embedded, tmp_path / "b.onnx").differences
    assert "1 of 108 values differ" in difference
    with pytest.raises(DoconvError, match="lies in an external file: pass the model's path"):
        compare_graphs(embedded, onnx.load(tmp_path / "a.onnx", load_external_data=False))
    (tmp_path / "b.data").write_bytes(b"short")
    with pytest.raises(DoconvError, match=r"the external data of tensor 'w', 'b\.data'"):
        compare_graphs(embedded, tmp_path / "b.onnx")
    (tmp_path / "b.data").unlink()
    with pytest.raises(DoconvError, match=r"the external data of tensor 'w', 'b\.data'"):
        compare_graphs(embedded, tmp_path / "b.onnx")
    assert compare_graphs(embedded, tmp_path / "b.onnx", values=False).equal


def with_default(value: int, attribute: str = "step") -> ModelProto:
    body = [helper.make_node("Relu", ["a"], ["b"])]
    function = helper.make_function("mine", "F", ["a"], ["b"], body, [helper.make_opsetid("", 18)], [attribute])
    function.attribute_proto.append(helper.make_attribute("given", value))
    function.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [value]))
    model = network()
    model.functions.append(function)
    return model


def test_what_a_function_declares_is_compared() -> None:
    assert compare_graphs(with_default(1), with_default(1)).equal
    assert compare_graphs(with_default(1), with_default(1, "pace")).differences == (
        "function mine.F  attributes: expected step got pace",
    )
    assert len(compare_graphs(with_default(1), with_default(2)).differences) == 2


def test_local_functions_are_compared() -> None:
    def calling(op: str) -> ModelProto:
        body = [helper.make_node(op, ["a"], ["b"])]
        model = network()
        opsets = [helper.make_opsetid("", 18)]
        model.functions.append(helper.make_function("mine", "F", ["a"], ["b"], body, opsets))
        return model

    assert compare_graphs(calling("Relu"), calling("Relu")).equal
    assert compare_graphs(calling("Relu"), calling("Neg")).differences == (
        "function mine.F node 0: expected Relu got Neg",
    )
    assert not compare_graphs(calling("Relu"), network()).equal


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x0a"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(DoconvError, match=r"m\.onnx"):
        compare_graphs(network(), tmp_path / "m.onnx")
    with pytest.raises(DoconvError, match="absent"):
        leftover_composition(tmp_path / "absent.onnx")


def test_a_truncated_initializer_is_refused() -> None:
    model = network()
    model.graph.initializer[0].raw_data = b"1234"
    with pytest.raises(DoconvError, match="the values of initializer 'w' cannot be read"):
        compare_graphs(network(), model)


@pytest.mark.parametrize("name", ["D", "layer1.0.D", "conv.weight_extra", "cell/kernel_D", "m.kernel_extra"])
def test_the_names_of_a_composition_are_recognized(name: str) -> None:
    model = network()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1), name))
    assert leftover_composition(model) == [f"initializer '{name}' is named like a part of a DO-Conv kernel"]


def with_node(name: str, output: str, where: str) -> ModelProto:
    """A node of that name that multiplies by the input, which is no constant's: only its name can tell."""
    node = helper.make_node("Mul", ["a", "a"], [output], name=name)
    model = network()
    if where == "graph":
        model.graph.node.append(node)
    elif where == "branch":
        model.graph.node[5].attribute[0].g.node.append(node)
    else:
        opsets = [helper.make_opsetid("", 18)]
        model.functions.append(helper.make_function("mine", "F", ["a"], [output], [node], opsets))
    return model


@pytest.mark.parametrize("where", ["graph", "branch", "function"])
@pytest.mark.parametrize("name", ["D", "layer1.0.D", "conv.weight_extra", "cell/kernel_D", "m.kernel_extra"])
def test_nodes_named_like_a_composition_are_recognized(name: str, where: str) -> None:
    said = [f"node '{name}' (Mul) is named like a part of a DO-Conv kernel"]
    assert leftover_composition(with_node(name, "value", where)) == said
    assert leftover_composition(with_node("", name, where)) == said


@pytest.mark.parametrize("name", ["d", "D.weight", "encoder_D.weight", "extra", "BAD"])
def test_other_names_are_left_alone(name: str) -> None:
    model = network()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1), name))
    assert leftover_composition(model) == []
    assert leftover_composition(with_node(name, "value", "graph")) == []
    assert leftover_composition(with_node("", name, "branch")) == []


def kernel_from(source: str, *nodes: onnx.NodeProto) -> ModelProto:
    model = network()
    model.graph.node[1].input[1] = source
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    return model


def test_a_kernel_that_is_computed_from_constants_is_a_leftover() -> None:
    composed = kernel_from("k", helper.make_node("Mul", ["v", "v"], ["u"]), helper.make_node("Identity", ["u"], ["k"]))
    assert leftover_composition(composed) == ["node 'second' (Conv) takes a kernel that the graph computes: 'k'"]


def test_constant_carried_and_input_dependent_kernels_are_not() -> None:
    value = numpy_helper.from_array(WEIGHTS["v"])
    assert leftover_composition(kernel_from("k", helper.make_node("Constant", [], ["k"], value=value))) == []
    assert leftover_composition(kernel_from("k", helper.make_node("ConstantOfShape", ["v"], ["k"]))) == []
    assert leftover_composition(kernel_from("k", helper.make_node("Identity", ["v"], ["k"]))) == []
    assert leftover_composition(kernel_from("k", helper.make_node("Mul", ["v", "x"], ["k"]))) == []
