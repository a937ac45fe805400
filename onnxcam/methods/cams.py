"""Class activation maps by gradients: how a layer's activation A and the gradient G of the class score make a map.

The formulas are those of the papers, without scaling to 0..1 (spec 6.3). A is (N, C, *spatial), G (T, N, C, *spatial),
a map (T, N, *spatial).
"""

from __future__ import annotations

from typing import Any

from onnxcam.graph import Graph
from onnxcam.methods import relevance_cam
from onnxcam.operators import lookup
from onnxcam.operators.kinds import Averaging, Linear, Operator

Array = Any
WANTED = "a global average and one dense layer must follow it (grad-cam is its like, defined everywhere)"


def _cells(activation: Array) -> tuple[int, ...]:
    """The spatial axes, counted from the end."""
    return tuple(range(2 - activation.ndim, 0))


def _channels(activation: Array) -> tuple[int]:
    return (1 - activation.ndim,)


def cam(ops: Any, activation: Array, gradient: Array) -> Array:
    """The weights of the classifier times the channels (Zhou et al. 2016).

    Behind a global average the gradient is the weight divided by the number of cells, so their sum is the weight.
    """
    weights = ops.sum(gradient, _cells(activation), keepdims=True)
    return ops.sum(weights * activation, _channels(activation))


def needs_linear_head(graph: Graph, tensor: str, logits: str) -> str | None:
    """Why the classifier has no weight for each channel of `tensor`: an average and one dense layer must follow it."""
    kinds: list[str] = []
    for node in graph.between([tensor], logits):
        operator = lookup(node)
        if isinstance(operator, Averaging | Linear):
            kinds.append(operator.kind)
        elif operator.kind != "routing" and not _adds_constant(operator, node.is_constant(0) or node.is_constant(1)):
            return f"{node.op_type} {node.name!r} lies between it and the logits; {WANTED}"
    if kinds != ["averaging", "linear"]:
        return WANTED
    return None


def _adds_constant(operator: Operator, constant: bool) -> bool:
    return operator.kind == "additive" and constant


def grad_cam(ops: Any, activation: Array, gradient: Array) -> Array:
    """relu(sum over channels of mean(G_k) A_k) (Selvaraju et al. 2017)."""
    return ops.positive(relevance_cam.combine(ops, activation, gradient))


def grad_cam_plus_plus(ops: Any, activation: Array, gradient: Array) -> Array:
    """relu(sum of w_k A_k), w_k = sum of alpha G+, alpha = G^2 / (2 G^2 + sum(A_k) G^3) (Chattopadhay et al. 2018).

    The powers of the gradient stand for the higher derivatives of exp of the score. Where G is 0, alpha is.
    """
    cells = _cells(activation)
    squared = gradient * gradient
    scale = 2.0 * squared + ops.sum(activation, cells, keepdims=True) * squared * gradient
    whole = scale + 1e-6
    alive = ops.abs(whole) > ops.tiny  # it has either sign, and now and then hits 0
    alpha = ops.where(alive, squared / ops.where(alive, whole, 1.0), 0.0)
    weights = ops.sum(ops.positive(gradient) * alpha, cells, keepdims=True)
    return ops.positive(ops.sum(weights * activation, _channels(activation)))


def xgrad_cam(ops: Any, activation: Array, gradient: Array) -> Array:
    """Grad-CAM with gradients weighed by A / sum(A) (Fu et al. 2020)."""
    cells = _cells(activation)
    total = ops.sum(activation, cells, keepdims=True) + 1e-7
    weights = ops.sum(gradient * activation, cells, keepdims=True) / total
    return ops.positive(ops.sum(weights * activation, _channels(activation)))


def hires_cam(ops: Any, activation: Array, gradient: Array) -> Array:
    """relu(sum over channels of G A) (Draelos and Carin 2020)."""
    return ops.positive(ops.sum(gradient * activation, _channels(activation)))


def layer_cam(ops: Any, activation: Array, gradient: Array) -> Array:
    """relu(sum over channels of G+ A) (Jiang et al. 2021)."""
    return ops.positive(ops.sum(ops.positive(gradient) * activation, _channels(activation)))


def element_wise(ops: Any, activation: Array, gradient: Array) -> Array:
    """sum over channels of (G A)+ (pytorch-grad-cam's GradCAMElementWise)."""
    return ops.sum(ops.positive(gradient * activation), _channels(activation))


def saliency(ops: Any, activation: Array, gradient: Array) -> Array:
    """max over channels of |G| (Simonyan et al. 2014)."""
    peak = ops.max(ops.abs(gradient), _channels(activation))
    return ops.sum(peak, _channels(activation))  # which has length 1 by now


def times_gradient(ops: Any, activation: Array, gradient: Array) -> Array:
    """sum over channels of A G: input x gradient, where the layer is the input (Shrikumar et al. 2016)."""
    return ops.sum(gradient * activation, _channels(activation))
