"""Affine maps merge into the linear operator beside them, and nowhere else. Oracle: ONNX Runtime on the original model.

Outputs are compared at 1e-5 relative (see `building.canonised`): folding rounds once per weight in float32.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcam.canonise import canonise
from tests.canonise.building import batchnorm, canonised, model, node, normal, ops

BN = ["bn.gamma", "bn.beta", "bn.mean", "bn.var"]


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_batchnorm_merges_into_the_conv_before_it(rank, group, bias):
    weight = normal(6, 4 // group, *[3] * rank)
    constants = {"w": weight, "b": normal(6), **batchnorm(6)}
    inputs = ["x", "w", "b"] if bias else ["x", "w"]
    nodes = [
        node("Conv", inputs, ["c"], "conv", group=group, pads=[1] * 2 * rank, strides=[2] * rank),
        node("BatchNormalization", ["c", *BN], ["y"], "bn", epsilon=1e-3),
    ]
    graph = canonised(model(nodes, {"x": ("batch", 4, *[7] * rank)}, ["y"], constants), sizes={"batch": 2})
    assert [n.name for n in graph.nodes] == ["conv"]
    assert graph.nodes[0].outputs[0].name == "y"


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("rank", [1, 2])
def test_batchnorm_merges_into_the_grouped_transposed_conv_before_it(rank, group):
    constants = {"w": normal(6, 9 // group, *[3] * rank), "b": normal(9), **batchnorm(9)}
    nodes = [
        node("ConvTranspose", ["x", "w", "b"], ["c"], group=group, strides=[2] * rank),
        node("BatchNormalization", ["c", *BN], ["y"]),
    ]
    graph = canonised(model(nodes, {"x": (2, 6, *[5] * rank)}, ["y"], constants))
    assert ops(graph) == {"ConvTranspose": 1}


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("c_shape", [None, (), (1,), (5,), (1, 5), (3, 1), (3, 5)], ids=str)
def test_batchnorm_merges_into_the_gemm_before_it_whatever_its_attributes(trans_a, trans_b, c_shape):
    constants = {"w": normal(5, 4) if trans_b else normal(4, 5), **batchnorm(5)}
    inputs = ["x", "w"]
    if c_shape is not None:
        constants["c"] = normal(*c_shape, seed=3) if c_shape else np.float32(0.7).reshape(())
        inputs.append("c")
    nodes = [
        node("Gemm", inputs, ["g"], "fc", transA=trans_a, transB=trans_b, alpha=0.5, beta=2.0),
        node("BatchNormalization", ["g", *BN], ["y"]),
    ]
    graph = canonised(model(nodes, {"x": (4, 3) if trans_a else (3, 4)}, ["y"], constants))
    assert ops(graph) == {"Gemm": 1}


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15, 17, 20])
def test_every_opset_of_batchnorm_merges(opset):
    nodes = [node("Conv", ["x", "w"], ["c"]), node("BatchNormalization", ["c", *BN], ["y"])]
    constants = {"w": normal(3, 2, 1, 1), **batchnorm(3)}
    assert ops(canonised(model(nodes, {"x": (1, 2, 4, 4)}, ["y"], constants, opset=opset))) == {"Conv": 1}


CONVS = {
    "valid": {},
    "padded": {"pads": [1, 1, 1, 1]},
    "strided": {"pads": [1, 1, 1, 1], "strides": [2, 2]},
    "uneven pads": {"pads": [0, 2, 1, 0], "strides": [2, 1]},
    "dilated": {"pads": [2, 2, 2, 2], "dilations": [2, 2]},
    "grouped": {"pads": [1, 1, 1, 1], "group": 2},
    "depthwise": {"pads": [1, 1, 1, 1], "group": 4},
    "same upper": {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    "same lower": {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
    "auto valid": {"auto_pad": "VALID"},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CONVS)
def test_batchnorm_merges_into_the_conv_after_it_exactly_at_the_borders(name, bias):
    attributes = CONVS[name]
    constants = {"w": normal(8, 4 // attributes.get("group", 1), 3, 3), "b": normal(8, seed=4), **batchnorm(4)}
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("BatchNormalization", ["r", *BN], ["n"]),
        node("Conv", ["n", "w", "b"] if bias else ["n", "w"], ["y"], "conv", **attributes),
    ]
    graph = canonised(model(nodes, {"x": ("batch", 4, 8, 7)}, ["y"], constants), sizes={"batch": 2})
    padded = name not in ("valid", "auto valid")
    assert ops(graph) == ({"Relu": 1, "Conv": 1, "Add": 1} if padded else {"Relu": 1, "Conv": 1})
    if padded:
        conv, add = graph.nodes[1:]
        assert (conv.name, len(conv.inputs)) == ("conv", 2)
        assert add.inputs[1].values.shape == (1, *add.outputs[0].shape[1:])


def test_a_bias_map_is_right_in_one_and_three_dimensions():
    for rank in (1, 3):
        nodes = [
            node("Relu", ["x"], ["r"]),
            node("BatchNormalization", ["r", *BN], ["n"]),
            node("Conv", ["n", "w"], ["y"], pads=[1] * 2 * rank),
        ]
        constants = {"w": normal(3, 4, *[3] * rank), **batchnorm(4)}
        graph = canonised(model(nodes, {"x": (1, 4, *[5, 4, 3][:rank])}, ["y"], constants))
        assert ops(graph) == {"Relu": 1, "Conv": 1, "Add": 1}


def test_without_a_static_size_a_map_stays_before_a_padded_conv():
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("BatchNormalization", ["r", *BN], ["n"]),
        node("Conv", ["n", "w"], ["y"], pads=[1, 1, 1, 1]),
    ]
    proto = model(nodes, {"x": (1, 4, "h", "w")}, ["y"], {"w": normal(3, 4, 3, 3), **batchnorm(4)})
    assert ops(canonised(proto, sizes={"h": 5, "w": 6}))["BatchNormalization"] == 1
    assert "BatchNormalization" not in ops(canonised(proto, sizes={"h": 5, "w": 6}, shapes={"x": (1, 4, 5, 6)}))


@pytest.mark.parametrize(("op", "trans_b"), [("Gemm", 0), ("Gemm", 1), ("MatMul", 0)])
def test_batchnorm_merges_into_the_matrix_product_after_it(op, trans_b):
    attributes = {"transB": trans_b, "alpha": 0.5, "beta": 3.0} if op == "Gemm" else {}
    inputs = ["n", "w", "b"] if op == "Gemm" else ["n", "w"]
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("BatchNormalization", ["r", *BN], ["n"]),
        node(op, inputs, ["y"], "fc", **attributes),
    ]
    constants = {"w": normal(5, 4) if trans_b else normal(4, 5), "b": normal(5), **batchnorm(4)}
    graph = canonised(model(nodes, {"x": (3, 4)}, ["y"], constants))
    assert ops(graph) == {"Relu": 1, "Gemm": 1}
    assert graph.nodes[1].name == "fc"


def test_a_transposed_conv_takes_a_scale_before_it_but_no_shift():
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Mul", ["r", "s"], ["m"]),
        node("ConvTranspose", ["m", "w"], ["y"], group=2),
    ]
    constants = {"s": normal(4, 1, 1), "w": normal(4, 3, 2, 2)}
    assert ops(canonised(model(nodes, {"x": (1, 4, 5, 5)}, ["y"], constants))) == {"Relu": 1, "ConvTranspose": 1}
    nodes[1] = node("Add", ["r", "s"], ["m"])
    assert ops(canonised(model(nodes, {"x": (1, 4, 5, 5)}, ["y"], constants)))["Add"] == 1


def test_chains_are_composed_before_they_merge():
    constants = {
        "w": normal(3, 2, 3, 3),
        "a": normal(3, 1, 1, seed=2),
        "b": normal(1, 3, 1, 1, seed=3),
        "c": np.float32([2.5]),
        "d": np.float32(0.3).reshape(()),
        **batchnorm(3),
        **batchnorm(3, "bn2", seed=5),
    }
    nodes = [
        node("Conv", ["x", "w"], ["c0"], "conv"),
        node("BatchNormalization", ["c0", *BN], ["c1"]),
        node("BatchNormalization", ["c1", "bn2.gamma", "bn2.beta", "bn2.mean", "bn2.var"], ["c2"]),
        node("Mul", ["a", "c2"], ["c3"]),
        node("Add", ["c3", "b"], ["c4"]),
        node("Div", ["c4", "c"], ["c5"]),
        node("Sub", ["d", "c5"], ["c6"]),
        node("Sub", ["c6", "a"], ["y"]),
    ]
    graph = canonised(model(nodes, {"x": (2, 2, 6, 6)}, ["y"], constants))
    assert [n.name for n in graph.nodes] == ["conv"]


def test_a_constant_divided_by_the_tensor_is_no_affine_map():
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Div", ["k", "c"], ["y"])]
    constants = {"w": np.abs(normal(3, 2, 1, 1)), "k": normal(3, 1, 1)}
    assert ops(canonised(model(nodes, {"x": (1, 2, 4, 4)}, ["y"], constants)))["Div"] == 1


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 5, 1), (3, 5, 4), (1, 3, 5, 4), (2, 3, 1, 1), (3, 1, 1, 1)], ids=str)
def test_a_constant_that_is_not_per_channel_stays(shape):
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Add", ["c", "k"], ["y"])]
    proto = model(nodes, {"x": (1, 2, 5, 4)}, ["y"], {"w": normal(3, 2, 1, 1), "k": normal(*shape)})
    assert ops(canonised(proto)) == {"Conv": 1, "Add": 1}


def test_a_constant_that_widens_one_channel_to_many_stays():
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Add", ["c", "k"], ["y"])]
    proto = model(nodes, {"x": (1, 2, 5, 4)}, ["y"], {"w": normal(1, 2, 1, 1), "k": normal(3, 1, 1)})
    assert ops(canonised(proto)) == {"Conv": 1, "Add": 1}


@pytest.mark.parametrize("shape", [(5,), (1, 5), (), (1,)], ids=str)
def test_a_matrix_product_and_its_bias_become_a_gemm_with_the_names_of_both(shape):
    nodes = [node("MatMul", ["x", "w"], ["m"], "dense/MatMul"), node("Add", ["b", "m"], ["logits"], "dense/BiasAdd")]
    bias = normal(*shape) if shape else np.float32(0.5).reshape(())
    graph = canonised(model(nodes, {"x": (3, 4)}, ["logits"], {"w": normal(4, 5), "b": bias}))
    (gemm,) = graph.nodes
    assert (gemm.op, gemm.name, gemm.outputs[0].name) == ("Gemm", "dense/MatMul", "logits")


def test_a_matrix_product_of_tokens_keeps_its_bias_apart():
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["y"])]
    proto = model(nodes, {"x": (2, 3, 4)}, ["y"], {"w": normal(4, 3), "b": normal(3)})
    assert ops(canonised(proto)) == {"MatMul": 1, "Add": 1}


def test_batchnorm_with_a_second_reader_of_its_input_stays():
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("BatchNormalization", ["c", *BN], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("Add", ["r", "c"], ["y"]),
    ]
    proto = model(nodes, {"x": (1, 2, 4, 4)}, ["y"], {"w": normal(3, 2, 1, 1), **batchnorm(3)})
    assert ops(canonised(proto)) == {"Conv": 1, "BatchNormalization": 1, "Relu": 1, "Add": 1}


def test_batchnorm_between_other_operators_stays():
    nodes = [
        node("Concat", ["x", "x"], ["c"], axis=1),
        node("BatchNormalization", ["c", *BN], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("Conv", ["r", "w"], ["y"]),
    ]
    proto = model(nodes, {"x": (1, 2, 4, 4)}, ["y"], {"w": normal(3, 4, 1, 1), **batchnorm(4)})
    assert ops(canonised(proto)) == {"Concat": 1, "BatchNormalization": 1, "Relu": 1, "Conv": 1}


def test_shared_weights_are_copied_and_never_changed():
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], "left"),
        node("BatchNormalization", ["c", *BN], ["l"]),
        node("Conv", ["x", "w", "b"], ["r"], "right"),
        node("Add", ["l", "r"], ["y"]),
    ]
    constants = {"w": normal(3, 2, 1, 1), "b": normal(3), **batchnorm(3)}
    graph = canonised(model(nodes, {"x": (1, 2, 4, 4)}, ["y"], constants))
    left, right = (n for n in graph.nodes if n.op == "Conv")
    assert right.inputs[1].name == "w"
    np.testing.assert_array_equal(right.inputs[1].values, constants["w"])
    assert left.inputs[1].name != "w"


def test_a_kept_tensor_is_not_merged_away():
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("BatchNormalization", ["c", *BN], ["n"]),
        node("Mul", ["n", "s"], ["m"]),
        node("Conv", ["m", "v"], ["y"], pads=[1, 1, 1, 1]),
    ]
    constants = {"w": normal(3, 2, 1, 1), "s": normal(3, 1, 1), "v": normal(2, 3, 3, 3), **batchnorm(3)}
    proto = model(nodes, {"x": (1, 2, 4, 4)}, ["y"], constants)
    assert ops(canonised(proto)) == {"Conv": 2}
    assert ops(canonised(proto, keep=["c"])) == {"Conv": 2, "Add": 1}  # both maps go into the padded Conv after them
    assert ops(canonised(proto, keep=["n"])) == {"Conv": 2}
    assert ops(canonised(proto, keep=["m"])) == {"Conv": 2}
    assert ops(canonised(proto, keep=["c", "n", "m"])) == {"Conv": 2, "BatchNormalization": 1, "Mul": 1}


def test_on_request_affine_maps_stay_and_everything_else_is_done():
    nodes = [
        node("Identity", ["w"], ["wi"]),
        node("Conv", ["x", "wi"], ["c"]),
        node("BatchNormalization", ["c", *BN], ["y"]),
    ]
    proto = model(nodes, {"x": (1, 2, 4, 4)}, ["y"], {"w": normal(3, 2, 1, 1), **batchnorm(3)})
    assert ops(canonised(proto, fold_batchnorm=False)) == {"Conv": 1, "BatchNormalization": 1}


def hard_swish(x: str, y: str) -> list[onnx.NodeProto]:
    return [
        node("Add", [x, "three"], ["shifted"], "shift"),
        node("Clip", ["shifted", "zero", "six"], ["clipped"]),
        node("Mul", [x, "clipped"], ["product"]),
        node("Div", ["product", "six"], [y], "divide"),
    ]


def test_the_constants_of_an_activation_stay_in_its_formula():
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        *hard_swish("c", "a"),
        node("Conv", ["a", "v"], ["y"]),
    ]
    scalars = {"zero": 0, "three": 3, "six": 6}
    constants = {name: np.float32(value).reshape(()) for name, value in scalars.items()}
    constants |= {"w": normal(3, 2, 1, 1), "v": normal(2, 3, 1, 1)}
    graph = canonised(model(nodes, {"x": (1, 2, 4, 4)}, ["y"], constants))
    assert ops(graph) == {"Conv": 2, "Add": 1, "Clip": 1, "Mul": 1, "Div": 1}


def test_numbers_between_operators_that_are_not_linear_stay():
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Mul", ["r", "k"], ["m"]),
        node("Add", ["m", "k"], ["a"]),
        node("Sigmoid", ["a"], ["y"]),
    ]
    proto = model(nodes, {"x": (1, 2, 4, 4)}, ["y"], {"k": np.float32([0.5])})
    assert ops(canonised(proto)) == {"Relu": 1, "Mul": 1, "Add": 1, "Sigmoid": 1}


def test_the_normalisation_of_the_input_merges_into_the_first_conv():
    nodes = [
        node("Div", ["x", "k"], ["u"]),
        node("Sub", ["u", "mean"], ["s"]),
        node("Div", ["s", "std"], ["n"]),
        node("Conv", ["n", "w", "b"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2]),
    ]
    constants = {
        "k": np.float32([255]),
        "mean": normal(1, 3, 1, 1),
        "std": np.abs(normal(1, 3, 1, 1, seed=2)) + 0.1,
        "w": normal(4, 3, 3, 3),
        "b": normal(4),
    }
    assert ops(canonised(model(nodes, {"x": (2, 3, 8, 8)}, ["y"], constants))) == {"Conv": 1, "Add": 1}


def test_a_scale_that_overflows_float16_stays():
    nodes = [node("Conv", ["h", "w"], ["c"]), node("Mul", ["c", "s"], ["d"]), node("Cast", ["d"], ["y"], to=1)]
    nodes.insert(0, node("Cast", ["x"], ["h"], to=10))
    constants = {"w": np.full((2, 2, 1, 1), 1e-3, np.float16), "s": np.full((2, 1, 1), 6e4, np.float16)}
    proto = model(nodes, {"x": (1, 2, 3, 3)}, ["y"], constants)
    assert "Mul" not in ops(canonised(proto, tolerance=5e-3))  # float16 has 11 bits, and the two roundings differ
    constants["w"] = np.full((2, 2, 1, 1), 2, np.float16)
    with np.errstate(over="ignore"):
        assert ops(canonised(model(nodes, {"x": (1, 2, 3, 3)}, ["y"], constants), tolerance=np.inf))["Mul"]


def test_a_division_by_zero_stays():
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Div", ["c", "s"], ["d"]), node("Clip", ["d", "", "m"], ["y"])]
    constants = {"w": normal(2, 2, 1, 1), "s": np.float32([[[0]], [[1]]]), "m": np.float32(-1).reshape(())}
    assert ops(canonise(model(nodes, {"x": (1, 2, 3, 3)}, ["y"], constants)))["Div"] == 1


def test_a_weight_that_is_also_an_output_keeps_its_values():
    nodes = [node("Conv", ["x", "w"], ["c"]), node("BatchNormalization", ["c", *BN], ["y"])]
    proto = model(nodes, {"x": (1, 2, 4, 4)}, ["y", "w"], {"w": normal(3, 2, 1, 1), **batchnorm(3)})
    assert ops(canonised(proto)) == {"Conv": 1}
