"""Shape arithmetic disappears as far as the sizes are known. Oracle: ONNX Runtime on the original, at two batch
sizes."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcam.canonise import canonise
from tests.canonise.building import canonised, model, node, normal, ops

INTS = {"zero": np.array(0), "axis0": np.array([0]), "minus": np.array([-1]), "one": np.array([1])}


def flatten_by_arithmetic(last: str) -> list:
    return [
        node("Relu", ["x"], ["r"]),
        node("Shape", ["r"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n", "axis0"], ["n1"]),
        node("Concat", ["n1", last], ["target"], axis=0),
        node("Reshape", ["r", "target"], ["y"]),
    ]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("last", ["minus", "rest"])
def test_a_reshape_that_keeps_the_batch_gets_a_constant_target(batch, last):
    proto = model(flatten_by_arithmetic(last), {"x": ("b", 2, 3, 4)}, ["y"], INTS | {"rest": np.array([24])})
    graph = canonised(proto, sizes={"b": batch})
    assert ops(graph) == {"Relu": 1, "Reshape": 1}
    assert list(graph.outputs[0].shape) == ["b", 24]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_paddle_style_flatten_gets_a_constant_target(batch):
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "axis0", "one"], ["n"]),
        node("Concat", ["n", "minus"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["y"]),
    ]
    graph = canonised(model(nodes, {"x": ("b", 8, 1, 1)}, ["y"], INTS), sizes={"b": batch})
    assert ops(graph) == {"Reshape": 1}


@pytest.mark.parametrize("batch", [1, 3])
def test_arithmetic_on_the_batch_stays_where_it_must(batch):
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "axis0", "one"], ["n"]),
        node("Concat", ["n", "one", "width"], ["target"], axis=0),
        node("Expand", ["token", "target"], ["tokens"]),
        node("Concat", ["tokens", "x"], ["y"], axis=1),
    ]
    constants = INTS | {"width": np.array([4]), "token": normal(1, 1, 4)}
    graph = canonised(model(nodes, {"x": ("b", 5, 4)}, ["y"], constants), sizes={"b": batch})
    assert ops(graph) == {"Shape": 1, "Slice": 1, "Concat": 2, "Expand": 1}
    fixed = canonised(
        model(nodes, {"x": ("b", 5, 4)}, ["y"], constants), sizes={"b": batch}, shapes={"x": (batch, 5, 4)}
    )
    assert ops(fixed) == {"Concat": 1}


def test_spatial_sizes_are_known_although_the_batch_is_not():
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Slice", ["s", "two", "end"], ["hw"]),
        node("Cast", ["hw"], ["f"], to=1),
        node("Mul", ["f", "scale"], ["g"]),
        node("Cast", ["g"], ["i"], to=7),
        node("Slice", ["s", "axis0", "two"], ["nc"]),
        node("Concat", ["nc", "i"], ["sizes"], axis=0),
        node("Resize", ["x", "", "", "sizes"], ["y"], mode="nearest"),
    ]
    constants = INTS | {"two": np.array([2]), "end": np.array([2**63 - 1]), "scale": np.float32([2, 2])}
    graph = canonised(model(nodes, {"x": ("b", 2, 3, 4)}, ["y"], constants), sizes={"b": 2})
    assert "Mul" not in ops(graph) and "Cast" not in ops(graph)


@pytest.mark.parametrize(("start", "end", "expected"), [(1, 3, [2, 3]), (-2, None, [3, 4]), (1, -1, [2, 3])])
def test_shape_respects_its_start_and_end(start, end, expected):
    attributes = {"start": start} | ({} if end is None else {"end": end})
    nodes = [
        node("Shape", ["x"], ["s"], **attributes),
        node("Cast", ["s"], ["f"], to=1),
        node("Relu", ["x"], ["r"]),
        node("ReduceMean", ["r"], ["m"], keepdims=0),
        node("Add", ["f", "m"], ["y"]),
    ]
    graph = canonised(model(nodes, {"x": ("b", 2, 3, 4)}, ["y"]), sizes={"b": 2})
    add = graph.nodes[-1]
    np.testing.assert_array_equal(add.inputs[0].values, expected)


def test_a_zero_in_a_target_copies_the_size():
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n", "axis0"], ["n1"]),
        node("Concat", ["n1", "axis0", "minus"], ["target"], axis=0),
        node("Reshape", ["x", "target"], ["y"]),
    ]
    graph = canonised(model(nodes, {"x": ("b", 2, 3, 4)}, ["y"], INTS), sizes={"b": 3})
    assert list(graph.outputs[0].shape) == ["b", 2, 12]


def test_a_token_expanded_to_the_batch_has_a_known_length():
    """PyTorch's `token.expand(n, -1, -1)`, older exporter: sizes that stay are written -1 and picked by Where."""
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "zero"], ["n"], axis=0),
        node("Unsqueeze", ["n", "axis0"], ["n1"]),
        node("Concat", ["n1", "minus", "minus"], ["target"], axis=0),
        node("Equal", ["target", "stay"], ["same"]),
        node("Where", ["same", "ones", "target"], ["sizes"]),
        node("Expand", ["token", "sizes"], ["tokens"]),
        node("Concat", ["tokens", "x"], ["y"], axis=1),
    ]
    more = {"token": normal(1, 1, 4), "stay": np.full(3, -1), "ones": np.ones(3, np.int64)}
    graph = canonised(model(nodes, {"x": ("b", 3, 4)}, ["y"], INTS | more), sizes={"b": 3}, tolerance=0)
    assert list(graph.tensors()["tokens"].shape) == ["b", 1, 4]
    assert list(graph.outputs[0].shape) == ["b", 4, 4]


def test_shapes_and_types_of_all_tensors_are_known_also_behind_operators_of_other_domains():
    nodes = [
        node("FusedConv", ["x", "w"], ["c"], domain="com.microsoft", activation="Relu"),
        node("Relu", ["c"], ["y"]),
    ]
    proto = model(nodes, {"x": ("b", 2, 4, 4)}, ["y"], {"w": normal(3, 2, 3, 3)}, domains=["com.microsoft"])
    graph = canonised(proto, sizes={"b": 2})
    for tensor in graph.tensors().values():
        assert list(tensor.shape)[1:], tensor
        assert np.dtype(tensor.dtype) == np.float32


def test_stale_shapes_in_the_file_are_ignored():
    nodes = [node("Relu", ["x"], ["r"]), node("Neg", ["r"], ["y"])]
    proto = model(nodes, {"x": (1, 2, 4, 4)}, ["y"])
    stale = proto.graph.value_info.add()
    stale.CopyFrom(model([], {"r": (1, 4, 4, 2)}, []).graph.input[0])
    assert list(canonise(proto).nodes[0].outputs[0].shape) == [1, 2, 4, 4]
