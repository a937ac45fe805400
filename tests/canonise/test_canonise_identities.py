"""Nodes that do nothing go; names that somebody wants stay. Oracle: ONNX Runtime on the original model, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcam.canonise import canonise
from onnxcam.errors import ModelError
from tests.canonise.building import canonised, model, node, ops

NO_OPS = {
    "Identity": ({}, {}),
    "Cast": ({"to": 1}, {}),
    "Transpose": ({"perm": [0, 1, 2, 3]}, {}),
    "Reshape": ({}, {"a": np.array([0, 2, -1, 4])}),
    "Expand": ({}, {"a": np.array([2, 1, 1])}),
    "Tile": ({}, {"a": np.array([1, 1, 1, 1])}),
    "Pad": ({}, {"a": np.zeros(8, np.int64)}),
    "Slice": ({}, {"a": np.array([0]), "b": np.array([99]), "c": np.array([2])}),
    "Concat": ({"axis": 1}, {}),
    "Sum": ({}, {}),
}
SOMETHING = {
    "Transpose": ({"perm": [0, 1, 3, 2]}, {}),
    "Reshape": ({}, {"a": np.array([1, 2, 2, 8])}),
    "Expand": ({}, {"a": np.array([3, 1, 1, 1])}),
    "Tile": ({}, {"a": np.array([1, 2, 1, 1])}),
    "Pad": ({}, {"a": np.array([0, 0, 1, 0, 0, 0, 0, 0])}),
    "Slice": ({}, {"a": np.array([-1]), "b": np.array([-99]), "c": np.array([2]), "d": np.array([-1])}),
}


def between(op: str, attributes: dict, constants: dict, batch: int | str = 1):
    nodes = [
        node("Relu", ["x"], ["r"]),
        node(op, ["r", *constants], ["i"], "nothing", **attributes),
        node("Exp", ["i"], ["y"]),
    ]
    return model(nodes, {"x": (batch, 2, 4, 4)}, ["y"], constants)


@pytest.mark.parametrize("op", NO_OPS)
def test_a_node_that_does_nothing_goes(op):
    assert ops(canonised(between(op, *NO_OPS[op]), tolerance=0)) == {"Relu": 1, "Exp": 1}


@pytest.mark.parametrize("op", SOMETHING)
def test_a_node_of_the_same_kind_that_does_something_stays(op):
    assert op in ops(canonised(between(op, *SOMETHING[op]), tolerance=0))


def test_a_reshape_to_the_same_shape_goes_with_a_symbolic_batch_too():
    proto = between("Reshape", {}, {"a": np.array([0, 2, 4, 4])}, "b")
    assert "Reshape" not in ops(canonised(proto, sizes={"b": 3}, tolerance=0))


@pytest.mark.parametrize("opset", [7, 10, 12, 13, 17])
def test_dropout_goes_at_every_opset(opset):
    attributes = {"ratio": 0.5} if opset < 12 else {}
    nodes = [node("Relu", ["x"], ["r"]), node("Dropout", ["r"], ["d", "mask"], **attributes)]
    nodes.append(node("Exp", ["d"], ["y"]))
    assert ops(canonised(model(nodes, {"x": (1, 2)}, ["y"], opset=opset), tolerance=0)) == {"Relu": 1, "Exp": 1}


def test_dropout_told_not_to_train_goes():
    nodes = [node("Dropout", ["x", "ratio", "train"], ["d"]), node("Exp", ["d"], ["y"])]
    constants = {"ratio": np.float32(0.5).reshape(()), "train": np.array(False)}
    assert ops(canonised(model(nodes, {"x": (1, 2)}, ["y"], constants), tolerance=0)) == {"Exp": 1}


def test_dropout_told_to_train_is_refused():
    nodes = [node("Dropout", ["x", "ratio", "train"], ["d"], "drop"), node("Exp", ["d"], ["y"])]
    constants = {"ratio": np.float32(0.5).reshape(()), "train": np.array(True)}
    with pytest.raises(ModelError, match="'drop' computes in training mode"):
        canonise(model(nodes, {"x": (1, 2)}, ["y"], constants))


def test_an_identity_that_makes_the_output_hands_its_name_to_the_node_before_it():
    graph = canonised(model([node("Relu", ["x"], ["r"], "relu"), node("Identity", ["r"], ["y"])], {"x": (1, 2)}, ["y"]))
    (relu,) = graph.nodes
    assert (relu.name, relu.outputs[0].name) == ("relu", "y")


def test_an_identity_between_two_wanted_names_stays():
    nodes = [node("Relu", ["x"], ["r"]), node("Identity", ["r"], ["y"])]
    assert ops(canonised(model(nodes, {"x": (1, 2)}, ["r", "y"]))) == {"Relu": 1, "Identity": 1}
    assert ops(canonised(model(nodes, {"x": (1, 2)}, ["y"]), keep=["r"])) == {"Relu": 1, "Identity": 1}
    direct = model([node("Identity", ["x"], ["y"])], {"x": (1, 2)}, ["y"])
    assert ops(canonised(direct)) == {"Identity": 1}


def test_a_kept_alias_survives_with_its_name():
    nodes = [node("Relu", ["x"], ["r"]), node("Identity", ["r"], ["alias"]), node("Exp", ["alias"], ["y"])]
    graph = canonised(model(nodes, {"x": (1, 2)}, ["y"]), keep=["alias"])
    assert ops(graph) == {"Relu": 1, "Exp": 1}
