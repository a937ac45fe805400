"""Ops that look through windows, and reductions: what they put out lies in the middle of what it has seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxcam.graph import Node
from onnxcam.operators.geometry import conv_transpose_window, conv_window, pool_window
from onnxcam.positions.coordinates import Coordinate, Field, Outcome, Placed, blurred, mean, resampled
from onnxcam.positions.moves import ints, same_place

if TYPE_CHECKING:
    from onnxcam.positions.tracking import Positions


def spaced(
    p: Positions, node: Node, axes: Sequence[int], cells: Sequence[tuple[int, float, float]], mixed: int | None
) -> Outcome | None:
    """Axes resampled, each to (size, scale, offset); `mixed` is the axis of channels, where these are mixed."""
    x = p.of(node)
    assert x is not None
    channels = p.graph.shape(node.outputs[0])

    def make() -> Outcome | None:
        shape = list(x.shape)
        kept: dict[int, Field] = {}
        for i, f in enumerate(x.fields):
            moved: Field | None = f if mixed is None else tuple(mean(a, mixed) for a in f)
            for axis, (size, scale, offset) in zip(axes, cells, strict=True):
                shape[axis] = size
                moved = moved and resampled(moved, axis, size, scale, offset)
            if moved is not None and not blurred(moved):
                kept[i] = moved
        if mixed is not None and channels is not None and isinstance(channels[mixed], int):
            shape[mixed] = int(channels[mixed])  # type: ignore[arg-type]
        return Outcome(Placed(tuple(shape), tuple(kept.values())), tuple(((0, i),) for i in kept)) if kept else None

    key = ("spaced", x, tuple(axes), tuple(cells), mixed, channels[mixed] if channels and mixed is not None else None)
    found: Outcome | None = p.once(key, make)
    return found


def _picture_axes(node: Node, rank: int) -> tuple[list[int], int]:
    """The spatial axes of an op of windows, and its axis of channels."""
    last = bool(node.attr("channels_last", 0)) or node.op_type.startswith("Nhwc")
    return (list(range(1, rank - 1)), rank - 1) if last else (list(range(2, rank)), 1)


def conv(p: Positions, node: Node) -> Outcome | None:
    x = p.of(node)
    weight = p.graph.shape(node.inputs[3 if node.op_type == "QLinearConv" else 1])
    if x is None or weight is None or any(not isinstance(n, int) for n in weight[2:]):
        return None
    axes, channels = _picture_axes(node, len(x.shape))
    size, kernel = [x.shape[i] for i in axes], [int(n) for n in weight[2:]]  # type: ignore[arg-type]
    if node.op_type == "ConvTranspose":
        made, known = conv_transpose_window(node, size, kernel), p.graph.shape(node.outputs[0])
        if known is None or any(not isinstance(n, int) for n in known[2:]):
            return None
        cells = [
            (int(n), 1 / s, (b - (e - 1) / 2) / s)  # type: ignore[arg-type]
            for n, s, b, e in zip(known[2:], made.strides, made.begin, made.extent, strict=True)
        ]
    else:
        window = conv_window(node, size, kernel)
        cells = [
            (n, s, (e - 1) / 2 - b)
            for n, s, b, e in zip(window.output(tuple(size)), window.strides, window.begin, window.extent, strict=True)
        ]
    return spaced(p, node, axes, cells, channels)


def pool(p: Positions, node: Node) -> Outcome | None:
    x = p.of(node)
    if x is None:
        return None
    axes, _ = _picture_axes(node, len(x.shape))
    size = [x.shape[i] for i in axes]
    window, _ = pool_window(node, size)
    cells = [
        (n, s, (e - 1) / 2 - b)
        for n, s, b, e in zip(window.output(tuple(size)), window.strides, window.begin, window.extent, strict=True)
    ]
    return spaced(p, node, axes, cells, None)


def resize(p: Positions, node: Node) -> Outcome | None:
    """Half-pixel centres, whatever the mode: how far a map is off then is less than a cell."""
    x, known = p.of(node), p.graph.shape(node.outputs[0])
    if x is None or known is None or len(known) != len(x.shape):
        return None
    sizes = [n if isinstance(n, int) else m for n, m in zip(known, x.shape, strict=True)]
    axes = [i for i, n in enumerate(sizes) if n != x.shape[i]]
    ratios = [(sizes[i], x.shape[i] / sizes[i]) for i in axes]
    return spaced(p, node, axes, [(n, scale, scale / 2 - 0.5) for n, scale in ratios], None)


def depth_to_space(p: Positions, node: Node) -> Outcome | None:
    x, b = p.of(node), int(node.attr("blocksize"))
    if x is None:
        return None
    cells = [(n * b, 1 / b, 0.5 / b - 0.5) for n in x.shape[2:]]
    return spaced(p, node, range(2, len(x.shape)), cells, 1)


def space_to_depth(p: Positions, node: Node) -> Outcome | None:
    x, b = p.of(node), int(node.attr("blocksize"))
    if x is None:
        return None
    return spaced(p, node, range(2, len(x.shape)), [(n // b, b, b / 2 - 0.5) for n in x.shape[2:]], 1)


def grid_sample(p: Positions, node: Node) -> Outcome | None:
    """What is sampled lies in a picture of its own, which the grid has warped."""
    x, known = p.of(node), p.graph.shape(node.outputs[0])
    if x is None or known is None or any(not isinstance(n, int) for n in known[2:]):
        return None
    axes = range(2, len(x.shape))
    ratios = [(int(known[i]), x.shape[i] / int(known[i])) for i in axes]  # type: ignore[arg-type]
    return spaced(p, node, axes, [(n, scale, scale / 2 - 0.5) for n, scale in ratios], None)


def reduce(p: Positions, node: Node) -> Outcome | None:
    x = p.of(node)
    if x is None or (node.has(1) and not node.is_constant(1)):
        return None
    rank = len(x.shape)
    since = 13 if node.op_type == "ReduceSum" else 18
    axes = ints(node, 1, "axes", since)
    if not axes:
        if node.attr("noop_with_empty_axes", 0):
            return same_place(p, node)
        axes = list(range(rank))
    picked = sorted(a % rank for a in axes)
    keep = bool(node.attr("keepdims", 1))
    shape = [1 if i in picked else n for i, n in enumerate(x.shape) if keep or i not in picked]

    def move(a: Coordinate) -> Coordinate:
        for axis in picked:
            a = mean(a, axis)
        return a if keep else np.squeeze(a, tuple(picked))

    return p.moved(node, (tuple(picked), keep), shape, move)


def global_pool(p: Positions, node: Node) -> Outcome | None:
    x = p.of(node)
    if x is None:
        return None
    axes, _ = _picture_axes(node, len(x.shape))

    def move(a: Coordinate) -> Coordinate:
        for axis in axes:
            a = mean(a, axis)
        return a

    return p.moved(node, tuple(axes), [1 if i in axes else n for i, n in enumerate(x.shape)], move)
