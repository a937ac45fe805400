"""Forms that exporters other than PyTorch's write, each as small as it still has what bites.

The oracle is ONNX Runtime on the file as it is (`building.canonised`). A pool over four axes, which Keras' MaxPooling2D
becomes on JAX, runs neither there nor in the reference evaluator; then it is ONNX Runtime on the same network written
with channels first.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

import onnxcam
from onnxcam.canonise import canonise
from tests.canonise.building import canonised, distance, evaluate, model, node, normal, ops

TO_FIRST, TO_LAST = {"perm": [0, 3, 1, 2]}, {"perm": [0, 2, 3, 1]}


def channels_last(pool: str = "MaxPool", **attributes: object) -> onnx.ModelProto:
    """Conv, BatchNormalization as Mul and Add, Relu, pooling, Conv, mean, dense: as Keras on JAX has it written."""
    window = {"kernel_shape": [1, 2, 2, 1], "strides": [1, 2, 2, 1], **attributes}
    nodes = [
        node("Transpose", ["x"], ["x_first"], **TO_FIRST),
        node("Conv", ["x_first", "w"], ["c_first"], "conv", pads=[1, 1, 1, 1]),
        node("Transpose", ["c_first"], ["c"], **TO_LAST),
        node("Mul", ["c", "scale"], ["scaled"]),
        node("Add", ["scaled", "shift"], ["normed"]),
        node("Relu", ["normed"], ["r"], "relu"),
        node("Unsqueeze", ["r", "zero"], ["r1"]),
        node("Unsqueeze", ["r1", "one"], ["r2"]),
        node(pool, ["r2"], ["p2"], "pool", **window),
        node("Squeeze", ["p2", "both"], ["p"]),
        node("Transpose", ["p"], ["p_first"], **TO_FIRST),
        node("Conv", ["p_first", "v"], ["d_first"], "conv2"),
        node("Transpose", ["d_first"], ["d"], **TO_LAST),
        node("ReduceMean", ["d", "axes"], ["m"], keepdims=0),
        node("MatMul", ["m", "dense"], ["y"]),
    ]
    constants = {
        "w": normal(6, 3, 3, 3, seed=1),
        "scale": normal(1, 1, 1, 6, seed=2),
        "shift": normal(6, seed=3),
        "zero": np.array([0]),
        "one": np.array([1]),
        "both": np.array([0, 1]),
        "v": normal(4, 6, 2, 2, seed=4),
        "axes": np.array([1, 2]),
        "dense": normal(4, 5, seed=5),
    }
    return model(nodes, {"x": ("N", 8, 8, 3)}, ["y"], constants, opset=18)


def channels_first(pool: str = "MaxPool", **attributes: object) -> onnx.ModelProto:
    """The same network and weights, as PyTorch would have written it."""
    known = {t.name: onnx.numpy_helper.to_array(t) for t in channels_last().graph.initializer}
    nodes = [
        node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        node("Mul", ["c", "scale"], ["scaled"]),
        node("Add", ["scaled", "shift"], ["normed"]),
        node("Relu", ["normed"], ["r"], "relu"),
        node(pool, ["r"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2], **attributes),
        node("Conv", ["p", "v"], ["d"], "conv2"),
        node("ReduceMean", ["d", "axes"], ["m"], keepdims=0),
        node("MatMul", ["m", "dense"], ["y"]),
    ]
    constants = {name: known[name] for name in ("w", "v", "dense")}
    constants |= {"scale": known["scale"].reshape(6, 1, 1), "shift": known["shift"].reshape(6, 1, 1)}
    constants |= {"axes": np.array([2, 3])}
    return model(nodes, {"x": ("N", 3, 8, 8)}, ["y"], constants, opset=18)


@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool"])
def test_a_pool_over_images_and_channels_is_one_over_each_channel(pool):
    graph = canonise(channels_last(pool))
    (pooling,) = [n for n in graph.nodes if n.name == "pool"]
    assert pooling.attrs["kernel_shape"] == [2, 2] and pooling.attrs["strides"] == [2, 2]
    assert list(pooling.inputs[0].shape) == ["N", 6, 8, 8]
    x = normal(2, 8, 8, 3, seed=9)
    (expected,) = evaluate(channels_first(pool), {"x": x.transpose(0, 3, 1, 2)})
    (got,) = evaluate(gs.export_onnx(graph), {"x": x})
    assert distance(got, expected) <= 1e-5


def test_a_pool_of_signals_with_channels_last():
    """One axis to pool over: ONNX Runtime runs that, with images as the first of three."""
    nodes = [
        node("Unsqueeze", ["x", "both"], ["x2"]),
        node("MaxPool", ["x2"], ["p2"], "pool", kernel_shape=[1, 3, 1], strides=[1, 2, 1], pads=[0, 1, 0, 0, 1, 0]),
        node("Squeeze", ["p2", "both"], ["y"]),
    ]
    graph = canonised(model(nodes, {"x": ("N", 9, 4)}, ["y"], {"both": np.array([0, 1])}), sizes={"N": 3}, tolerance=0)
    assert ops(graph) == {"Transpose": 2, "MaxPool": 1}
    (pool,) = [n for n in graph.nodes if n.op == "MaxPool"]
    assert pool.attrs["pads"] == [1, 1]


def test_a_pool_with_something_between_it_and_its_added_axes():
    """Quantising puts QuantizeLinear and DequantizeLinear there, ONNX Runtime's optimiser Transposes."""
    nodes = [
        node("Unsqueeze", ["x", "both"], ["x2"]),
        node("Transpose", ["x2"], ["t2"], perm=[0, 1, 2, 4, 3]),
        node("AveragePool", ["t2"], ["p2"], "pool", kernel_shape=[1, 1, 3], strides=[1, 1, 2]),
        node("Squeeze", ["p2", "both"], ["p"]),
        node("Relu", ["p"], ["y"]),
    ]
    graph = canonised(model(nodes, {"x": ("N", 9, 4)}, ["y"], {"both": np.array([0, 1])}), sizes={"N": 3})
    (pool,) = [n for n in graph.nodes if n.op == "AveragePool"]
    assert pool.attrs["kernel_shape"] == [3] and list(pool.inputs[0].shape) == ["N", 4, 9]


