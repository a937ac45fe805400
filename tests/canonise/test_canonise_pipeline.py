"""What holds for canonisation as a whole: names, order, branches, sizes, and what the caller passed in."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcam.canonise import canonise
from onnxcam.errors import ModelError, UsageError
from tests.canonise.building import batchnorm, canonised, evaluate, model, node, normal, ops

BN = ["bn.gamma", "bn.beta", "bn.mean", "bn.var"]


def test_the_callers_proto_is_unchanged_byte_for_byte():
    nodes = [
        node("Constant", [], ["k"], value_floats=[1.0, 2.0, 3.0]),
        node("Identity", ["w"], ["v"]),
        node("Conv", ["x", "v"], ["c"]),
        node("BatchNormalization", ["c", *BN], ["n"]),
        node("FusedConv", ["n", "u"], ["y"], domain="com.microsoft"),
    ]
    constants = {"w": normal(3, 2, 1, 1), "u": normal(2, 3, 1, 1), **batchnorm(3)}
    proto = model(nodes, {"x": ("b", 2, 4, 4)}, ["y"], constants, domains=["com.microsoft"])
    before = proto.SerializeToString(deterministic=True)
    canonise(proto, shapes={"x": (1, 2, 4, 4)})
    assert proto.SerializeToString(deterministic=True) == before


def test_unnamed_nodes_are_counted_in_the_original_file():
    nodes = [
        node("Identity", ["x"], ["i"]),
        node("Relu", ["i"], ["a"]),
        node("Relu", ["a"], ["b"], "mine"),
        node("Identity", ["b"], ["j"]),
        node("Relu", ["j"], ["y"]),
    ]
    assert [n.name for n in canonise(model(nodes, {"x": (1, 2)}, ["y"])).nodes] == ["Relu_0", "mine", "Relu_2"]


def test_duplicate_names_and_names_that_are_taken_are_told_apart():
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Exp", ["a"], ["b"], "Relu_0"),
        node("Exp", ["b"], ["c"], "twice"),
        node("Exp", ["c"], ["y"], "twice"),
    ]
    names = [n.name for n in canonise(model(nodes, {"x": (1, 2)}, ["y"])).nodes]
    assert names == ["Relu_0_1", "Relu_0", "twice", "twice_1"]


def test_kept_tensors_have_the_values_of_the_original():
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("BatchNormalization", ["c", *BN], ["n"]),
        node("Identity", ["n"], ["i"]),
        node("Relu", ["i"], ["r"]),
        node("Dropout", ["r"], ["d"]),
        node("Conv", ["d", "v"], ["y"]),
        node("Exp", ["n"], ["unused"]),
    ]
    proto = model(nodes, {"x": (1, 2, 4, 4)}, ["y"], {"w": normal(3, 2, 1, 1), "v": normal(2, 3, 1, 1), **batchnorm(3)})
    for kept in ("c", "n", "i", "r", "d", "unused"):
        canonised(proto, keep=[kept])
    canonised(proto, keep=["c", "n", "i", "r", "d", "unused"])
    assert "unused" not in canonise(proto).tensors()


def test_the_files_order_is_kept_where_it_is_topological():
    nodes = [
        node("Relu", ["x"], ["a"], "left 1"),
        node("Exp", ["a"], ["b"], "left 2"),
        node("Relu", ["x"], ["c"], "right 1"),
        node("Add", ["b", "c"], ["y"], "join"),
    ]
    assert [n.name for n in canonise(model(nodes, {"x": (1, 2)}, ["y"])).nodes] == [
        "left 1",
        "left 2",
        "right 1",
        "join",
    ]
    nodes = [nodes[3], nodes[1], nodes[0], nodes[2]]
    graph = canonise(model(nodes, {"x": (1, 2)}, ["y"]))
    assert [n.name for n in graph.nodes] == ["left 1", "left 2", "right 1", "join"]


def test_a_very_deep_graph_is_no_trouble():
    nodes = [node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(1500)]
    assert len(canonise(model(nodes[::-1], {"t0": (1, 2)}, ["t1500"])).nodes) == 1500


def branch(*nodes, outputs=("o",), constants=None):
    graph = model(nodes, {}, outputs, constants).graph
    graph.name = "branch"
    return graph


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("kind", ["nodes", "constant", "outer"])
def test_a_branch_with_a_known_condition_joins_the_graph(taken, kind):
    right = {
        "nodes": branch(node("Exp", ["r"], ["t"], "inner"), node("Neg", ["t"], ["o"])),
        "constant": branch(node("Constant", [], ["o"], value_floats=[1.0, 2.0])),
        "outer": branch(node("Identity", ["r"], ["o"])),
    }[kind]
    wrong = branch(node("Abs", ["r"], ["t"]), node("Identity", ["t"], ["o"]))
    chosen, other = (right, wrong) if taken else (wrong, right)
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("If", ["condition"], ["i"], "choice", then_branch=chosen, else_branch=other),
        node("Mul", ["r", "i"], ["t"]),
        node("Add", ["t", "x"], ["y"]),
    ]
    graph = canonised(model(nodes, {"x": (1, 2)}, ["y"], {"condition": np.array(taken)}))
    assert "If" not in ops(graph)
    if kind == "nodes":
        assert "inner" in {n.name for n in graph.nodes}
    assert len({n.name for n in graph.nodes}) == len(graph.nodes)


def test_a_branch_on_the_shape_of_a_tensor_is_taken():
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Shape", ["r"], ["s"]),
        node("Gather", ["s", "one"], ["d"], axis=0),
        node("Equal", ["d", "one"], ["condition"]),
        node(
            "If",
            ["condition"],
            ["y"],
            then_branch=branch(node("Squeeze", ["r", "axes"], ["o"])),
            else_branch=branch(node("Identity", ["r"], ["o"])),
        ),
    ]
    proto = model(nodes, {"x": ("b", "c", 4)}, ["y"], {"one": np.array(1), "axes": np.array([1])})
    assert ops(canonised(proto, sizes={"b": 2, "c": 3}, shapes={"x": ("b", 3, 4)})) == {"Relu": 1}
    assert ops(canonised(proto, sizes={"b": 2, "c": 1}, shapes={"x": ("b", 1, 4)})) == {"Relu": 1, "Squeeze": 1}


def test_a_branch_that_depends_on_the_input_stays_and_so_does_what_it_reads():
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Identity", ["r"], ["alias"]),
        node("ReduceMean", ["x"], ["m"], keepdims=0),
        node("Greater", ["m", "zero"], ["condition"]),
        node(
            "If",
            ["condition"],
            ["y"],
            then_branch=branch(node("Exp", ["alias"], ["o"])),
            else_branch=branch(node("Neg", ["alias"], ["o"])),
        ),
    ]
    graph = canonised(model(nodes, {"x": (1, 2)}, ["y"], {"zero": np.float32(0).reshape(())}))
    assert ops(graph) == {"Relu": 1, "ReduceMean": 1, "Greater": 1, "If": 1}


def test_sizes_that_contradict_the_file_are_refused():
    proto = model([node("Relu", ["x"], ["y"])], {"x": ("b", 3, 8, 8)}, ["y"])
    with pytest.raises(UsageError, match="no input 'z'"):
        canonise(proto, shapes={"z": (1,)})
    with pytest.raises(UsageError, match="does not fit"):
        canonise(proto, shapes={"x": (1, 4, 8, 8)})
    with pytest.raises(UsageError, match="does not fit"):
        canonise(proto, shapes={"x": (1, 3, 8)})


@pytest.mark.parametrize("unknown", [None, 0, -1])
def test_sizes_that_the_file_does_not_know_become_symbols(unknown):
    proto = model([node("Relu", ["x"], ["y"])], {"x": (1, 3, 4, 4)}, ["y"])
    dim = proto.graph.input[0].type.tensor_type.shape.dim
    for d in (dim[0], dim[2]):
        d.Clear()
        if unknown is not None:
            d.dim_value = unknown
    graph = canonise(proto)
    assert list(graph.outputs[0].shape) == ["batch", 3, "x.2", 4]


def test_batchnorm_in_training_mode_is_refused():
    nodes = [node("BatchNormalization", ["x", *BN], ["y", "m", "v"], "bn", training_mode=1)]
    with pytest.raises(ModelError, match="'bn' computes in training mode"):
        canonise(model(nodes, {"x": (1, 3, 4, 4)}, ["y"], batchnorm(3)))


def test_statistics_of_an_old_batchnorm_are_dropped_unless_somebody_reads_them():
    outputs = ["n", "m", "v", "sm", "sv"]
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("BatchNormalization", ["r", *BN], outputs, "bn"),
        node("Relu", ["n"], ["y"]),
    ]
    graph = canonise(model(nodes, {"x": (1, 3, 4, 4)}, ["y"], batchnorm(3), opset=9))
    assert [t.name for t in graph.nodes[1].outputs] == ["n"]
    with pytest.raises(ModelError, match="running statistics"):
        canonise(model(nodes, {"x": (1, 3, 4, 4)}, ["y", "m"], batchnorm(3), opset=9))


def test_bfloat16_weights_survive():
    weight = helper.make_tensor("w", TensorProto.BFLOAT16, [2, 2], [1.0, 2.0, 3.0, 4.0])
    nodes = [
        node("Identity", ["w"], ["i"]),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Cast", ["x"], ["h"], to=TensorProto.BFLOAT16),
        node("MatMul", ["h", "i"], ["m"]),
        node("Cast", ["m"], ["c"], to=TensorProto.FLOAT),
        node("Add", ["c", "f"], ["y"]),
    ]
    proto = model(nodes, {"x": (2, 2)}, ["y"])
    proto.graph.initializer.append(weight)
    graph = canonise(proto)
    np.testing.assert_array_equal(graph.nodes[-1].inputs[1].values, [[1, 2], [3, 4]])


def test_no_message_is_printed(capfd):
    nodes = [node("Mystery", ["k"], ["m"], domain="org.example"), node("Add", ["x", "m"], ["y"])]
    canonise(model(nodes, {"x": (1, 2)}, ["y"], {"k": normal(1, 2)}, domains=["org.example"]))
    assert capfd.readouterr() == ("", "")


def test_the_oracle_reads_tensors_inside_a_model():
    proto = model([node("Relu", ["x"], ["r"]), node("Neg", ["r"], ["y"])], {"x": (1, 2)}, ["y"])
    (r,) = evaluate(proto, {"x": np.float32([[-1, 2]])}, ["r"])
    np.testing.assert_array_equal(r, [[0, 2]])
    assert isinstance(proto, onnx.ModelProto)
