"""Normalisations: a BatchNormalization that could not be folded, those by statistics of the input itself, and Softmax.

Relevance passes them unchanged: a statistic decides the scale of what is seen, not what is seen (spec 3.3).
"""

from __future__ import annotations

import numpy as np

from onnxcam.graph import Node
from onnxcam.operators.kinds import Array, At, Coupled, Elementwise, Operator
from onnxcam.operators.registry import need_constant, operator, refusal


@operator("BatchNormalization")
def batch_normalization(node: Node) -> Operator:
    """Inference form: a fixed scale gamma / sqrt(var + epsilon) per channel."""
    epsilon = node.attr("epsilon", 1e-5)
    if node.attr("training_mode", 0):
        raise refusal(node, "BatchNormalization in training mode; export the model for inference")
    need_constant(node, 1, "scale")

    def scale(at: At) -> Array:
        factor = at.input(1) / at.ops.sqrt(at.input(4) + epsilon)
        # Before opset 9, spatial=0 keeps statistics of every cell.
        return factor if factor.ndim > 1 else at.ops.shaped(factor, (-1, *(1,) * (len(at.shape(0)) - 2)))

    return Elementwise(scale, kind="normalisation")


def _columns(at: At, i: int) -> Array:
    """Input `i`, (C,), shaped so that it broadcasts against (N, C, *spatial)."""
    return at.ops.shaped(at.input(i), (-1, *(1,) * (len(at.shape(0)) - 2)))


def _by_statistics(at: At, x: Array, g: Array, axes: tuple[int, ...], epsilon: float, centred: bool = True) -> Array:
    """Product of `g` with the Jacobian of (x - mean) / sqrt(var + epsilon) over `axes`: s (g - <g> - x' <g x'>).

    Without `centred` the mean counts as zero.
    """
    ops = at.ops
    if centred:
        x = x - ops.mean(x, axes, keepdims=True)
        g = g - ops.mean(g, axes, keepdims=True)
    s = 1 / ops.sqrt(ops.mean(x * x, axes, keepdims=True) + epsilon)
    x = x * s
    return s * (g - x * ops.mean(g * x, axes, keepdims=True))


@operator("LayerNormalization", "RMSNormalization")
def layer_normalization(node: Node) -> Operator:
    """Over all axes from `axis` on; RMSNormalization leaves the mean in."""
    need_constant(node, 1, "scale")
    epsilon, axis = node.attr("epsilon", 1e-5), node.attr("axis", -1)

    def product(at: At, r: Array) -> Array:
        rank = len(at.shape(0))
        axes = tuple(range(axis if axis < 0 else axis - rank, 0))
        return _by_statistics(at, at.input(0), r * at.input(1), axes, epsilon, node.op_type == "LayerNormalization")

    return Coupled("normalisation", product)


@operator("InstanceNormalization")
def instance_normalization(node: Node) -> Operator:
    need_constant(node, 1, "scale")
    epsilon = node.attr("epsilon", 1e-5)

    def product(at: At, r: Array) -> Array:
        return _by_statistics(at, at.input(0), r * _columns(at, 1), tuple(range(2 - len(at.shape(0)), 0)), epsilon)

    return Coupled("normalisation", product)


@operator("GroupNormalization")
def group_normalization(node: Node) -> Operator:
    """The scale is one number per group before opset 21, per channel after."""
    need_constant(node, 1, "scale")
    epsilon, groups = node.attr("epsilon", 1e-5), node.attr("num_groups")

    def product(at: At, r: Array) -> Array:
        ops, shape = at.ops, at.shape(0)
        grouped = (shape[0], groups, shape[1] // groups, *shape[2:])
        if node.opset >= 21:
            r = r * _columns(at, 1)
        g = ops.reshape(r, grouped)
        if node.opset < 21:
            g = g * ops.shaped(at.input(1), (-1, *(1,) * (len(grouped) - 2)))
        axes = tuple(range(2 - len(grouped), 0))
        return ops.reshape(_by_statistics(at, ops.shaped(at.input(0), grouped), g, axes, epsilon), shape)

    return Coupled("normalisation", product)


@operator("LpNormalization")
def lp_normalization(node: Node) -> Operator:
    """x / |x|_p along one axis; nothing comes from where the norm is zero."""
    p, axis = node.attr("p", 2), node.attr("axis", -1)

    def product(at: At, r: Array) -> Array:
        ops, x, y = at.ops, at.input(0), at.output(0)
        along = (axis if axis < 0 else axis - len(at.shape(0)),)
        size = ops.sum(ops.abs(x) if p == 1 else x * x, along, keepdims=True)
        size = size if p == 1 else ops.sqrt(size)
        slope = ops.sign(x) if p == 1 else y
        alive = size > 0
        return ops.where(alive, (r - slope * ops.sum(r * y, along, keepdims=True)) / ops.where(alive, size, 1.0), 0.0)

    return Coupled("normalisation", product)


@operator("LRN")
def lrn(node: Node) -> Operator:
    """y = x d^-beta with d = bias + alpha/size * sum of squares over a window of channels (spec 3.3)."""
    size, alpha, beta, bias = (
        node.attr("size"),
        node.attr("alpha", 1e-4),
        node.attr("beta", 0.75),
        node.attr("bias", 1.0),
    )

    def band(at: At) -> Array:
        """(C, C): which channels j the sum of squares of channel i runs over."""
        c = np.arange(at.shape(0)[1])
        distance = c[None, :] - c[:, None]
        return at.ops.asarray((distance >= -((size - 1) // 2)) & (distance <= size - 1 - (size - 1) // 2))

    def product(at: At, r: Array) -> Array:
        ops, x, channels, axis = at.ops, at.input(0), band(at), 1 - len(at.shape(0))
        d = bias + alpha / size * ops.along(x * x, channels, axis)
        inner = r * x * ops.power(d, -beta - 1)
        return r * ops.power(d, -beta) - 2 * alpha * beta / size * x * ops.along(inner, ops.swap(channels), axis)

    return Coupled("normalisation", product)


def _softmax_axes(node: Node, rank: int) -> tuple[int, ...]:
    """Axes that one softmax runs over: from opset 13 a single one, before it `axis` and all behind it."""
    if node.opset >= 13:
        axis = node.attr("axis", -1)
        return (axis if axis < 0 else axis - rank,)
    axis = node.attr("axis", 1)
    return tuple(range((axis if axis < 0 else axis - rank), 0))


@operator("Softmax")
def softmax(node: Node) -> Operator:
    def product(at: At, r: Array) -> Array:
        y, axes = at.output(0), _softmax_axes(node, len(at.shape(0)))
        return y * (r - at.ops.sum(r * y, axes, keepdims=True))

    return Coupled("softmax", product)


@operator("LogSoftmax")
def log_softmax(node: Node) -> Operator:
    def product(at: At, r: Array) -> Array:
        return r - at.ops.exp(at.output(0)) * at.ops.sum(r, _softmax_axes(node, len(at.shape(0))), keepdims=True)

    return Coupled("softmax", product)