def test_a_pool_across_images_stays():
    """Neighbouring images compared: no channel-wise pool, so it is left as it is."""
    nodes = [
        node("Unsqueeze", ["x", "both"], ["x2"]),
        node("MaxPool", ["x2"], ["p2"], "pool", kernel_shape=[2, 3, 1]),
        node("Squeeze", ["p2", "both"], ["y"]),
    ]
    graph = canonised(model(nodes, {"x": (3, 9, 4)}, ["y"], {"both": np.array([0, 1])}), tolerance=0)
    assert ops(graph) == {"Unsqueeze": 1, "MaxPool": 1, "Squeeze": 1}


def test_batchnorm_behind_a_transpose_merges_into_the_conv():
    nodes = [n for n in channels_last().graph.node if n.op_type not in ("Unsqueeze", "Squeeze", "MaxPool")]
    for n in nodes:
        n.input[:] = ["r" if name == "p" else name for name in n.input]
    proto = channels_last()
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    graph = canonised(proto, sizes={"N": 2})
    assert "Mul" not in ops(graph) and "Add" not in ops(graph)
    (conv,) = [n for n in graph.nodes if n.name == "conv"]
    assert len(conv.inputs) == 3
    assert conv.outputs[0].shape[1] == 6


def test_a_tensor_that_is_kept_stops_the_merging_there():
    graph = canonise(channels_last(), keep=frozenset({"c"}))
    assert ops(graph)["Mul"] == 1
    x = normal(2, 8, 8, 3, seed=9)
    (expected,) = evaluate(channels_first(), {"x": x.transpose(0, 3, 1, 2)}, ["c"])
    (got,) = evaluate(gs.export_onnx(graph), {"x": x}, ["c"])
    assert distance(got, expected.transpose(0, 2, 3, 1)) <= 1e-5


