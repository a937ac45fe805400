"""What depends on constants only is folded, and nothing else is. Oracle: ONNX Runtime on the original model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxcam.canonise import canonise
from tests.canonise.building import canonised, evaluate, model, node, normal, ops


def test_wrapped_weights_become_constants():
    weight = normal(3, 2, 1, 1)
    nodes = [
        node("Identity", ["raw"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[1, 0, 2, 3]),
        node("Cast", ["b"], ["c"], to=onnx.TensorProto.FLOAT),
        node("Reshape", ["c", "shape"], ["w"]),
        node("Conv", ["x", "w"], ["y"], "conv"),
    ]
    raw = weight.transpose(1, 0, 2, 3).astype(np.float16)
    constants = {"raw": raw, "shape": np.array([3, 2, 1, 1])}
    graph = canonised(model(nodes, {"x": (1, 2, 4, 4)}, ["y"], constants))
    assert ops(graph) == {"Conv": 1}
    np.testing.assert_array_equal(graph.nodes[0].inputs[1].values, weight.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("axis", [0, 1])
def test_dequantised_weights_become_constants(axis):
    rng = np.random.default_rng(0)
    constants = {
        "q": rng.integers(-128, 128, (3, 2, 3, 3)).astype(np.int8),
        "scale": rng.uniform(0.01, 0.1, 3 - axis).astype(np.float32),
        "zero": rng.integers(-5, 5, 3 - axis).astype(np.int8),
    }
    nodes = [node("DequantizeLinear", ["q", "scale", "zero"], ["w"], axis=axis), node("Conv", ["x", "w"], ["y"])]
    assert ops(canonised(model(nodes, {"x": (1, 2, 4, 4)}, ["y"], constants))) == {"Conv": 1}


def test_float_weights_that_are_quantised_on_the_way_become_constants():
    constants = {"f": normal(3, 2, 3, 3), "scale": np.float32(0.02).reshape(()), "zero": np.int8(0).reshape(())}
    nodes = [
        node("QuantizeLinear", ["f", "scale", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "scale", "zero"], ["w"]),
        node("Conv", ["x", "w"], ["y"]),
    ]
    assert ops(canonised(model(nodes, {"x": (1, 2, 4, 4)}, ["y"], constants))) == {"Conv": 1}


def test_quantisation_of_activations_stays():
    constants = {"scale": np.float32(0.02).reshape(()), "zero": np.uint8(128).reshape(())}
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    proto = model(nodes, {"x": (1, 2)}, ["y"], constants)
    assert ops(canonised(proto)) == {"QuantizeLinear": 1, "DequantizeLinear": 1}


SPARSE = helper.make_sparse_tensor(
    onnx.numpy_helper.from_array(np.float32([2, 3]), "values"), onnx.numpy_helper.from_array(np.array([1, 2])), [4]
)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("value_float", 0.5),
        ("value_floats", [0.5, 1.5, -2.0, 4.0]),
        ("value", onnx.numpy_helper.from_array(np.float32([1, 2, 3, 4]))),
        ("sparse_value", SPARSE),
    ],
)
def test_constant_nodes_of_every_kind_become_constants_of_their_own_type(attribute, value):
    nodes = [node("Constant", [], ["k"], **{attribute: value}), node("Pow", ["x", "k"], ["p"])]
    nodes += [node("Abs", ["x"], ["a"])]
    nodes[1] = node("Mul", ["a", "k"], ["y"])
    graph = canonise(model([nodes[2], nodes[0], nodes[1]], {"x": (2, 4)}, ["y"]))
    expected = {
        "value_float": np.float32(0.5),
        "value_floats": np.float32([0.5, 1.5, -2, 4]),
        "value": np.float32([1, 2, 3, 4]),
        "sparse_value": np.float32([0, 2, 3, 0]),
    }[attribute]
    values = graph.nodes[-1].inputs[1].values
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, expected)


def test_integer_constant_nodes_serve_as_shapes():
    nodes = [node("Constant", [], ["s"], value_ints=[2, 8]), node("Reshape", ["x", "s"], ["y"])]
    assert ops(canonised(model(nodes, {"x": (2, 2, 4)}, ["y"]))) == {"Reshape": 1}


def test_nothing_random_is_folded():
    nodes = [node("RandomNormal", [], ["n"], shape=[1, 2]), node("Add", ["x", "n"], ["y"])]
    assert ops(canonise(model(nodes, {"x": (1, 2)}, ["y"]))) == {"RandomNormal": 1, "Add": 1}
    nodes = [node("RandomUniformLike", ["k"], ["n"]), node("Add", ["x", "n"], ["y"])]
    assert "RandomUniformLike" in ops(canonise(model(nodes, {"x": (1, 2)}, ["y"], {"k": normal(1, 2)})))


def test_an_operator_the_runtime_does_not_know_stays_and_its_neighbours_are_folded():
    nodes = [
        node("Mystery", ["k"], ["m"], domain="org.example"),
        node("Neg", ["k"], ["n"]),
        node("Mul", ["m", "n"], ["f"]),
        node("Add", ["x", "n"], ["a"]),
        node("Add", ["a", "f"], ["y"]),
    ]
    proto = model(nodes, {"x": (1, 2)}, ["y"], {"k": normal(1, 2)}, domains=["org.example"])
    assert ops(canonise(proto)) == {"Mystery": 1, "Mul": 1, "Add": 2}


def test_what_the_runtime_cannot_compute_the_reference_computes():
    # ONNX Runtime has no bfloat16 Exp on the CPU; the values pass through bfloat16, so 8 bits are right.
    nodes = [
        node("Cast", ["k"], ["b"], to=onnx.TensorProto.BFLOAT16),
        node("Exp", ["b"], ["e"]),
        node("Cast", ["e"], ["f"], to=onnx.TensorProto.FLOAT),
        node("Add", ["x", "f"], ["y"]),
    ]
    k = normal(1, 2)
    graph = canonise(model(nodes, {"x": (1, 2)}, ["y"], {"k": k}))
    assert ops(graph) == {"Add": 1}
    np.testing.assert_allclose(graph.nodes[0].inputs[1].values, np.exp(k), rtol=2**-6)


def test_an_opset_newer_than_the_runtime_does_no_harm():
    newest = onnx.defs.onnx_opset_version()
    nodes = [node("Identity", ["w"], ["v"]), node("Conv", ["x", "v"], ["y"])]
    graph = canonise(model(nodes, {"x": (1, 2, 4, 4)}, ["y"], {"w": normal(3, 2, 1, 1)}, opset=newest))
    assert ops(graph) == {"Conv": 1}


def test_half_precision_weights_are_folded_in_half_precision():
    nodes = [
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("Cast", ["x"], ["h"], to=onnx.TensorProto.FLOAT16),
        node("MatMul", ["h", "t"], ["m"]),
        node("Cast", ["m"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    graph = canonised(model(nodes, {"x": (2, 3)}, ["y"], {"w": normal(4, 3).astype(np.float16)}))
    assert graph.nodes[1].inputs[1].values.dtype == np.float16


def test_initialisers_that_are_also_inputs_are_constants():
    nodes = [node("Conv", ["x", "w"], ["y"])]
    proto = model(nodes, {"x": (1, 2, 4, 4), "w": (3, 2, 1, 1)}, ["y"], {"w": normal(3, 2, 1, 1)}, 7, ir_version=3)
    graph = canonised(proto)
    assert [t.name for t in graph.inputs] == ["x"]
    np.testing.assert_array_equal(graph.nodes[0].inputs[1].values, normal(3, 2, 1, 1))


def test_a_constant_output_stays_an_output():
    nodes = [node("Neg", ["k"], ["anchors"]), node("Relu", ["x"], ["y"])]
    proto = model(nodes, {"x": (1, 2)}, ["y", "anchors"], {"k": normal(3)})
    graph = canonised(proto)
    assert [t.name for t in graph.outputs] == ["y", "anchors"]


def test_shape_arithmetic_in_floats_is_not_rewritten_in_integers():
    # Half the height, computed in floats: graph-surgeon's cast elision would multiply by int(0.5).
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Cast", ["s"], ["f"], to=onnx.TensorProto.FLOAT),
        node("Mul", ["f", "half"], ["h"]),
        node("Cast", ["h"], ["sizes"], to=onnx.TensorProto.INT64),
        node("Resize", ["x", "", "", "sizes"], ["y"], mode="nearest"),
    ]
    proto = model(nodes, {"x": ("n", 4, 6, 8)}, ["y"], {"half": np.float32([1, 1, 0.5, 0.5])})
    graph = canonised(proto, sizes={"n": 1}, shapes={"x": (1, 4, 6, 8)})
    assert ops(graph) == {"Resize": 1}
    assert evaluate(proto, {"x": normal(1, 4, 6, 8)})[0].shape == (1, 4, 3, 4)
