"""Ops that pick entries by value or by index (spec 3.6, 3.7).

Oracle: <y, u> = <x, back(u)> with y from ONNX Runtime, to 1e-10: entries are picked, not computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxcam.errors import ModelError
from tests.operators.single_node import Single, build, check_moves, cotangents, runtime
from tests.operators.test_linear import normal

X = np.round(8 * normal(3, 4, 5))  # so that float32 sums are exact
PLACES = np.array([[0, 1, 2, -1], [2, 2, 0, 1]], np.int64)
UPDATES = np.round(8 * normal(2, 4))

CASES: list[tuple[str, list[Any], dict[str, Any]]] = [
    ("Where", [normal(3, 4, 1) > 0, X, normal(4, 5)], {}),
    ("Where", [np.array(True), normal(1), X], {}),
    ("Max", [X, normal(4, 5), normal(1)], {}),
    ("Min", [X, normal(3, 1, 5)], {}),
    ("Trilu", [X], {}),
    ("Trilu", [X, np.array(-1)], {"upper": 0}),
    ("Trilu", [X, np.array(2)], {"upper": 1}),
    ("GatherElements", [X, np.array([[[0, -1, 1, 1, 2]]])], {"axis": 0}),
    ("GatherElements", [X, np.random.default_rng(0).integers(-5, 5, (3, 4, 7))], {"axis": -1}),
    ("GatherND", [X, np.array([[0, 1], [2, -1], [0, 1]])], {}),
    ("GatherND", [X, np.array([[1], [0], [-1]])], {"batch_dims": 1}),
    ("GatherND", [X, np.array([[[0, 1, 4]], [[2, 2, 2]]])], {}),
    ("Compress", [X, np.array([True, False, True])], {"axis": 1}),
    ("Compress", [X, np.array([False, True, True, True])], {}),
    ("ReverseSequence", [X, np.array([1, 3, 2, 2])], {}),
    ("ReverseSequence", [X, np.array([1, 4, 3])], {"time_axis": 1, "batch_axis": 0}),
    ("ScatterElements", [normal(3, 4), PLACES, UPDATES], {"axis": 0}),
    ("ScatterElements", [X[0, :3, :4], PLACES, UPDATES], {"axis": 0, "reduction": "add"}),
    ("ScatterElements", [normal(2, 4), np.array([[0, 2], [3, 1]]), normal(2, 2)], {"axis": -1}),
    ("ScatterND", [X, np.array([[0, 1], [2, -1]]), normal(2, 5)], {}),
    ("ScatterND", [X, np.array([[0], [0]]), X[1:]], {"reduction": "add"}),
]


@pytest.mark.parametrize("op, inputs, attributes", CASES)
def test_relevance_goes_to_what_was_picked(op: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
    """With indices computed in the graph, and with constant ones."""
    whole = [i for i, a in enumerate(inputs) if a.dtype.kind != "f"]
    for constants in ((), whole):
        check_moves(*build(op, inputs, constants, **attributes))


@pytest.mark.parametrize("opset", [9, 11])
def test_scatter_is_scatter_elements_of_old(opset: int) -> None:
    check_moves(*build("Scatter" if opset == 9 else "ScatterElements", [normal(3, 4), PLACES, UPDATES], opset=opset))


@pytest.mark.parametrize("op", ["ScatterElements", "ScatterND"])
def test_a_scatter_that_multiplies_is_refused_by_name(op: str) -> None:
    model, feeds = build(op, [X, np.array([[0]]), normal(1, 4, 5)], reduction="mul")
    with pytest.raises(ModelError, match=f"node '{op.lower()}'.*reduction 'mul'.*onnxcam layers"):
        Single(model, feeds, [X])


@pytest.mark.parametrize("axis, largest", [(-1, 1), (0, 0), (1, 1)])
def test_top_k_hands_its_values_back_to_where_its_indices_point(axis: int, largest: int) -> None:
    model, feeds = build("TopK", [X, np.array([2])], (1,), outputs=2, axis=axis, largest=largest)
    check_moves(model, feeds)


def test_equal_operands_of_a_maximum_share_evenly() -> None:
    model, feeds = build("Max", [np.array([1.0, 2.0]), np.array([1.0, 0.0])])
    back = Single(model, feeds, runtime(model, feeds)).back({"o0": np.array([[4.0, 6.0]])})
    assert {name: r.tolist() for name, r in back.items()} == {"i0": [[2, 6]], "i1": [[2, 0]]}


def test_a_constant_operand_of_where_or_a_maximum_gets_nothing() -> None:
    x = normal(3, 4, 5)
    for op, inputs in (("Max", [x, np.float32(0)]), ("Where", [x > 0, x, np.float32(0)])):
        model, feeds = build(op, inputs, (0, 2) if op == "Where" else (1,))
        back = Single(model, feeds, runtime(model, feeds)).back({"o0": cotangents(x.shape)})
        assert set(back) == {"i1" if op == "Where" else "i0"}
        assert np.array_equal(*back.values(), np.where(x > 0, cotangents(x.shape), 0))