def test_scaling_the_picture_before_the_transpose_merges_into_the_first_conv():
    """Keras' Rescaling and Normalization layers work on channels last."""
    nodes = [
        node("Mul", ["x", "one_over"], ["unit"]),
        node("Sub", ["unit", "mean"], ["centred"]),
        node("Div", ["centred", "deviation"], ["scaled"]),
        node("Transpose", ["scaled"], ["first"], **TO_FIRST),
        node("Conv", ["first", "w"], ["y"], "conv"),
    ]
    constants = {
        "one_over": np.float32(1 / 127.5),
        "mean": normal(3, seed=1),
        "deviation": np.abs(normal(1, 1, 1, 3, seed=2)) + 0.5,
        "w": normal(4, 3, 3, 3, seed=3),
    }
    graph = canonised(model(nodes, {"x": ("N", 8, 8, 3)}, ["y"], constants), sizes={"N": 2})
    assert ops(graph) == {"Transpose": 1, "Conv": 1}


def test_a_map_between_two_convs_goes_to_one_of_them_and_the_passes_end():
    """Both could take it, and each swap would undo the other: the one before has the first call."""
    nodes = [
        node("Conv", ["x", "w"], ["c"], "conv"),
        node("Transpose", ["c"], ["last"], **TO_LAST),
        node("Mul", ["last", "scale"], ["m"]),
        node("Add", ["m", "shift"], ["a"]),
        node("Transpose", ["a"], ["first"], **TO_FIRST),
        node("Conv", ["first", "v"], ["y"], "conv2"),
    ]
    constants = {"w": normal(5, 3, 2, 2), "scale": normal(5), "shift": normal(5, seed=2), "v": normal(4, 5, 2, 2)}
    graph = canonised(model(nodes, {"x": ("N", 3, 6, 6)}, ["y"], constants), sizes={"N": 2})
    assert ops(graph) == {"Conv": 2}
    assert [len(n.inputs) for n in graph.nodes] == [3, 2]


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool"])
def test_maps_with_channels_last_are_those_with_channels_first(engine, pool):
    """The same network in both layouts: the rules see the same linear maps. Float32, sums of a few hundred terms."""
    x = normal(2, 8, 8, 3, seed=11)
    last, first = onnxcam.load(channels_last(pool)), onnxcam.load(channels_first(pool))
    for layers, method in ((["relu"], "relevance-cam"), (["pool"], "relevance-cam"), (["input"], "lrp")):
        a = last.explain(x, layers, [1, 3], method=method, engine=engine)
        b = first.explain(np.ascontiguousarray(x.transpose(0, 3, 1, 2)), layers, [1, 3], method=method, engine=engine)
        (have,), (want,) = a.maps.values(), b.maps.values()
        assert distance(have, want) <= 2e-5, layers


# -- Paddle --------------------------------------------------------------------------------------------------------


