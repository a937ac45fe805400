"""Activations that ONNX Runtime fuses or adds, with the bias before them, in standard ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi, sqrt

import numpy as np

from onnxcam.canonise.expansion.body import Body, Made, Operand, Refused
from onnxcam.canonise.expansion.table import expansion


def gelu(b: Body, x: Operand) -> Operand:
    """x Phi(x), by the error function: one op from opset 20 on."""
    if b.opset >= 20:
        return b.named(x, b("Gelu", x))
    gate = b("Add", b("Erf", b("Div", x, sqrt(2))), 1.0)
    return b.named(x, b("Mul", b("Mul", x, gate), 0.5))


def tanh_gelu(b: Body, x: Operand) -> Operand:
    """x Phi(x) in the approximation by tanh."""
    if b.opset >= 20:
        return b.named(x, b("Gelu", x, approximate="tanh"))
    cubic = b("Mul", b("Mul", b("Mul", x, x), x), 0.044715)
    gate = b("Add", b("Tanh", b("Mul", b("Add", x, cubic), sqrt(2 / pi))), 1.0)
    return b.named(x, b("Mul", b("Mul", x, gate), 0.5))


def swish(b: Body, x: Operand, alpha: float = 1.0) -> Operand:
    """x sigmoid(alpha x)."""
    if b.opset >= 24:
        return b.named(x, b("Swish", x, alpha=alpha))
    return b.named(x, b("Mul", x, b("Sigmoid", x if alpha == 1 else b("Mul", x, alpha))))


def _clip(b: Body, x: Operand, low: float, high: float) -> Made:
    return b("Clip", x, b.number(low), b.number(high)) if b.opset >= 11 else b("Clip", x, min=low, max=high)


# What fused ops call their activation: its parameters with their defaults, and how it is written.
Activation = tuple[tuple[tuple[str, float], ...], Callable[..., Operand]]
ACTIVATIONS: dict[str, Activation] = {
    **{op: ((), lambda b, x, op=op: b(op, x)) for op in ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign")},
    "LeakyRelu": ((("alpha", 0.01),), lambda b, x, alpha: b("LeakyRelu", x, alpha=alpha)),
    "Elu": ((("alpha", 1.0),), lambda b, x, alpha: b("Elu", x, alpha=alpha)),
    "ThresholdedRelu": ((("alpha", 1.0),), lambda b, x, alpha: b("ThresholdedRelu", x, alpha=alpha)),
    "Selu": (
        (("alpha", 1.6732632), ("gamma", 1.0507010)),
        lambda b, x, alpha, gamma: b("Selu", x, alpha=alpha, gamma=gamma),
    ),
    "HardSigmoid": (
        (("alpha", 0.2), ("beta", 0.5)),
        lambda b, x, alpha, beta: b("HardSigmoid", x, alpha=alpha, beta=beta),
    ),
    "Clip": ((("min", -3.4028235e38), ("max", 3.4028235e38)), _clip),
    "Gelu": ((), gelu),
    "QuickGelu": ((("alpha", 1.702),), swish),
    "Silu": ((), swish),
}


def activation(b: Body, x: Operand, name: str, given: Sequence[float | None] = ()) -> Operand:
    """The activation that a fused op names, with the parameters it gives, in order; "" is none.

    Raises:
        Refused: the name means nothing.
    """
    name = name.decode() if isinstance(name, bytes) else name
    if not name:
        return x
    if name not in ACTIVATIONS:
        raise Refused(f"{b.node.op} with activation {name!r}")
    parameters, write = ACTIVATIONS[name]
    given = [*given, *[None] * len(parameters)]
    values = [default if value is None else value for (_, default), value in zip(parameters, given, strict=False)]
    return b.named(x, write(b, x, *values))


@expansion("Gelu", into="Gelu, or Erf, Mul, Add before opset 20")
def _gelu(b: Body) -> Operand:
    return gelu(b, b.input(0))


@expansion("BiasGelu", into="Add, Gelu")
def _bias_gelu(b: Body) -> Operand:
    return gelu(b, b("Add", b.input(0), b.input(1)))


@expansion("FastGelu", into="Add, Gelu (by tanh)")
def _fast_gelu(b: Body) -> Operand:
    return tanh_gelu(b, b.sum(b.input(0), b.input(1)))


@expansion("QuickGelu", into="Mul, Sigmoid, or Swish from opset 24 on")
def _quick_gelu(b: Body) -> Operand:
    return swish(b, b.input(0), b.attr("alpha", 1.702))


@expansion("ScaledSiLU", into="Mul, Sigmoid, Mul")
def _scaled_silu(b: Body) -> Operand:
    scale = b.input(1) if b.has(1) else b.attr("alpha", 1.0)
    return swish(b, b("Mul", b.input(0), scale))


@expansion("SwiGLU", into="Clip, Sigmoid, Mul, Add")
def _swiglu(b: Body) -> Operand:
    """clip(gate) sigmoid(alpha gate) (clip(up) + beta); ONNX's own op of that name has a body in the specification."""
    gate, up, limit = b.input(0), b.input(1), b.attr("limit", 0.0)
    if limit > 0:
        gate = _clip(b, gate, float(np.finfo(b.dtype).min), limit)
        up = _clip(b, up, -limit, limit)
    beta = b.attr("activation_beta", 0.0)
    return b("Mul", swish(b, gate, b.attr("activation_alpha", 1.0)), b("Add", up, beta) if beta else up)


@expansion("BiasSplitGelu", into="Add, Split, Gelu, Mul")
def _bias_split_gelu(b: Body) -> Operand:
    shape = b.shape(1)
    if not isinstance(shape[-1], int):
        raise Refused("BiasSplitGelu of an unknown number of channels")
    half = shape[-1] // 2
    left, right = b.split(b("Add", b.input(0), b.input(1)), (half, half), len(b.shape(0)) - 1)
    return b("Mul", left, gelu(b, right))


@expansion("BiasAdd", into="Add, Add")
def _bias_add(b: Body) -> Operand:
    return b.sum(b.input(0), b.input(1), b.input(2))


@expansion("BiasSoftmax", into="Add, Softmax")
def _bias_softmax(b: Body) -> Operand:
    """Softmax over the last axis of data + bias, which broadcasts as NumPy has it, or is refused."""
    rank, axis = len(b.shape(0)), b.attr("axis", 1)
    if axis % rank != rank - 1:
        raise Refused("BiasSoftmax over several axes")
    if not b.attr("is_inner_broadcast", 1) and len(b.shape(1)) < rank:
        raise Refused("BiasSoftmax that repeats its bias along the batch")
    return b("Softmax", b("Add", b.input(0), b.input(1)), axis=rank - 1)
