"""Layout: ops that move, copy or select entries. Relevance moves with the data (spec 3.7)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from onnxcam.graph import Node
from onnxcam.operators.kinds import Array, At, Operator, Relevances, Routing, Share, Statistic
from onnxcam.operators.registry import operator


def _one(back: Callable[[At, Array], Array]) -> Operator:
    """A node whose first output is its first operand moved about: `back(at, r)` undoes it."""

    def route(at: At, rs: Relevances) -> list[Share]:
        return [(0, back(at, rs[0]))] if rs[0] is not None and at.carries(0) else []

    return Routing(route)


def _axis(axis: int, rank: int) -> int:
    return axis if axis < 0 else axis - rank


@operator("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: Node) -> Operator:
    return _one(lambda at, r: at.ops.reshape(r, at.shape(0)))


@operator("Identity", "Dropout")
def identity(node: Node) -> Operator:
    return _one(lambda at, r: r)


@operator("Cast", "CastLike")
def cast(node: Node) -> Operator:
    """Between float types relevance passes; a cast to integers or booleans stops it."""
    dtype = node.graph.dtype(node.outputs[0])
    return Statistic() if dtype is not None and dtype.kind in "iub" else _one(lambda at, r: r)


@operator("Transpose")
def transpose(node: Node) -> Operator:
    def back(at: At, r: Array) -> Array:
        rank = len(at.shape(0))
        perm = node.attr("perm", list(range(rank))[::-1])
        return at.ops.permute(r, [int(i) for i in np.argsort(perm)])

    return _one(back)


@operator("Expand")
def expand(node: Node) -> Operator:
    return _one(lambda at, r: at.ops.unbroadcast(r, at.shape(0)))


@operator("Concat")
def concat(node: Node) -> Operator:
    def route(at: At, rs: Relevances) -> list[Share]:
        axis = _axis(node.attr("axis", 1), len(at.shape(0)))
        shares, start = [], 0
        for i in range(len(node.inputs)):
            stop = start + at.shape(i)[axis]
            if at.carries(i):
                shares.append((i, at.ops.slice(rs[0], axis, start, stop)))
            start = stop
        return shares

    return Routing(route)


@operator("Split")
def split(node: Node) -> Operator:
    """Sizes are an attribute up to opset 12, input 1 after; without them parts are even, the last takes the rest."""

    def route(at: At, rs: Relevances) -> list[Share]:
        shape = at.shape(0)
        axis = _axis(node.attr("axis", 0), len(shape))
        sizes = at.ints(1) if node.opset >= 13 else node.attr("split")
        sizes = sizes or _even_sizes(shape[axis], len(rs))
        if all(r is not None for r in rs):
            return [(0, at.ops.concat(rs, axis))]
        starts = np.cumsum([0, *sizes])
        parts = [
            at.ops.scatter_add(r, np.arange(start, start + size), axis, shape[axis])
            for r, start, size in zip(rs, starts, sizes, strict=False)
            if r is not None
        ]
        return [(0, sum(parts[1:], parts[0]))]

    return Routing(route)


def _even_sizes(total: int, count: int) -> list[int]:
    part = -(-total // count)
    return [min(part, total - i * part) for i in range(count)]


# Exporters write at least this where an axis is taken to its end; it may be one of unknown length.
WHOLE = 2**31 - 1


@operator("Slice")
def slice_(node: Node) -> Operator:
    """Bounds are attributes up to opset 9, inputs after; any step, negative ones too."""

    def back(at: At, r: Array) -> Array:
        shape = at.shape(0)
        if node.opset >= 10:
            starts, ends, axes, steps = (at.ints(i) for i in (1, 2, 3, 4))
        else:
            starts, ends, axes, steps = node.attr("starts"), node.attr("ends"), node.attr("axes"), None
        axes = axes if axes is not None else list(range(len(starts)))
        steps = steps if steps is not None else [1] * len(starts)
        sizes = list(at.output_shape())
        for start, end, axis, step in reversed(list(zip(starts, ends, axes, steps, strict=True))):
            if start == 0 and step == 1 and end >= WHOLE:
                continue
            axis = _axis(axis, len(shape))
            index = np.array(range(shape[axis])[start:end:step], np.int64)
            sizes[axis] = shape[axis]
            r = at.ops.scatter_add(r, index, axis, shape[axis])
        return r

    return _one(back)


@operator("Gather")
def gather(node: Node) -> Operator:
    def back(at: At, r: Array) -> Array:
        shape, picked = at.shape(0), prod(at.shape(1))
        axis = _axis(node.attr("axis", 0), len(shape))
        place = axis + len(shape)
        index = at.ops.index_within(at.ops.index_shaped(at.index(1), (picked,)), shape[axis])
        r = at.ops.reshape(r, (*shape[:place], picked, *shape[place + 1 :]))
        return at.ops.scatter_add(r, index, axis, shape[axis])

    return _one(back)


@operator("Pad")
def pad(node: Node) -> Operator:
    """Each axis is an index map into the input; what lies in constant padding comes from nowhere."""
    mode = node.attr("mode", "constant")

    def back(at: At, r: Array) -> Array:
        shape = at.shape(0)
        pads = at.ints(1) if node.opset >= 11 else node.attr("pads", node.attr("paddings"))
        axes = at.ints(3) if node.opset >= 18 else None
        axes = [_axis(a, len(shape)) for a in (axes if axes is not None else range(len(shape)))]
        for k, axis in enumerate(axes):
            before, after = int(pads[k]), int(pads[k + len(axes)])
            if before or after:
                r = at.ops.scatter_add(r, pad_index(shape[axis], before, after, mode), axis, shape[axis])
        return r

    return _one(back)


def pad_index(size: int, before: int, after: int, mode: str) -> np.ndarray:
    """Which entry of an axis of `size` each entry of the padded axis comes from; -1 for a padded constant."""
    cells = np.arange(-before, size + after)
    if mode == "edge":
        return np.clip(cells, 0, size - 1)
    if mode == "wrap":
        return cells % size
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        return (size - 1) - np.abs(cells % period - (size - 1))
    return np.where((cells >= 0) & (cells < size), cells, -1)


@operator("DepthToSpace")
def depth_to_space(node: Node) -> Operator:
    """DCR: (N, b, b, C', H, W) transposed by (0, 3, 4, 1, 5, 2); CRD: (N, C', b, b, H, W) by (0, 1, 4, 2, 5, 3)."""
    b, crd = node.attr("blocksize"), node.attr("mode", "DCR") == "CRD"

    def back(at: At, r: Array) -> Array:
        n, c, h, w = at.shape(0)
        r = at.ops.reshape(r, (n, c // b**2, h, b, w, b))
        return at.ops.reshape(at.ops.permute(r, (0, 1, 3, 5, 2, 4) if crd else (0, 3, 5, 1, 2, 4)), at.shape(0))

    return _one(back)


@operator("SpaceToDepth")
def space_to_depth(node: Node) -> Operator:
    """The channels of a block come first (DCR), or last (CRD)."""
    b, crd = node.attr("blocksize"), node.attr("mode", "DCR") == "CRD"

    def back(at: At, r: Array) -> Array:
        n, c, h, w = at.shape(0)
        r = at.ops.reshape(r, (n, c, b, b, h // b, w // b) if crd else (n, b, b, c, h // b, w // b))
        return at.ops.reshape(at.ops.permute(r, (0, 1, 4, 2, 5, 3) if crd else (0, 3, 4, 1, 5, 2)), at.shape(0))

    return _one(back)


@operator("Tile")
def tile(node: Node) -> Operator:
    def back(at: At, r: Array) -> Array:
        shape, repeats = at.shape(0), at.ints(1)
        r = at.ops.reshape(r, [n for pair in zip(repeats, shape, strict=True) for n in pair])
        r = at.ops.sum(r, tuple(range(-2 * len(shape), 0, 2)))
        return r

    return _one(back)


@operator("CenterCropPad", since=18)
def center_crop_pad(node: Node) -> Operator:
    """Axes are cut, or padded with zeros, to the sizes in input 1, as much on either side as can be."""

    def back(at: At, r: Array) -> Array:
        shape = at.shape(0)
        for axis, out in zip(node.attr("axes", range(len(shape))), at.ints(1), strict=True):
            axis = _axis(axis, len(shape))
            size = shape[axis]
            if size == out:
                continue
            before = (out - size) // 2 if out > size else -((size - out) // 2)
            r = at.ops.scatter_add(r, pad_index(size, before, out - size - before, "constant"), axis, size)
        return r

    return _one(back)
