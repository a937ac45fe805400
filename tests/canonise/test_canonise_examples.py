"""Shapes that inference loses behind computed sizes are learned from two batches.

Oracle: the array engine, which takes shapes from values: with the shapes learned, recording gives the same.
"""

from __future__ import annotations

import numpy as np
import pytest
from walking import RecordedWalk, Walker, canonised, network, relative

from onnxcam.composites import COMPOSITES
from onnxcam.graph import Graph

# Windows of 2 x 2 cut out of a picture and put together again, their number counted and divided as exporters do.
WINDOWS = """(float[N,3,4,4] x) => (float[M,K] y) {
    a = Reshape(x, cut)
    b = Transpose<perm=[0,2,4,1,3,5]>(a)
    windows = Reshape(b, flat)
    h = Relu(windows)
    s = Shape(h)
    zero = Constant<value_int=0>()
    n = Gather(s, zero)
    per = Constant<value_int=4>()
    batch = Div(n, per)
    axis = Constant<value_ints=[0]>()
    first = Unsqueeze(batch, axis)
    rest = Constant<value_ints=[2,2,3,2,2]>()
    target = Concat<axis=0>(first, rest)
    c = Reshape(h, target)
    d = Transpose<perm=[0,3,1,4,2,5]>(c)
    tail = Constant<value_ints=[-1,48]>()
    e = Reshape(d, tail)
    y = MatMul(e, w)
}"""


def graph_of() -> Graph:
    return canonised(
        network(
            WINDOWS,
            w=np.random.default_rng(0).standard_normal((48, 5)).astype(np.float32),
            cut=np.array([-1, 3, 2, 2, 2, 2]),
            flat=np.array([-1, 3, 2, 2]),
        )
    )


def test_all_axes_but_one_are_known() -> None:
    graph = graph_of()
    for node in graph.nodes:
        shape = graph.shape(node.outputs[0])
        assert shape is not None and sum(not isinstance(n, int) for n in shape) <= 1, node
    assert not any(node.op_type in ("Shape", "Div", "Concat") for node in graph.nodes)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_what_is_recorded_runs_at_any_batch(images: int) -> None:
    """Oracle: the array engine in float64, which knows the shapes from the values; 1e-10."""
    graph, x = graph_of(), np.random.default_rng(1).standard_normal((images, 3, 4, 4))
    walker = Walker(graph, ["x"], "y")
    values = walker.forward({"x": x})
    start = np.random.default_rng(2).standard_normal((1, images, 5))
    for name in ("gradient", "epsilon_plus"):
        want = walker.back(values, start, COMPOSITES[name])["x"]
        recorded = RecordedWalk(graph, {"y": start.shape}, ["x"], COMPOSITES[name])
        assert relative(recorded({"x": x}, {"y": start}).relevance["x"], want) <= 1e-10
