"""Transposes that follow each other become one, and none where they cancel. Oracle: ONNX Runtime, bit for bit."""

from __future__ import annotations

import pytest

from tests.canonise.building import canonised, model, node, ops

PERMS = {
    "there and back": ([0, 2, 3, 1], [0, 3, 1, 2], 0),
    "round": ([0, 2, 3, 1], [0, 2, 3, 1], 1),
    "reversed twice": (None, None, 0),
}


@pytest.mark.parametrize("case", PERMS)
def test_two_transposes_become_one_or_none(case):
    first, second, left = PERMS[case]
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Transpose", ["r"], ["a"], **({"perm": first} if first else {})),
        node("Transpose", ["a"], ["b"], **({"perm": second} if second else {})),
        node("Exp", ["b"], ["y"]),
    ]
    found = ops(canonised(model(nodes, {"x": ("N", 2, 3, 4)}, ["y"]), tolerance=0, sizes={"N": 2}))
    assert found == {"Relu": 1, "Exp": 1} | ({"Transpose": left} if left else {})


def test_what_lies_between_them_stays_where_it_is_read_or_asked_for():
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Transpose", ["r"], ["a"], perm=[0, 2, 3, 1]),
        node("Transpose", ["a"], ["b"], perm=[0, 3, 1, 2]),
        node("Exp", ["b"], ["y"]),
        node("Exp", ["a"], ["z"]),
    ]
    assert ops(canonised(model(nodes, {"x": (1, 2, 3, 4)}, ["y", "z"]), tolerance=0))["Transpose"] == 1
    kept = canonised(model(nodes[:4], {"x": (1, 2, 3, 4)}, ["y"]), tolerance=0, keep=frozenset({"a"}))
    assert "a" in kept.tensors()
