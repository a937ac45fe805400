"""Pooling: AveragePool and GlobalAveragePool share out, MaxPool and GlobalMaxPool route to the winner, LpPool weighs."""

from __future__ import annotations

from math import prod

import numpy as np

from onnxcam.engines.window import Window
from onnxcam.graph import Node
from onnxcam.operators.geometry import pool_window
from onnxcam.operators.kinds import Array, At, Averaging, Operator, Relevances, Routing, Share
from onnxcam.operators.registry import operator


def divisors(window: Window, stated_end: tuple[int, ...], size: tuple[int, ...], include_pad: bool) -> np.ndarray:
    """How many cells each window position averages over: those inside the input, with `include_pad` those inside the
    stated padding too. The cells that `ceil_mode` adds beyond the padding never count (spec 3.5)."""
    end = stated_end if include_pad else (0,) * len(size)
    counts = []
    for axis, n in enumerate(window.output(size)):
        starts = np.arange(n) * window.strides[axis] - window.begin[axis]
        cells = starts[:, None] + np.arange(window.kernel[axis]) * window.dilations[axis]
        low = -window.begin[axis] if include_pad else 0
        counts.append(((cells >= low) & (cells < size[axis] + end[axis])).sum(1))
    out = counts[0]
    for count in counts[1:]:
        out = out[..., None] * count
    return np.maximum(out, 1)


@operator("AveragePool")
def average_pool(node: Node) -> Operator:
    include_pad = bool(node.attr("count_include_pad", 0))

    def geometry(at: At) -> tuple[Window, tuple[int, ...], Array]:
        size = at.shape(0)[2:]
        window, stated = pool_window(node, size)
        return window, size, at.ops.asarray(divisors(window, stated, size, include_pad))

    def apply(at: At, x: Array) -> Array:
        window, _, count = geometry(at)
        return at.ops.window_sum(x, window) / count

    def adjoint(at: At, r: Array) -> Array:
        window, size, count = geometry(at)
        return at.ops.window_sum_adjoint(r / count, window, size)

    return Averaging(apply, adjoint)


@operator("GlobalAveragePool")
def global_average_pool(node: Node) -> Operator:
    def axes(at: At) -> tuple[int, ...]:
        return tuple(range(2 - len(at.shape(0)), 0))

    def adjoint(at: At, r: Array) -> Array:
        return at.ops.expand(r / prod(at.shape(0)[2:]), at.shape(0))

    return Averaging(lambda at, x: at.ops.mean(x, axes(at), keepdims=True), adjoint)


@operator("MaxPool")
def max_pool(node: Node) -> Operator:
    """The first cell in row-major order that equals the maximum takes all, as ONNX Runtime's Indices say (spec 3.5)."""

    def route(at: At, rs: Relevances) -> list[Share]:
        window, _ = pool_window(node, at.shape(0)[2:])
        return [(0, at.ops.window_max_adjoint(rs[0], at.input(0), at.output(0), window))]

    return Routing(route)


@operator("GlobalMaxPool")
def global_max_pool(node: Node) -> Operator:
    def route(at: At, rs: Relevances) -> list[Share]:
        return [(0, route_to_equal(at, rs[0], tuple(range(2 - len(at.shape(0)), 0))))]

    return Routing(route)


def route_to_equal(at: At, r: Array, axes: tuple[int, ...]) -> Array:
    """Send `r` (T, *shape with `axes` kept as 1) to the entries that equal the output; ties share equally."""
    x, ops = at.input(0), at.ops
    kept = [1 if i - len(x.shape) in axes else n for i, n in enumerate(x.shape)]
    won = ops.mask(x == ops.shaped(at.output(0), kept))
    won = won / ops.sum(won, axes, keepdims=True)
    return ops.expand(ops.reshape(r, kept), x.shape) * won
