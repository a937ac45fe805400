"""Pooling: averages share out in proportion, maxima route to the winner, p-norms share by |x|^p (spec 3.5)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from onnxcam.engines.window import Window, resolve_conv
from onnxcam.errors import ModelError
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


def _geometry(node: Node, at: At) -> tuple[Window, tuple[int, ...]]:
    """The window, and the end pads as the file states them.

    Raises:
        ModelError: the shape that was inferred is not what is computed, so that nothing can be recorded on it.
    """
    window, stated = pool_window(node, at.shape(0)[2:])
    said, real = tuple(at.output_shape()[2:]), window.output(at.shape(0)[2:])
    if said != real:
        raise ModelError(
            f"node {node.name!r}: ONNX infers an output of {said} for this {node.op_type} with ceil_mode, where {real} "
            "is computed, as before opset 22 it counts windows that start in the padding; raise the opset of the file, "
            "or use --engine numpy"
        )
    return window, stated


@operator("AveragePool")
def average_pool(node: Node) -> Operator:
    include_pad = bool(node.attr("count_include_pad", 0))

    def geometry(at: At) -> tuple[Window, tuple[int, ...], Array]:
        size = at.shape(0)[2:]
        window, stated = _geometry(node, at)
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


def norm(p: float, total: Callable[[At, Array], Array], spread: Callable[[At, Array], Array]) -> Operator:
    """(sum |x|^p)^(1/p): relevance is shared by |x|^p; gradient sign(x) |x|^(p-1) y^(1-p).

    `total` sums over what becomes one output and `spread` is its adjoint.
    """

    def amount(at: At) -> Array:
        magnitude = at.ops.abs(at.input(0))
        return magnitude if p == 1 else magnitude * magnitude if p == 2 else at.ops.power(magnitude, p)

    def gradient(at: At, r: Array) -> Array:
        ops, x, y = at.ops, at.input(0), at.output(0)
        if p == 1:
            return ops.sign(x) * spread(at, r)
        alive = y > 0
        safe = ops.where(alive, y, 1.0)
        if p == 2:
            return x * spread(at, ops.where(alive, r / safe, 0.0))
        inner = spread(at, ops.where(alive, r * ops.power(safe, 1.0 - p), 0.0))
        return ops.sign(x) * ops.power(ops.abs(x), p - 1.0) * inner

    return Averaging(total, spread, amount, gradient)


@operator("LpPool")
def lp_pool(node: Node) -> Operator:
    def window(at: At) -> Window:
        return _geometry(node, at)[0]

    return norm(
        float(node.attr("p", 2)),
        lambda at, x: at.ops.window_sum(x, window(at)),
        lambda at, r: at.ops.window_sum_adjoint(r, window(at), at.shape(0)[2:]),
    )


@operator("GlobalLpPool")
def global_lp_pool(node: Node) -> Operator:
    return norm(
        float(node.attr("p", 2)),
        lambda at, x: at.ops.sum(x, tuple(range(2 - len(at.shape(0)), 0)), keepdims=True),
        lambda at, r: at.ops.expand(r, at.shape(0)),
    )


@operator("MaxPool")
def max_pool(node: Node) -> Operator:
    """The first cell in row-major order that equals the maximum takes all, as ONNX Runtime's Indices say (spec 3.5)."""

    def route(at: At, rs: Relevances) -> list[Share]:
        if rs[0] is None:
            return []
        window, _ = _geometry(node, at)
        return [(0, at.ops.window_max_adjoint(rs[0], at.input(0), at.output(0), window))]

    return Routing(route)


@operator("MaxUnpool", since=9)
def max_unpool(node: Node) -> Operator:
    """Input 1 says where in the flattened output the entries of input 0 stand; the rest of it is zero.

    Where two share a place, ONNX leaves open which one stands there: here each gets what the place gets.
    """

    def route(at: At, rs: Relevances) -> list[Share]:
        ops, shape = at.ops, at.shape(0)
        index = ops.index_shaped(at.index(1), (prod(shape),))
        flat = ops.reshape(rs[0], (prod(at.output_shape()),))
        return [(0, ops.reshape(ops.take(flat, index, -1), shape))]

    return Routing(route)


@operator("Col2Im", since=18)
def col2im(node: Node) -> Operator:
    """Columns (N, C cells, positions) added up where the window that they are the cells of stood: the adjoint of a Conv
    whose channels are the cells."""

    def window(at: At) -> Window:
        return resolve_conv(
            at.ints(1), at.ints(2), "NOTSET", node.attr("dilations"), node.attr("pads"), node.attr("strides")
        )

    def weight(at: At) -> tuple[Array, int]:
        """(C cells, 1, *block), and C."""
        block, channels = at.ints(2), at.output_shape()[1]
        cells = np.eye(prod(block)).reshape(-1, 1, *block)
        return at.ops.asarray(np.tile(cells, (channels, *(1,) * (cells.ndim - 1)))), channels

    def apply(at: At, x: Array) -> Array:
        w, channels = weight(at)
        n, rows = at.shape(0)[:2]
        x = at.ops.shaped(x, (n, rows, *window(at).output(tuple(at.ints(1)))))
        return at.ops.conv_adjoint(x, w, window(at), at.ints(1), channels)

    def adjoint(at: At, r: Array) -> Array:
        w, channels = weight(at)
        return at.ops.reshape(at.ops.conv(r, w, window(at), channels), at.shape(0))

    return Averaging(apply, adjoint)


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
