"""Elementwise functions: one line each, the derivative in terms of the input x, the output y and the node's attributes.

Relevance passes an activation unchanged (spec 3.4); the derivative serves the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

import numpy as np

from onnxcam.graph import Node
from onnxcam.operators.kinds import Array, At, Elementwise, Operator, Product, Share
from onnxcam.operators.registry import operator

SELU_ALPHA, SELU_GAMMA = 1.67326319217681884765625, 1.05070102214813232421875  # ONNX spec, Selu


def derivative(op_type: str, formula: Callable[..., Array], since: int = 1, **defaults: Any) -> None:
    """Register `formula(ops, x, y, **attributes)`; `defaults` are the attributes it reads."""

    @operator(op_type, since=since)
    def elementwise(node: Node) -> Operator:
        attributes = {name: node.attr(name, default) for name, default in defaults.items()}
        return Elementwise(lambda at: formula(at.ops, at.input(0), at.output(0), **attributes))


def _gelu(ops: Any, x: Array, y: Array, approximate: str) -> Array:
    density = ops.exp(-0.5 * x * x) / sqrt(2 * pi)
    if approximate == "tanh":
        inner = sqrt(2 / pi) * (x + 0.044715 * x * x * x)
        t = ops.tanh(inner)
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * sqrt(2 / pi) * (1 + 3 * 0.044715 * x * x)
    # The distribution function is y / x: no error function is needed, and it is exact to the precision of y.
    safe = ops.where(x == 0, 1.0, x)
    return ops.where(x == 0, 0.5, y / safe) + x * density


def _softplus(ops: Any, x: Array) -> Array:
    return ops.positive(x) + ops.log(1 + ops.exp(-ops.abs(x)))


def _mish(ops: Any, x: Array, y: Array) -> Array:
    t = ops.tanh(_softplus(ops, x))
    return t + x * (1 - t * t) * ops.sigmoid(x)


def _swish(ops: Any, x: Array, y: Array, alpha: float) -> Array:
    s = ops.sigmoid(alpha * x)
    return s + alpha * x * s * (1 - s)


def _elu(ops: Any, x: Array, y: Array, alpha: float) -> Array:
    return ops.where(x > 0, 1.0, alpha * ops.exp(-ops.positive(-x)))


def _selu(ops: Any, x: Array, y: Array, alpha: float, gamma: float) -> Array:
    return gamma * _elu(ops, x, y, alpha)


def _inside(ops: Any, x: Array, low: float, high: float) -> Array:
    return ops.mask(x > low) * ops.mask(x < high)


derivative("Relu", lambda ops, x, y: ops.mask(x > 0))
derivative("LeakyRelu", lambda ops, x, y, alpha: ops.where(x > 0, 1.0, ops.zeros_like(x) + alpha), alpha=0.01)
derivative("ThresholdedRelu", lambda ops, x, y, alpha: ops.mask(x > alpha), alpha=1.0)
derivative("Elu", _elu, alpha=1.0)
derivative("Celu", lambda ops, x, y, alpha: ops.where(x > 0, 1.0, ops.exp(-ops.positive(-x) / alpha)), alpha=1.0)
derivative("Selu", _selu, alpha=SELU_ALPHA, gamma=SELU_GAMMA)
derivative("Softplus", lambda ops, x, y: ops.sigmoid(x))
derivative("Softsign", lambda ops, x, y: 1 / ((1 + ops.abs(x)) * (1 + ops.abs(x))))
derivative("Sigmoid", lambda ops, x, y: y * (1 - y))
derivative("Tanh", lambda ops, x, y: 1 - y * y)
derivative(
    "HardSigmoid",
    lambda ops, x, y, alpha, beta: alpha * _inside(ops, alpha * x + beta, 0.0, 1.0),
    alpha=0.2,
    beta=0.5,
)
derivative("HardSwish", lambda ops, x, y: ops.mask(x >= 3) + _inside(ops, x, -3.0, 3.0) * (x / 3 + 0.5))
derivative("Swish", _swish, alpha=1.0)
derivative("Mish", _mish)
derivative("Gelu", _gelu, approximate="none")
derivative("Shrink", lambda ops, x, y, lambd: ops.mask(ops.abs(x) > lambd), lambd=0.5)
derivative("Erf", lambda ops, x, y: 2 / sqrt(pi) * ops.exp(-x * x))
derivative("Exp", lambda ops, x, y: y)
derivative("Log", lambda ops, x, y: 1 / x)
# Of 0, what a rectifier before it lets nothing of through: infinity would make that a product with 0.
derivative("Sqrt", lambda ops, x, y: ops.where(y > 0, 0.5 / ops.where(y > 0, y, 1.0), 0.0))
derivative("Reciprocal", lambda ops, x, y: -y * y)
derivative("Neg", lambda ops, x, y: -ops.ones_like(x))
derivative("Abs", lambda ops, x, y: ops.sign(x))
derivative("Sin", lambda ops, x, y: ops.cos(x))
derivative("Cos", lambda ops, x, y: -ops.sin(x))
derivative("Tan", lambda ops, x, y: 1 + y * y)
derivative("Asin", lambda ops, x, y: 1 / ops.sqrt(1 - x * x))
derivative("Acos", lambda ops, x, y: -1 / ops.sqrt(1 - x * x))
derivative("Atan", lambda ops, x, y: 1 / (1 + x * x))
derivative("Sinh", lambda ops, x, y: 0.5 * (ops.exp(x) + ops.exp(-x)))
derivative("Cosh", lambda ops, x, y: 0.5 * (ops.exp(x) - ops.exp(-x)))
derivative("Asinh", lambda ops, x, y: 1 / ops.sqrt(x * x + 1))
derivative("Acosh", lambda ops, x, y: 1 / ops.sqrt(x * x - 1))
derivative("Atanh", lambda ops, x, y: 1 / (1 - x * x))
for _stepwise in ("Round", "Floor", "Ceil"):
    derivative(_stepwise, lambda ops, x, y: ops.zeros_like(x))


@operator("PRelu")
def prelu(node: Node) -> Operator:
    """The slope broadcasts by NumPy's rules, (C, 1, 1) for channels; before opset 7 a slope (C,) is one per channel."""

    def slope(at: At) -> Array:
        s, rank = at.input(1), len(at.shape(0))
        per_channel = node.opset < 7 and s.ndim == 1 and s.shape[0] != 1 and rank > 2
        return at.ops.shaped(s, (-1, *(1,) * (rank - 2))) if per_channel else s

    def derivative(at: At) -> Array:
        return at.ops.where(at.input(0) > 0, 1.0, slope(at))

    def by_slope(at: At) -> Array:
        return at.ops.negative(at.input(0))

    return Elementwise(derivative) if node.is_constant(1) else _of_two(derivative, by_slope)


