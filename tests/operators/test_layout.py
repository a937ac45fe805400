"""Ops that move, copy or cut: what ONNX Runtime moved forward, relevance moves back (spec 3.7).

Oracle: <y, u> = <x, back(u)> with y from ONNX Runtime. Entries are moved, not computed, so this holds in float64
to 1e-10.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.operators.single_node import Single, agree, build, check_moves, cotangents, runtime
from tests.operators.test_linear import normal

I = np.int64  # noqa: E741
X = normal(2, 3, 4, 5)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize(
    "pads", [(1, 2, 3, 1), (0, 2, 0, 0), (3, 0, 0, 4), (0, 0, 0, 0), (-1, 1, 0, 2), (0, -2, -1, 0), (-1, -1, -1, -1)]
)
def test_pad(mode: str, pads: tuple[int, int, int, int]) -> None:
    top, left, bottom, right = pads
    full = ints(0, 0, top, left, 0, 0, bottom, right)
    check_moves(*build("Pad", [X, full], (1,), opset=19, mode=mode))
    check_moves(*build("Pad", [X, full], (), opset=19, mode=mode))
    if min(pads) >= 0:
        check_moves(*build("Pad", [X, ints(*pads), None, ints(2, -1)], (1, 3), opset=19, mode=mode))


@pytest.mark.parametrize("opset", [2, 10])
def test_pad_with_its_pads_as_an_attribute(opset: int) -> None:
    check_moves(*build("Pad", [X], opset=opset, mode="reflect", pads=[0, 0, 1, 2, 0, 0, 2, 1]))


def test_what_lies_in_constant_padding_comes_from_nowhere() -> None:
    model, feeds = build("Pad", [X, ints(0, 0, 1, 0, 0, 0, 0, 2), np.float32(7)], (1, 2))
    u = cotangents((2, 3, 5, 7))
    assert np.array_equal(Single(model, feeds, runtime(model, feeds)).back({"o0": u})["i0"], u[..., 1:, :-2])


FAR = 2**63 - 1
SLICES: list[tuple[Any, ...]] = [
    ((1,), (3,), (2,), None),
    ((0, 1), (2, 4), (2, 3), None),
    ((-3, 0), (-1, FAR), (-2, -1), (1, 2)),
    ((3,), (0,), (2,), (-1,)),
    ((-1,), (-FAR,), (3,), (-2,)),
    ((4,), (-100,), (3,), (-1,)),
    ((0, 0, 1), (1, 2, 100), (0, 1, 3), (1, 1, 3)),
    ((-100,), (2,), (3,), (1,)),
    ((0, 0, 0, 1), (2, 3, 4, 5), None, None),
    ((2,), (2,), (3,), None),
]


@pytest.mark.parametrize("starts, ends, axes, steps", SLICES)
def test_slice(starts: Any, ends: Any, axes: Any, steps: Any) -> None:
    inputs = [X, *(None if v is None else np.array(v, I) for v in (starts, ends, axes, steps))]
    given = [i for i in range(1, 5) if inputs[i] is not None]
    check_moves(*build("Slice", inputs, given))
    check_moves(*build("Slice", inputs))
    if steps is None:
        attributes = {} if axes is None else {"axes": list(axes)}
        check_moves(*build("Slice", [X], opset=9, starts=list(starts), ends=list(ends), **attributes))


GATHERS: list[tuple[Any, int]] = [
    (1, 1),
    (-1, 3),
    ([0], 0),
    ([2, 0, 1], 1),
    ([1, 1, 1, 3], 2),
    ([-1, 0, -1], -1),
    ([[0, 1], [2, 2], [1, -1]], 1),
    ([[[0]]], 2),
    ([], 3),
]


@pytest.mark.parametrize("index, axis", GATHERS)
def test_gather(index: Any, axis: int) -> None:
    for constants in ((), (1,)):
        check_moves(*build("Gather", [X, np.array(index, I)], constants, axis=axis))
        check_moves(*build("Gather", [X, np.array(index, np.int32)], constants, axis=axis))


def test_gather_from_a_constant_hands_nothing_down() -> None:
    model, feeds = build("Gather", [X, ints(1, 0)], (0,))
    single = Single(model, feeds, runtime(model, feeds))
    assert single.back({"o0": cotangents(X.shape)}) == {}


@pytest.mark.parametrize(
    "opset, inputs, count, attributes",
    [
        (2, [X], 2, {"axis": 1, "split": [1, 2]}),
        (11, [X], 2, {"axis": 2}),
        (11, [X], 2, {"axis": -2, "split": [3, 1]}),
        (13, [X, ints(2, 3)], 2, {"axis": 3}),
        (13, [X], 2, {"axis": 0}),
        (18, [X], 3, {"axis": 1, "num_outputs": 3}),
        (18, [X], 3, {"axis": 3, "num_outputs": 3}),
        (18, [X, ints(2, 0, 3)], 3, {"axis": -1}),
    ],
)
def test_split(opset: int, inputs: list[np.ndarray], count: int, attributes: dict[str, Any]) -> None:
    """With relevance at all outputs, and at one of them only."""
    model, feeds = build("Split", inputs, range(1, len(inputs)), outputs=count, opset=opset, **attributes)
    check_moves(model, feeds, range(count))
    for i in range(count):
        check_moves(model, feeds, (i,))


def test_split_with_an_output_that_the_file_leaves_out() -> None:
    model, feeds = build("Split", [X, ints(1, 2, 2)], (1,), outputs=3, opset=18, axis=3)
    expected = runtime(model, feeds)
    model.graph.node[0].output[1] = ""
    del model.graph.output[1]
    u = [cotangents(y.shape) for y in expected]
    back = Single(model, feeds, [expected[0], expected[2]]).back({"o0": u[0], "o2": u[2]})["i0"]
    assert np.array_equal(back, np.concatenate([u[0], np.zeros_like(u[1]), u[2]], -1))


@pytest.mark.parametrize("constants", [(), (0,), (1,), (0, 2)])
@pytest.mark.parametrize("axis", [1, -1, 0])
def test_concat_also_with_constants(constants: tuple[int, ...], axis: int) -> None:
    parts = np.split(normal(4, 4, 4), [1, 3], axis)
    model, feeds = build("Concat", parts, constants, axis=axis)
    u = cotangents((4, 4, 4))
    back = Single(model, feeds, runtime(model, feeds)).back({"o0": u})
    pieces = np.split(u, [1, 3], axis if axis < 0 else axis + 1)
    assert set(back) == {f"i{i}" for i in range(3)} - {f"i{i}" for i in constants}
    assert all(np.array_equal(r, pieces[int(name[1])]) for name, r in back.items())


RESHAPES: list[tuple[str, int, list[Any], dict[str, Any]]] = [
    ("Reshape", 21, [X, ints(6, 20)], {}),
    ("Reshape", 21, [X, ints(0, -1, 5)], {}),
    ("Reshape", 21, [X, ints(-1)], {}),
    ("Reshape", 21, [normal(0, 3), ints(3, 0)], {"allowzero": 1}),
    ("Flatten", 21, [X], {}),
    ("Flatten", 21, [X], {"axis": 0}),
    ("Flatten", 21, [X], {"axis": -1}),
    ("Squeeze", 11, [normal(1, 3, 1, 5)], {"axes": [0, 2]}),
    ("Squeeze", 13, [normal(1, 3, 1, 5), ints(-2)], {}),
    ("Squeeze", 13, [normal(1, 3, 1, 5)], {}),
    ("Unsqueeze", 11, [normal(3, 5)], {"axes": [0, 3]}),
    ("Unsqueeze", 13, [normal(3, 5), ints(-1, 1)], {}),
    ("Expand", 21, [normal(3, 1, 5), ints(2, 1, 4, 1)], {}),
    ("Expand", 21, [normal(1), ints(2, 3)], {}),
    ("Expand", 21, [np.float32(2), ints(2, 3)], {}),
    ("Tile", 21, [X, ints(1, 2, 3, 1)], {}),
    ("Transpose", 21, [X], {}),
    ("Transpose", 21, [X], {"perm": [0, 2, 3, 1]}),
    ("Transpose", 21, [X], {"perm": [3, 0, 1, 2]}),
    ("Identity", 21, [X], {}),
    ("Dropout", 11, [X], {"ratio": 0.3}),
    ("Dropout", 13, [X, np.float32(0.3)], {}),
    ("Cast", 21, [X], {"to": 11}),
    ("DepthToSpace", 21, [normal(2, 12, 3, 4)], {"blocksize": 2}),
    ("DepthToSpace", 21, [normal(2, 18, 3, 4)], {"blocksize": 3, "mode": "CRD"}),
    ("DepthToSpace", 9, [normal(2, 12, 3, 4)], {"blocksize": 2}),
    ("SpaceToDepth", 21, [normal(2, 3, 4, 6)], {"blocksize": 2}),
]


@pytest.mark.parametrize("op, opset, inputs, attributes", RESHAPES)
def test_ops_that_only_rearrange(op: str, opset: int, inputs: list[Any], attributes: dict[str, Any]) -> None:
    check_moves(*build(op, inputs, range(1, len(inputs)), opset=opset, **attributes))


def test_what_a_dropout_masks_out_in_training_plays_no_part_in_inference() -> None:
    model, feeds = build("Dropout", [X], outputs=2, opset=13)
    u = cotangents(X.shape)
    assert np.array_equal(Single(model, feeds, runtime(model, feeds)).back({"o0": u})["i0"], u)


@pytest.mark.parametrize("to", [1, 10, 11])
def test_a_cast_between_floats_passes_relevance_unchanged(to: int) -> None:
    model, feeds = build("Cast", [X], to=to)
    u = cotangents(X.shape)
    agree(Single(model, feeds, runtime(model, feeds)).back({"o0": u}, "relevance_cam")["i0"], u, 1e-15)


def test_a_cast_to_integers_stops_relevance() -> None:
    model, feeds = build("Cast", [X], to=7)
    model.graph.output[0].type.tensor_type.elem_type = 7
    assert Single(model, feeds, runtime(model, feeds)).back({"o0": cotangents(X.shape)}) == {}