def test_the_target_of_paddles_expand_is_known_but_for_the_batch():
    """`token.expand([n, -1, -1])` is written as an Expand to the larger of the token's shape and the target."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "zero", "one"], ["n"]),
        node("Concat", ["n", "minus", "minus"], ["target"], axis=0),
        node("Max", ["own", "target"], ["larger"]),
        node("Expand", ["token", "larger"], ["tokens"]),
        node("Concat", ["tokens", "x"], ["y"], axis=1),
    ]
    constants = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "minus": np.array([-1]),
        "own": np.array([1, 1, 4]),
        "token": normal(1, 1, 4),
    }
    graph = canonised(model(nodes, {"x": ("N", 6, 4)}, ["y"], constants), sizes={"N": 3}, tolerance=0)
    assert "Max" not in ops(graph)
    assert list(graph.outputs[0].shape)[1:] == [7, 4]


def resized(opset: int = 17) -> onnx.ModelProto:
    """Pooled, and resized to sizes that are read off the batch: Paddle's and TensorFlow's upsampling."""
    nodes = [
        node("Conv", ["x", "w"], ["c"], "conv"),
        node("Shape", ["c"], ["s"]),
        node("Slice", ["s", "zero", "two"], ["nc"]),
        node("Concat", ["nc", "size"], ["sizes"], axis=0),
        node(
            "Resize",
            ["c", "", "", "sizes"],
            ["r"],
            "resize",
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        ),
        node("GlobalAveragePool", ["r"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("MatMul", ["f", "v"], ["y"]),
    ]
    constants = {
        "w": normal(4, 3, 3, 3),
        "zero": np.array([0]),
        "two": np.array([2]),
        "size": np.array([7, 11]),
        "v": normal(4, 3),
    }
    return model(nodes, {"x": ("N", 3, 6, 6)}, ["y"], constants, opset=opset)


def test_resizing_to_sizes_read_off_an_open_batch_is_explained_on_both_engines():
    """Oracle for the gradient: the network is linear, so it is a difference of logits."""
    loaded, x = onnxcam.load(resized()), normal(1, 3, 6, 6, seed=3)
    options = {"method": "lrp", "composite": "gradient", "start": "one-hot"}
    maps = [loaded.explain(x, ["input"], [1], engine=e, **options).maps["input"][0, 0] for e in ("numpy", "onnx")]
    assert distance(maps[1], maps[0]) <= 1e-5
    bumped = x.copy()
    bumped[0, :, 2, 4] += 1
    (before,), (after,) = (evaluate(resized(), {"x": value}) for value in (x, bumped))
    assert abs(maps[0][2, 4] - (after - before)[0, 1]) <= 1e-5


# -- inputs --------------------------------------------------------------------------------------------------------


def test_a_film_with_channels_last_has_maps_of_three_axes():
    """(N, frames, H, W, 2) may as well be 12 channels: the convolution tells."""
    nodes = [
        node("Transpose", ["x"], ["first"], perm=[0, 4, 1, 2, 3]),
        node("Conv", ["first", "w"], ["c"], "conv"),
        node("Relu", ["c"], ["r"], "relu"),
        node("GlobalAveragePool", ["r"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("MatMul", ["f", "v"], ["y"]),
    ]
    constants = {"w": normal(4, 2, 3, 3, 3), "v": normal(4, 3)}
    loaded = onnxcam.load(model(nodes, {"x": ("N", 6, 8, 7, 2)}, ["y"], constants))
    assert [row.spatial for row in loaded.layers()] == [(4, 6, 5)]
    assert loaded.explain(normal(1, 6, 8, 7, 2), "relu", [0]).maps["relu"].shape == (1, 1, 4, 6, 5)


def test_an_input_that_holds_for_all_pictures_is_no_picture():
    """tf2onnx makes inputs of what Keras computed beforehand: the mean of a Normalization, a table of positions."""
    nodes = [
        node("Sub", ["x", "mean"], ["centred"]),
        node("Transpose", ["centred"], ["first"], **TO_FIRST),
        node("Conv", ["first", "w"], ["c"], "conv"),
        node("Relu", ["c"], ["r"], "relu"),
        node("GlobalAveragePool", ["r"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("MatMul", ["f", "v"], ["y"]),
    ]
    constants = {"w": normal(4, 3, 3, 3), "v": normal(4, 5)}
    inputs = {"x": ("N", 8, 8, 3), "mean": (1, 1, 1, 3), "unused": (1, 16, 4)}
    loaded = onnxcam.load(model(nodes, inputs, ["y"], constants))
    assert [(row.node, row.spatial) for row in loaded.layers()] == [("conv", (6, 6))]


def test_a_kept_tensor_between_two_transposes_is_still_on_the_way():
    nodes = [
        node("Conv", ["x", "w"], ["c"], "conv"),
        node("Transpose", ["c"], ["last"], **TO_LAST),
        node("Transpose", ["last"], ["first"], **TO_FIRST),
        node("Relu", ["first"], ["y"]),
    ]
    proto = model(nodes, {"x": (1, 3, 6, 6)}, ["y"], {"w": normal(4, 3, 3, 3)})
    assert ops(canonised(proto)) == {"Conv": 1, "Relu": 1}
    kept = canonised(proto, keep=["last"])
    (relu,) = [n for n in kept.nodes if n.op == "Relu"]
    assert relu.inputs[0].inputs[0].inputs[0].name == "last"