def _of_two(*derivatives: Callable[[At], Array]) -> Operator:
    """A function of two tensors, the derivative by each; relevance stays with the first."""

    def partials(at: At, r: Array) -> list[Share]:
        return [(i, at.ops.unbroadcast(r * by(at), at.shape(i))) for i, by in enumerate(derivatives) if at.carries(i)]

    return Product(partials, signal=0)


@operator("Clip")
def clip(node: Node) -> Operator:
    """The bounds are attributes up to opset 10, inputs 1 and 2 after."""

    def bound(at: At, i: int, name: str, default: float) -> float:
        value = at.host(i) if node.opset >= 11 else node.attr(name)
        return default if value is None else float(np.ravel(value)[0])

    def formula(at: At) -> Array:
        low, high = bound(at, 1, "min", -float("inf")), bound(at, 2, "max", float("inf"))
        return _inside(at.ops, at.input(0), low, high)

    return Elementwise(formula)


@operator("Pow")
def power(node: Node) -> Operator:
    """x to the power p; p x^(p-1), and y log x where the exponent depends on the input too."""

    def by_base(at: At) -> Array:
        # 0 to the power -1 would make a derivative of 0 undefined where p is 0.
        x, p, ops = at.input(0), at.input(1), at.ops
        return p * ops.power(x, ops.where(p == 0, 1.0, p) - 1)

    def by_exponent(at: At) -> Array:
        x, ops = at.input(0), at.ops
        return at.output(0) * ops.log(ops.where(x > 0, x, 1.0))

    if node.is_constant(1):
        return Elementwise(by_base)
    return Elementwise(by_exponent, operand=1) if node.is_constant(0) else _of_two(by_base, by_exponent)
