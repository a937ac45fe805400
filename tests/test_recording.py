"""What can be recorded and what cannot: a refusal names the node, or the tensor, and the way out.

Oracle for what can: the array engine in float64, 1e-12.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from walking import RecordedWalk, Walker, as_written, network, relative

from onnxcam.composites import COMPOSITES
from onnxcam.errors import ModelError
from onnxcam.rules import Epsilon, Proportional

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


# -- quotients in fewer steps, where the graph tells that relevance vanishes with what it is divided by --------------

EPSILON = replace(
    COMPOSITES["epsilon_plus"],
    rules={
        **COMPOSITES["epsilon_plus"].rules,
        "linear": Epsilon(0.5),
        "averaging": Epsilon(0.5),
        "additive": Proportional(0.5),
    },
    by_op={},
)
SIGNED = "h = Conv<pads=[1,1,1,1]>(x, w) "
BEHIND = {
    "a rectifier": (SIGNED + "a = Relu(h) y = Conv(a, v)", False),
    "a rectifier with a ceiling": (SIGNED + "a = Clip(h, zero, one) y = Conv(a, v)", False),
    "a sum and a rectifier": (SIGNED + "s = Add(h, x) a = Relu(s) y = Conv(a, v)", False),
    "nothing": (SIGNED + "y = Conv(h, v)", False),
    "a rectifier that somebody else sees past": (
        SIGNED + "a = Relu(h) k = Conv(a, v) l = Conv(h, v) y = Add(k, l)",
        True,
    ),
    "a ceiling alone": (SIGNED + "a = Clip(h, low, one) y = Conv(a, v)", True),
    "a leaking rectifier": (SIGNED + "a = LeakyRelu(h) y = Conv(a, v)", True),
}


@pytest.mark.parametrize("what", BEHIND)
@pytest.mark.parametrize("targets", [1, 3])
def test_a_stabilised_quotient_behind(what: str, targets: int) -> None:
    """An eps of the size of the values, and sums that are exactly 0, so that a wrong short cut shows; and it is taken
    where it may be: no sign is computed."""
    body, general = BEHIND[what]
    rng = np.random.default_rng(3)
    weights = {"w": rng.integers(-1, 2, (4, 4, 3, 3)), "v": rng.integers(-2, 3, (2, 4, 1, 1))}
    graph = as_written(
        network(
            f"(float[N,4,5,6] x) => (float y) {{ {body} }}",
            **{name: w.astype(np.float32) for name, w in weights.items()},
            zero=np.float32(0),
            one=np.float32(1),
            low=np.float32(-1),
        )
    )
    x = rng.integers(-1, 2, (2, 4, 5, 6)).astype(np.float32)
    walker = Walker(graph, ["x"], "y")
    values = walker.forward({"x": x})
    assert (values["h"] == 0).mean() > 0.05
    start = rng.standard_normal((targets, *values["y"].shape))
    want = walker.back(values, start, EPSILON)["x"]
    recorded = RecordedWalk(graph, {"y": start.shape}, ["x"], EPSILON)
    assert relative(recorded(values, {"y": start}).relevance["x"], want) <= 1e-12
    signs = [n for n in recorded.proto.graph.node if n.op_type == "Clip" and n.name.startswith("onnxcam/")]
    # The quotient at the output always needs the sign.
    assert (len(signs) > 1) == general
