"""Reductions over axes: means and sums share out, maxima and minima route to the winner."""

from __future__ import annotations

from math import prod

from onnxcam.graph import Node
from onnxcam.operators.kinds import Array, At, Averaging, Operator, Relevances, Routing, Share
from onnxcam.operators.pooling import route_to_equal
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


def _averaging(node: Node, mean: bool) -> Operator:
    def apply(at: At, x: Array) -> Array:
        reduce = at.ops.mean if mean else at.ops.sum
        return at.ops.shaped(reduce(x, reduced_axes(node, at), keepdims=True), at.output_shape())

    def adjoint(at: At, r: Array) -> Array:
        axes = reduced_axes(node, at)
        count = prod(at.shape(0)[a] for a in axes) if mean else 1
        return at.ops.expand(at.ops.reshape(r, _kept(at, axes)) / count, at.shape(0))

    return Averaging(apply, adjoint)


@operator("ReduceMean")
def reduce_mean(node: Node) -> Operator:
    return _averaging(node, mean=True)


@operator("ReduceSum")
def reduce_sum(node: Node) -> Operator:
    return _averaging(node, mean=False)


@operator("ReduceMax", "ReduceMin")
def reduce_max(node: Node) -> Operator:
    def route(at: At, rs: Relevances) -> list[Share]:
        return [(0, route_to_equal(at, rs[0], reduced_axes(node, at)))]

    return Routing(route)
