"""Normalisations: a BatchNormalization that could not be folded, those by statistics of the input itself, and Softmax.

Relevance passes them unchanged: a statistic decides the scale of what is seen, not what is seen (spec 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from onnxcam.graph import Node
from onnxcam.operators.kinds import Array, At, Coupled, Elementwise, Operator, Share
from onnxcam.operators.registry import need_constant, operator, refusal


@operator("BatchNormalization")
def batch_normalization(node: Node) -> Operator:
    """Inference form: a fixed scale gamma / sqrt(var + epsilon) per channel."""
    epsilon = node.attr("epsilon", 1e-5)
    if node.attr("training_mode", 0):
        raise refusal(node, "BatchNormalization in training mode; export the model for inference")
    for i, what in enumerate(("scale", "shift", "mean", "variance"), 1):
        need_constant(node, i, what)

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


def _normalised(at: At, x: Array, axes: tuple[int, ...], epsilon: float, centred: bool = True) -> Array:
    """(x - mean) / sqrt(var + epsilon) over `axes`; without `centred` the mean counts as zero."""
    ops = at.ops
    if centred:
        x = x - ops.mean(x, axes, keepdims=True)
    return x / ops.sqrt(ops.mean(x * x, axes, keepdims=True) + epsilon)


def _to_parameters(at: At, r: Array, normalised: Callable[[], Array], behind: int = 0) -> list[Share]:
    """What the scale in input 1 and the shift in input 2 get, where they depend on the input (adaptive normalisation).

    They broadcast against `r` once `behind` axes of length 1 stand behind them.
    """
    shares = []
    for i, share in ((1, lambda: r * normalised()), (2, lambda: r)):
        if at.carries(i):
            wide = (*at.shape(i), *(1,) * behind)
            shares.append((i, at.ops.reshape(at.ops.unbroadcast(share(), wide), at.shape(i))))
    return shares


@operator("LayerNormalization", "RMSNormalization")
def layer_normalization(node: Node) -> Operator:
    """Over all axes from `axis` on; RMSNormalization leaves the mean in."""
    epsilon, axis = node.attr("epsilon", 1e-5), node.attr("axis", -1)
    centred = node.op_type == "LayerNormalization"

    def axes(at: At) -> tuple[int, ...]:
        return tuple(range(axis if axis < 0 else axis - len(at.shape(0)), 0))

    def product(at: At, r: Array) -> Array:
        return _by_statistics(at, at.input(0), r * at.input(1), axes(at), epsilon, centred)

    def others(at: At, r: Array) -> list[Share]:
        return _to_parameters(at, r, lambda: _normalised(at, at.input(0), axes(at), epsilon, centred))

    return Coupled("normalisation", product, others=others)


@operator("InstanceNormalization")
def instance_normalization(node: Node) -> Operator:
    epsilon = node.attr("epsilon", 1e-5)

    def axes(at: At) -> tuple[int, ...]:
        return tuple(range(2 - len(at.shape(0)), 0))

    def product(at: At, r: Array) -> Array:
        return _by_statistics(at, at.input(0), r * _columns(at, 1), axes(at), epsilon)

    def others(at: At, r: Array) -> list[Share]:
        return _to_parameters(at, r, lambda: _normalised(at, at.input(0), axes(at), epsilon), len(at.shape(0)) - 2)

    return Coupled("normalisation", product, others=others)


@operator("GroupNormalization")
def group_normalization(node: Node) -> Operator:
    """The scale is one number per group before opset 21, per channel after."""
    epsilon, groups = node.attr("epsilon", 1e-5), node.attr("num_groups")
    per_group = node.opset < 21

    def grouped(at: At) -> tuple[int, ...]:
        shape = at.shape(0)
        return (shape[0], groups, shape[1] // groups, *shape[2:])

    def axes(at: At) -> tuple[int, ...]:
        return tuple(range(1 - len(at.shape(0)), 0))

    def scaled(at: At, r: Array) -> Array:
        """(T, N, groups, ...), times the scale."""
        if not per_group:
            return at.ops.reshape(r * _columns(at, 1), grouped(at))
        return at.ops.reshape(r, grouped(at)) * at.ops.shaped(at.input(1), (-1, *(1,) * (len(at.shape(0)) - 1)))

    def product(at: At, r: Array) -> Array:
        ops, x = at.ops, at.ops.shaped(at.input(0), grouped(at))
        return ops.reshape(_by_statistics(at, x, scaled(at, r), axes(at), epsilon), at.shape(0))

    def others(at: At, r: Array) -> list[Share]:
        ops, shape = at.ops, at.shape(0)

        def normalised() -> Array:
            x = _normalised(at, ops.shaped(at.input(0), grouped(at)), axes(at), epsilon)
            return ops.shaped(x, (shape[0], groups, -1) if per_group else shape)

        if per_group:
            r = ops.reshape(r, (shape[0], groups, prod(shape[1:]) // groups))
        return _to_parameters(at, r, normalised, r.ndim - 3)

    return Coupled("normalisation", product, others=others)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(node: Node) -> Operator:
    """(x - mean) / (deviation + 1e-9) over `axes`, by default all but the channels, the images too (ONNX spec)."""
    given = node.attr("axes", [0, 2, 3])

    def product(at: At, r: Array) -> Array:
        ops, rank = at.ops, len(at.shape(0))
        axes = tuple(a if a < 0 else a - rank for a in given)
        x = at.input(0) - ops.mean(at.input(0), axes, keepdims=True)
        deviation = ops.sqrt(ops.mean(x * x, axes, keepdims=True))
        s = 1 / (deviation + 1e-9)
        slope = x * s / ops.where(deviation > 0, deviation, 1.0)
        return s * (r - ops.mean(r, axes, keepdims=True) - slope * ops.mean(r * x, axes, keepdims=True))

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

    def taylor(at: At, r: Array) -> Array:
        """x (R - y sum R): what a mask sends to minus infinity has no y and gets nothing (Achtibat et al. 2024)."""
        x, y, axes = at.input(0), at.output(0), _softmax_axes(node, len(at.shape(0)))
        return at.ops.where(y > 0, x * (r - y * at.ops.sum(r, axes, keepdims=True)), 0.0)

    return Coupled("softmax", product, taylor)


@operator("LogSoftmax")
def log_softmax(node: Node) -> Operator:
    def product(at: At, r: Array) -> Array:
        return r - at.ops.exp(at.output(0)) * at.ops.sum(r, _softmax_axes(node, len(at.shape(0))), keepdims=True)

    return Coupled("softmax", product)
