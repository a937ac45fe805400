"""Products that sum over axes, attention as one op, and recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxcam.graph import Node
from onnxcam.positions.coordinates import Field, Outcome, Placed, Source, blurred, mean, merged

if TYPE_CHECKING:
    from onnxcam.positions.tracking import Positions


def _contracted(
    p: Positions, operands: Sequence[tuple[int, Placed | None, str, bool]], out: str, shape: Sequence[int]
) -> Outcome | None:
    """A sum of products over the axes that are not in `out`.

    Along an axis that is summed a constant mixes some channels, whose positions are averaged; another tensor that was
    seen mixes whatever it likes, and a field that varies there is gone. Two tensors with positions along axes of their
    own give a matrix of pairs.

    Args:
        operands: number among the node's inputs, positions, a letter for each axis, and whether it is constant.
    """

    def make() -> Outcome | None:
        kept: list[tuple[Source, Field, set[str]]] = []
        for i, x, letters, _ in operands:
            others = all(constant for k, _, _, constant in operands if k != i)
            for f, field in enumerate(x.fields if x else ()):
                moved = _laid_out(field, letters, out, others)
                if moved is not None and not blurred(moved):
                    varies = {c for a in moved[1:] for c, n in zip(out, a.shape, strict=True) if n > 1}
                    kept.append(((i, f), moved, varies))
        groups: list[list[tuple[Source, Field, set[str]]]] = []
        for one in kept:
            for group in groups:
                if group[0][0][0] != one[0][0] and (group[0][2] <= one[2] or one[2] <= group[0][2]):
                    group.append(one)
                    break
            else:
                groups.append([one])
        if not groups or len(groups) > 2:
            return None
        fields = tuple(merged([field for _, field, _ in group]) for group in groups)
        return Outcome(Placed(tuple(shape), fields), tuple(tuple(s for s, _, _ in group) for group in groups))

    key = ("contracted", out, tuple(shape), *((i, x, letters, constant) for i, x, letters, constant in operands))
    found: Outcome | None = p.once(key, make)
    return found


def _laid_out(field: Field, letters: str, out: str, averaged: bool) -> Field | None:
    """A field with its axes named `letters` as one with axes `out`; None where it varies along what is summed up."""
    made = []
    for a in field:
        for axis, c in enumerate(letters):
            if c not in out and a.shape[axis] > 1:
                if not averaged:
                    return None
                a = mean(a, axis)
        sizes = dict(zip(letters, a.shape, strict=True))
        order = sorted((axis for axis, c in enumerate(letters) if c in out), key=lambda axis: out.index(letters[axis]))
        rest = [axis for axis, c in enumerate(letters) if c not in out]
        made.append(np.transpose(a, [*order, *rest]).reshape([sizes.get(c, 1) for c in out]))
    return tuple(made)


def matmul(p: Positions, node: Node) -> Outcome | None:
    second = 3 if node.op_type == "QLinearMatMul" else 1
    turned = (bool(node.attr("transA", 0)), bool(node.attr("transB", 0)))
    if node.op_type == "MatMulNBits":
        x, known = p.of(node), p.graph.shape(node.outputs[0])
        if x is None or known is None or not isinstance(known[-1], int):
            return None
        lead = "".join(chr(97 + i) for i in range(len(x.shape) - 1))
        return _contracted(p, [(0, x, lead + "y", False)], lead + "z", (*x.shape[:-1], known[-1]))
    ranks = [len(p.graph.shape(node.inputs[i]) or ()) for i in (0, second)]
    if min(ranks) < 2:
        return None
    lead = "".join(chr(97 + i) for i in range(max(ranks) - 2))
    letters = [
        lead[len(lead) - rank + 2 :] + (pair[::-1] if flip else pair)
        for rank, pair, flip in zip(ranks, ("xy", "yz"), turned, strict=True)
    ]
    places = [p.of(node, i) for i in (0, second)]
    known = p.graph.shape(node.outputs[0])
    if known is None or len(known) != len(lead) + 2:
        return None
    sizes: dict[str, int] = {}
    for x, named in zip(places, letters, strict=True):
        for c, n in zip(named, x.shape if x else (), strict=False):
            sizes[c] = max(n, sizes.get(c, 1))
    shape = [n if isinstance(n, int) else sizes.get(c) for c, n in zip(lead + "xz", known, strict=True)]
    if any(n is None for n in shape):
        return None
    operands = [
        (i, x, named, x is None and node.is_constant(i))
        for i, x, named in zip((0, second), places, letters, strict=True)
    ]
    return _contracted(p, operands, lead + "xz", [int(n) for n in shape if n is not None])


def einsum(p: Positions, node: Node) -> Outcome | None:
    equation = str(node.attr("equation", "")).replace(" ", "")
    given, arrow, out = equation.partition("->")
    letters = given.split(",")
    known = p.graph.shape(node.outputs[0])
    plain = arrow and "." not in equation and all(len(set(named)) == len(named) for named in letters)
    if not plain or known is None:
        return None
    operands = [
        (i, p.of(node, i), named, p.of(node, i) is None and node.is_constant(i)) for i, named in enumerate(letters)
    ]
    sizes = {c: n for _, x, named, _ in operands if x for c, n in zip(named, x.shape, strict=True)}
    shape = [n if isinstance(n, int) else sizes.get(c) for c, n in zip(out, known, strict=True)]
    return _contracted(p, operands, out, [int(n) for n in shape if n is not None]) if None not in shape else None


def attention(p: Positions, node: Node) -> Outcome | None:
    """One op for all of attention: what comes out lies where the queries do. The keys may be of the same input."""
    x, known = p.of(node), p.graph.shape(node.outputs[0])
    if x is None or known is None or len(known) != len(x.shape) or not isinstance(known[-1], int):
        return None
    found = p.moved(node, (known[-1],), (*x.shape[:-1], known[-1]), lambda a: mean(a, a.ndim - 1))
    return found and Outcome(found.placed, found.sources, frozenset({0}))


def recurrent(p: Positions, node: Node) -> Outcome | None:
    """(L, N, C) to (L, directions, N, hidden): every step sees others as well."""
    x, known = p.of(node), p.graph.shape(node.outputs[0])
    if (
        x is None
        or known is None
        or node.attr("layout", 0)
        or any(not isinstance(n, int) for n in (known[1], known[3]))
    ):
        return None
    shape = (x.shape[0], int(known[1]), x.shape[1], int(known[3]))  # type: ignore[arg-type]
    found = p.moved(node, shape, shape, lambda a: np.expand_dims(mean(a, 2), 1))
    return found and Outcome(found.placed, found.sources, frozenset({0}))
