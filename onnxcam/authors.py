"""The rules of the Relevance-CAM authors' code, to the letter, quirks included (spec 1.2).

They exist for comparison: a file exported with its BatchNormalization kept gives the authors' own maps. In short, the
convolution counts its bias twice, sums split without a guard, a maximum of exactly zero drops its relevance, and a
convolution that sees three channels uses the z-box rule between the smallest and the largest value of each picture.
"""

from __future__ import annotations

from typing import Any

from onnxcam.operators.kinds import Array, At, LinearMap, Operator, Relevances, Share
from onnxcam.rules import Term, carry_back, forward, same_sign


def safe_divide(ops: Any, a: Array, b: Array) -> Array:
    """a / b, and zero where b is exactly zero."""
    zero = b == 0
    return ops.where(zero, 0.0, a / ops.where(zero, 1.0, b))


def _z_plus(f: LinearMap, r: Array, bias: Array | None) -> Array:
    terms = same_sign(f)
    z = forward(f, terms)
    return carry_back(f, safe_divide(f.ops, r, z if bias is None else z + bias), terms)


def conv(at: At, operator: Any, rs: Relevances) -> list[Share]:
    """z-plus whose denominator holds the signed bias twice; with three input channels the z-box rule instead."""
    f: LinearMap = operator.bind(at)
    if at.shape(1)[1] == 3:
        return [(operator.operand, _z_box(f, rs[0]))]
    return [(operator.operand, _z_plus(f, rs[0], None if f.bias is None else 2 * f.bias))]


def _z_box(f: LinearMap, r: Array) -> Array:
    """Bounds: the smallest and the largest value of each picture, over all channels."""
    ops, axes = f.ops, tuple(range(1, f.x.ndim))
    ones = ops.ones_like(f.x)
    low, high = ones * ops.min(f.x, axes), ones * ops.max(f.x, axes)
    terms: list[Term] = [
        (f.x, f.weight),
        (-low, f.part("positive", ops.positive)),
        (-high, f.part("negative", ops.negative)),
    ]
    return carry_back(f, safe_divide(ops, r, forward(f, terms) + 1e-9), terms)


def dense(at: At, operator: Any, rs: Relevances) -> list[Share]:
    """z-plus without any bias."""
    return [(operator.operand, _z_plus(operator.bind(at), rs[0], None))]


def adaptive_pool(at: At, operator: Any, rs: Relevances) -> list[Share]:
    """In proportion to the positive part of the input."""
    return [(0, _z_plus(operator.bind(at), rs[0], None))]


def add(at: At, operator: Any, rs: Relevances) -> list[Share]:
    """In proportion to the signed summands, without a guard."""
    terms = operator.terms(at)
    total = sum((a for _, a in terms[1:]), terms[0][1])
    s = safe_divide(at.ops, rs[0], total)
    return [(i, at.ops.unbroadcast(a * s, at.shape(i))) for i, a in terms]


def max_pool(at: At, operator: Operator, rs: Relevances) -> list[Share]:
    """To the winner as x * gradient * R / y, which drops windows whose maximum is zero."""
    ((i, routed),) = operator.vjp(at, [safe_divide(at.ops, rs[0], at.output(0))])
    return [(i, at.input(0) * routed)]


def batch_norm(at: At, operator: Any, rs: Relevances) -> list[Share]:
    """R x w / (x w + 1e-9) with w = gamma / sqrt(var^2 + eps): the variance squared, as the code has it."""
    if at.node.op_type != "BatchNormalization":
        return [(0, rs[0])]
    ops, x = at.ops, at.input(0)
    variance = at.input(4)
    w = at.input(1) / ops.sqrt(variance * variance + at.node.attr("epsilon", 1e-5))
    w = ops.shaped(w, (-1, *(1,) * (len(at.shape(0)) - 2)))
    return [(0, x * w * rs[0] / (x * w + 1e-9))]


BY_OP = {"Gemm": dense, "MatMul": dense, "MaxPool": max_pool}
