"""What can be recorded and what cannot: a refusal names the node, or the tensor, and the way out.

Oracle for what can: the array engine in float64, 1e-12.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from walking import RecordedWalk, Walker, as_written, network, relative

from onnxcam.composites import COMPOSITES
from onnxcam.errors import ModelError

GRADIENT = COMPOSITES["gradient"]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def compare(text: str, composite: Any = GRADIENT, shape: tuple[int, ...] = (2, 4, 5, 6), **weights: Any) -> None:
    """One target and three, from y to x, on both engines; the file's batch is symbolic."""
    graph, x = as_written(network(text, **weights)), draw(*shape)
    walker = Walker(graph, ["x"], "y")
    values = walker.forward({"x": x})
    for targets in (1, 3):
        start = np.random.default_rng(1).standard_normal((targets, *values["y"].shape))
        want = walker.back(values, start, composite)["x"]
        got = RecordedWalk(graph, {"y": start.shape}, ["x"], composite)(values, {"y": start}).relevance["x"]
        assert relative(got, want) <= 1e-12


@pytest.mark.parametrize("part", ["a", "b", "c"])
def test_a_split_of_which_one_part_is_used_is_recorded_for_any_batch(part: str) -> None:
    compare(
        f"(float[N,4,5,6] x) => (float y) {{ a, b, c = Split<axis=1>(x, s) y = Relu({part}) }}", s=np.int64([1, 2, 1])
    )


def test_a_slice_that_takes_the_batch_whole_is_recorded_for_any_batch() -> None:
    """Older exporters write `x[:, 1:]` as two Slices, the first over the batch, which does nothing."""
    compare(
        "(float[N,4,5,6] x) => (float y) { h = Slice(x, zero, far, zero) y = Slice(h, one, far, one) }",
        zero=np.int64([0]), one=np.int64([1]), far=np.int64([2**63 - 1]),
    )  # fmt: skip


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_product_of_two_matrices_is_no_dense_layer(name: str) -> None:
    """Composites with a rule for MatMul mean the one by a weight."""
    compare(
        "(float[N,3,5] x) => (float y) { t = Transpose<perm=[0,2,1]>(x) y = MatMul(x, t) }",
        COMPOSITES[name].with_box(np.array(-5.0), np.array(5.0)),
        (2, 3, 5),
    )


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bounds computed in the graph": (
        "a = ReduceMax<keepdims=0>(x) s = Cast<to=7>(a) t = Reshape(s, one) y = Slice(x, zero, t, one)",
        {"zero": np.int64([0]), "one": np.int64([1])},
        "shape of tensor 'y' of node 'y' .Slice",
    ),
    "picking along the batch": ("y = Gather<axis=0>(x, i)", {"i": np.int64([0])}, "node 'y' .Gather.*how many images"),
    "a sum over the batch": ("y = ReduceSum<keepdims=1>(x, a)", {"a": np.int64([0])}, "node 'y' .ReduceSum.*batch"),
    "a join along the batch": ("y = Concat<axis=0>(x, x)", {}, "node 'y' .Concat.*how many images"),
    "part of a batch": (
        "y = Slice(x, one, far, zero)",
        {"zero": np.int64([0]), "one": np.int64([1]), "far": np.int64([9])},
        "node 'y' .Slice.*how many images",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_recorded_is_refused_with_its_name_and_the_way_out(what: str) -> None:
    body, weights, pattern = REFUSED[what]
    graph = as_written(network(f"(float[N,4,5,6] x) => (float y) {{ {body} }}", **weights))
    with pytest.raises(ModelError, match=pattern) as error:
        RecordedWalk(graph, {"y": (1, 1, 4, 5, 6)}, ["x"], GRADIENT)
    assert "--engine numpy" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pool_whose_shape_onnx_gets_wrong_is_refused_and_not_explained_wrongly() -> None:
    """With ceil_mode, ONNX infers a column that nobody computes, up to opset 21."""
    body = "y = MaxPool<kernel_shape=[2,2], strides=[2,2], pads=[0,0,0,1], ceil_mode=1>(x)"
    for opset in (17, 22):
        graph = as_written(network(f"(float[N,4,4,4] x) => (float y) {{ {body} }}", opset))
        if opset == 22:
            assert RecordedWalk(graph, {"y": (1, 1, 4, 2, 2)}, ["x"], GRADIENT).found == ["x"]
        else:
            with pytest.raises(ModelError, match=r"node 'y'.*\(2, 3\).*\(2, 2\).*--engine numpy"):
                RecordedWalk(graph, {"y": (1, 1, 4, 2, 3)}, ["x"], GRADIENT)
