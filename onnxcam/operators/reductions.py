"""Reductions over axes: sums and their like share in proportion, maxima and minima route to the winner (spec 3.5)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from onnxcam.graph import Node
from onnxcam.operators.kinds import Array, At, Averaging, Operator, Relevances, Routing, Share
from onnxcam.operators.pooling import norm, route_to_equal
from onnxcam.operators.registry import operator


def reduced_axes(node: Node, at: At) -> tuple[int, ...]:
    """The axes of a Reduce* node, from the end: an attribute or, in later opsets, input 1; all where none is given."""
    rank = len(at.shape(0))
    axes = node.attr("axes")
    if axes is None:
        axes = at.ints(1)
    if axes is None or len(axes) == 0:
        return () if node.attr("noop_with_empty_axes", 0) else tuple(range(-rank, 0))
    return tuple(a if a < 0 else a - rank for a in axes)


def _kept(at: At, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the input with the reduced axes kept as 1."""
    shape = at.shape(0)
    return tuple(1 if i - len(shape) in axes else n for i, n in enumerate(shape))


Map = Callable[[At, Array], Array]


def _total(node: Node) -> Map:
    """Sum over the reduced axes, in the shape of the output."""
    return lambda at, x: at.ops.shaped(at.ops.sum(x, reduced_axes(node, at), keepdims=True), at.output_shape())


def _spread(node: Node) -> Map:
    """Adjoint of `_total`: every entry of a sum gets what the sum got."""
    return lambda at, r: at.ops.expand(at.ops.reshape(r, _kept(at, reduced_axes(node, at))), at.shape(0))


def _kept_output(node: Node, at: At) -> Array:
    """The output with the reduced axes kept as 1."""
    return at.ops.shaped(at.output(0), _kept(at, reduced_axes(node, at)))


@operator("ReduceMean")
def reduce_mean(node: Node) -> Operator:
    total, spread = _total(node), _spread(node)

    def count(at: At) -> int:
        return prod(at.shape(0)[a] for a in reduced_axes(node, at))

    return Averaging(lambda at, x: total(at, x) / count(at), lambda at, r: spread(at, r / count(at)))


@operator("ReduceSum")
def reduce_sum(node: Node) -> Operator:
    return Averaging(_total(node), _spread(node))


@operator("ReduceL1")
def reduce_l1(node: Node) -> Operator:
    return norm(1.0, _total(node), _spread(node))


@operator("ReduceL2")
def reduce_l2(node: Node) -> Operator:
    return norm(2.0, _total(node), _spread(node))


@operator("ReduceSumSquare")
def reduce_sum_square(node: Node) -> Operator:
    spread = _spread(node)
    return Averaging(
        _total(node),
        spread,
        amount=lambda at: at.input(0) * at.input(0),
        gradient=lambda at, r: 2 * at.input(0) * spread(at, r),
    )


@operator("ReduceLogSum")
def reduce_log_sum(node: Node) -> Operator:
    spread = _spread(node)
    return Averaging(_total(node), spread, gradient=lambda at, r: spread(at, r * at.ops.exp(-at.output(0))))


@operator("ReduceLogSumExp")
def reduce_log_sum_exp(node: Node) -> Operator:
    """Shared by the softmax of the reduced entries, which is the gradient too."""
    spread = _spread(node)

    def softmax(at: At) -> Array:
        return at.ops.exp(at.input(0) - _kept_output(node, at))

    return Averaging(_total(node), spread, softmax, gradient=lambda at, r: softmax(at) * spread(at, r))


@operator("ReduceProd")
def reduce_prod(node: Node) -> Operator:
    """All factors share equally. The gradient is the product of the others: nonzero beside at most one zero."""
    spread = _spread(node)

    def others(at: At) -> Array:
        ops, x, axes = at.ops, at.input(0), reduced_axes(node, at)
        zero = ops.mask(x == 0)
        zeros = ops.sum(zero, axes, keepdims=True)
        nonzero = ops.where(x == 0, 1.0, x)
        return ops.mask(zeros == zero) * ops.prod(nonzero, axes) / nonzero

    return Averaging(
        _total(node),
        spread,
        amount=lambda at: at.ops.ones_like(at.input(0)),
        gradient=lambda at, r: others(at) * spread(at, r),
    )


@operator("CumSum")
def cum_sum(node: Node) -> Operator:
    """Input 1 is the axis; a triangular matrix of ones applied along it."""
    exclusive, reverse = node.attr("exclusive", 0), node.attr("reverse", 0)

    def triangle(at: At) -> tuple[int, Array]:
        (axis,) = at.ints(1) or [0]
        rank = len(at.shape(0))
        axis = axis if axis < 0 else axis - rank
        lower = np.tril(np.ones((at.shape(0)[axis],) * 2), -1 if exclusive else 0)
        return axis, at.ops.asarray(lower.T if reverse else lower)

    def apply(at: At, x: Array) -> Array:
        axis, a = triangle(at)
        return at.ops.along(x, a, axis)

    def adjoint(at: At, r: Array) -> Array:
        axis, a = triangle(at)
        return at.ops.along(r, at.ops.swap(a), axis)

    return Averaging(apply, adjoint)


@operator("ReduceMax", "ReduceMin")
def reduce_max(node: Node) -> Operator:
    def route(at: At, rs: Relevances) -> list[Share]:
        return [(0, route_to_equal(at, rs[0], reduced_axes(node, at)))]

    return Routing(route)
