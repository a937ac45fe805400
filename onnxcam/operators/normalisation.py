"""Normalisations: a BatchNormalization that could not be folded, LRN, and Softmax inside a network.

Relevance passes them unchanged: a statistic decides the scale of what is seen, not what is seen (spec 3.3).
"""

from __future__ import annotations

import numpy as np

from onnxcam.errors import ModelError
from onnxcam.graph import Node
from onnxcam.operators.kinds import Array, At, Coupled, Elementwise, Operator
from onnxcam.operators.registry import operator


@operator("BatchNormalization")
def batch_normalization(node: Node) -> Operator:
    """Inference form: a fixed scale gamma / sqrt(var + epsilon) per channel."""
    epsilon = node.attr("epsilon", 1e-5)
    if node.attr("training_mode", 0):
        raise ModelError(f"node {node.name!r}: BatchNormalization in training mode; export the model for inference")

    def scale(at: At) -> Array:
        factor = at.input(1) / at.ops.sqrt(at.input(4) + epsilon)
        # Before opset 9, spatial=0 keeps statistics of every cell.
        return factor if factor.ndim > 1 else at.ops.shaped(factor, (-1, *(1,) * (len(at.shape(0)) - 2)))

    return Elementwise(scale, kind="normalisation")


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
