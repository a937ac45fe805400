"""Ops that work point by point, and ops that move, copy, pick or join entries."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcam.graph import Node
from onnxcam.positions.coordinates import (
    Coordinate,
    Outcome,
    Placed,
    along,
    lean,
    merged,
    raised,
    regrouped,
    replaced,
    resampled,
    same,
)

if TYPE_CHECKING:
    from onnxcam.positions.tracking import Positions


def same_place(p: Positions, node: Node) -> Outcome | None:
    """Each entry from the one at its place in the first input."""
    x = p.of(node)
    return None if x is None else Outcome(x, tuple(((0, i),) for i in range(len(x.fields))))


def pointwise(p: Positions, node: Node) -> Outcome | None:
    """Each entry from those at its place in all inputs, which broadcast."""
    operands = [(i, x) for i in range(len(node.inputs)) if (x := p.of(node, i)) is not None]
    rank = max(len(p.graph.shape(name) or ()) for name in node.inputs)
    known = p.graph.shape(node.outputs[0])
    if not operands or known is None or len(known) != rank:
        return None
    numbers = tuple(n if isinstance(n, int) else None for n in known)

    def make() -> Outcome | None:
        shapes = [(1,) * (rank - len(x.shape)) + x.shape for _, x in operands]
        try:
            broad = np.broadcast_shapes(*shapes)
        except ValueError:
            return None
        shape = tuple(n if n is not None and m == 1 else m for n, m in zip(numbers, broad, strict=True))
        if len({x for _, x in operands}) == 1 and shape == operands[0][1].shape:
            x = operands[0][1]
            return Outcome(x, tuple(tuple((k, i) for k, _ in operands) for i in range(len(x.fields))))
        fields, sources = [], []
        for i in range(max(len(x.fields) for _, x in operands)):
            having = [(k, x) for k, x in operands if len(x.fields) > i]
            fields.append(merged([raised(x.fields[i], rank) for _, x in having]))
            sources.append(tuple((k, i) for k, _ in having))
        return Outcome(Placed(shape, tuple(fields)), tuple(sources))

    found: Outcome | None = p.once(("pointwise", numbers, *((i, x) for i, x in operands)), make)
    return found


def reshape(p: Positions, node: Node) -> Outcome | None:
    x = p.of(node)
    if x is None or (shape := p.sizes(node.outputs[0], prod(x.shape))) is None:
        return None
    return p.moved(node, (shape,), shape, lambda a: regrouped(a, x.shape, shape))


def transpose(p: Positions, node: Node) -> Outcome | None:
    x = p.of(node)
    if x is None:
        return None
    perm = tuple(int(i) for i in node.attr("perm") or range(len(x.shape))[::-1])
    return p.moved(node, perm, [x.shape[i] for i in perm], lambda a: np.transpose(a, perm))


def ints(node: Node, i: int, name: str, since: int) -> list[int] | None:
    """An input that was an attribute before opset `since`; None where it is left out."""
    value = node.attr(name) if node.opset < since else node.constant(i)
    return None if value is None else [int(v) for v in np.ravel(value)]


def slice_(p: Positions, node: Node) -> Outcome | None:
    x = p.of(node)
    starts, ends = ints(node, 1, "starts", 10), ints(node, 2, "ends", 10)
    axes, steps = ints(node, 3, "axes", 10), ints(node, 4, "steps", 10)
    unknown = node.opset >= 10 and any(node.has(i) and not node.is_constant(i) for i in (3, 4))
    if x is None or starts is None or ends is None or unknown:
        return None
    cuts = tuple(zip(axes or range(len(starts)), starts, ends, steps or [1] * len(starts), strict=True))
    picked = {axis % len(x.shape): slice(start, end, step) for axis, start, end, step in cuts}
    shape = [len(range(n)[picked.get(i, slice(None))]) for i, n in enumerate(x.shape)]
    return p.moved(node, cuts, shape, lambda a: _picked(a, picked)) if 0 not in shape else None


def _picked(a: Coordinate, picked: Mapping[int, Any]) -> Coordinate:
    for axis, which in picked.items():
        if a.shape[axis] > 1:
            index = [slice(None)] * a.ndim
            index[axis] = which
            a = lean(a[tuple(index)], [axis])
    return a


def split(p: Positions, node: Node) -> list[Outcome | None]:
    x = p.of(node)
    if x is None:
        return []
    axis = int(node.attr("axis", 0)) % len(x.shape)
    sizes = ints(node, 1, "split", 13)
    if sizes is None:
        part = -(-x.shape[axis] // len(node.outputs))
        sizes = [min(part, x.shape[axis] - i * part) for i in range(len(node.outputs))]
    found, start = [], 0
    for size in sizes:
        picked = {axis: slice(start, start + size)}
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        found.append(p.moved(node, (axis, start, size), shape, lambda a, w=picked: _picked(a, w)))  # type: ignore[misc]
        start += size
    return found


def gather(p: Positions, node: Node) -> Outcome | None:
    x, index = p.of(node), node.constant(1)
    if x is None or index is None:
        return None
    axis = int(node.attr("axis", 0)) % len(x.shape)
    shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])

    def move(a: Coordinate) -> Coordinate:
        if a.shape[axis] == 1:
            return a.reshape(*a.shape[:axis], *(1,) * index.ndim, *a.shape[axis + 1 :])
        return lean(a.take(index.astype(np.int64), axis))

    return p.moved(node, (axis, index.shape, index.tobytes()), shape, move)


def concat(p: Positions, node: Node) -> Outcome | None:
    """Joined along channels, what has no position of its own shares that of the rest; along tokens it has none."""
    operands = [p.of(node, i) for i in range(len(node.inputs))]
    there = [(i, x) for i, x in enumerate(operands) if x is not None]
    rank = len(there[0][1].shape)
    axis = int(node.attr("axis", 1)) % rank
    lengths = [
        (p.graph.shape(name) or (None,) * rank)[axis] if x is None else x.shape[axis]
        for name, x in zip(node.inputs, operands, strict=True)
    ]
    total = (p.graph.shape(node.outputs[0]) or (None,) * rank)[axis]
    unknown = [i for i, n in enumerate(lengths) if not isinstance(n, int)]
    if len(unknown) == 1 and isinstance(total, int):
        lengths[unknown[0]] = total - sum(n for n in lengths if isinstance(n, int))
    sizes = [n for n in lengths if isinstance(n, int)]
    if len(sizes) < len(lengths) or any(len(x.fields) > 1 for _, x in there):
        return None

    def make() -> Outcome:
        field = []
        for c, arrays in enumerate(zip(*(x.fields[0] for _, x in there), strict=True)):
            given = dict(zip((i for i, _ in there), arrays, strict=True))
            first = arrays[0]
            if all(a.shape[axis] == 1 and same(a, first) for a in arrays):
                field.append(first)
                continue
            side = np.broadcast_shapes(*(replaced(a.shape, axis, 1) for a in arrays))
            blank = np.nan if c else 0.0
            parts = [
                np.broadcast_to(given.get(i, np.full(along(rank, -1), blank)), replaced(side, axis, n))
                for i, n in enumerate(sizes)
            ]
            field.append(lean(np.concatenate(parts, axis)))
        shape = replaced(there[0][1].shape, axis, sum(sizes))
        return Outcome(Placed(shape, (tuple(field),)), (tuple((i, 0) for i, _ in there),))

    found: Outcome = p.once(("concat", axis, tuple(sizes), *there), make)
    return found


def pad(p: Positions, node: Node) -> Outcome | None:
    """Padding lies where the picture would go on, if it did."""
    x, pads = p.of(node), ints(node, 1, "pads", 11)
    if x is None or pads is None or (node.has(3) and not node.is_constant(3)):
        return None
    rank = len(x.shape)
    axes = [int(i) % rank for i in np.ravel(node.constant(3))] if node.has(3) else list(range(rank))  # type: ignore[arg-type]
    shape, field = list(x.shape), list(x.fields)
    for k, axis in enumerate(axes):
        before, after = pads[k], pads[k + len(axes)]
        if before or after:
            shape[axis] += before + after
            moved = [resampled(f, axis, shape[axis], 1, -before) for f in field]
            if any(f is None for f in moved):
                return None
            field = [f for f in moved if f is not None]
    made = Outcome(Placed(tuple(shape), tuple(field)), tuple(((0, i),) for i in range(len(field))))
    found: Outcome = p.once(("pad", x, tuple(pads), tuple(axes)), lambda: made)
    return found


def expand(p: Positions, node: Node) -> Outcome | None:
    x, known = p.of(node), p.graph.shape(node.outputs[0])
    if x is None or known is None or len(known) < len(x.shape):
        return None
    before = (1,) * (len(known) - len(x.shape)) + x.shape
    shape = tuple(n if isinstance(n, int) else m for n, m in zip(known, before, strict=True))
    return p.moved(node, shape, shape, lambda a: raised((a,), len(shape))[0])


def tile(p: Positions, node: Node) -> Outcome | None:
    x, repeats = p.of(node), node.constant(1)
    if x is None or repeats is None:
        return None
    times = tuple(int(n) for n in repeats)

    def move(a: Coordinate) -> Coordinate:
        return np.tile(a, [n if m > 1 else 1 for n, m in zip(times, a.shape, strict=True)])

    return p.moved(node, times, [n * m for n, m in zip(times, x.shape, strict=True)], move)
