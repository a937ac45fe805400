"""Linear operators with a weight: Conv, ConvTranspose, Gemm, MatMul by a constant.

The weight may depend on the input (dynamic convolutions, mixtures of experts): relevance goes to what it weighs.
"""

from __future__ import annotations

from collections.abc import Callable

from onnxcam.engines.window import Window
from onnxcam.graph import Node
from onnxcam.operators.geometry import conv_transpose_window, conv_window
from onnxcam.operators.kinds import Array, At, Linear, Operator, Product, Share
from onnxcam.operators.registry import operator
from onnxcam.operators.roles import data_inputs, value_of


def _per_channel(at: At, i: int) -> Array | None:
    """The bias in input `i`, (M,), shaped so that it broadcasts against (N, M, *spatial)."""
    return at.ops.shaped(at.input(i), (-1, *(1,) * (len(at.shape(0)) - 2))) if at.node.has(i) else None


Partial = Callable[[At, Array, Array], Array]


def _convolution(node: Node, apply: Partial, to_input: Partial, to_weight: Partial) -> Operator:
    """A Conv-like node. Where only its weight depends on the input, as where a network draws with brushes of its own,
    it is a map of the weight."""
    drawn = data_inputs(node)[:1] == [1]

    def others(at: At, r: Array) -> list[Share]:
        shares = [(1, to_weight(at, r, at.input(0)))] if at.carries(1) and not drawn else []
        if at.carries(2):
            shares.append((2, at.ops.sum(r, (-r.ndim + 1, *range(2 - len(at.shape(0)), 0)))))
        return shares

    def bias(at: At) -> Array | None:
        return _per_channel(at, 2)

    if drawn:
        return Linear(lambda at, w, x: apply(at, x, w), to_weight, operand=1, weight=0, bias=bias, others=others)
    return Linear(apply, to_input, bias=bias, others=others)


@operator("Conv")
def conv(node: Node) -> Operator:
    """Adjoint: transposed convolution with the same weight (spec 3.0)."""
    group = node.attr("group", 1)

    def window(at: At) -> Window:
        return conv_window(node, at.shape(0)[2:], at.shape(1)[2:])

    return _convolution(
        node,
        lambda at, x, w: at.ops.conv(x, w, window(at), group),
        lambda at, r, w: at.ops.conv_adjoint(r, w, window(at), at.shape(0)[2:], group),
        lambda at, r, x: at.ops.conv_weight_adjoint(r, x, window(at), at.shape(1)[2:], group),
    )


@operator("ConvTranspose")
def conv_transpose(node: Node) -> Operator:
    """The adjoint of a Conv, used forward; its own adjoint is that Conv (spec 3.0)."""
    group = node.attr("group", 1)

    def window(at: At) -> Window:
        return conv_transpose_window(node, at.shape(0)[2:], at.shape(1)[2:])

    return _convolution(
        node,
        lambda at, x, w: at.ops.conv_adjoint(x, w, window(at), at.output_shape()[2:], group),
        lambda at, r, w: at.ops.conv(r, w, window(at), group),
        lambda at, r, x: at.ops.conv_weight_adjoint(x, r, window(at), at.shape(1)[2:], group),
    )


@operator("Gemm")
def gemm(node: Node) -> Operator:
    """y = alpha A' B' + beta C. Where A and B both depend on the input it is a product, linear in each of them."""
    alpha, beta = node.attr("alpha", 1.0), node.attr("beta", 1.0)
    trans = [bool(node.attr("transA", 0)), bool(node.attr("transB", 0))]

    def turned(at: At, array: Array, i: int) -> Array:
        return at.ops.swap(array) if trans[i] else array

    def apply(at: At, operand: int, x: Array, w: Array) -> Array:
        a, b = (x, w) if operand == 0 else (w, x)
        return at.ops.matmul(turned(at, a, 0), turned(at, b, 1))

    def adjoint(at: At, operand: int, r: Array, w: Array) -> Array:
        if operand == 1:
            return turned(at, at.ops.matmul(at.ops.swap(turned(at, w, 0)), r), 1)
        return turned(at, at.ops.matmul(r, at.ops.swap(turned(at, w, 1))), 0)

    def to_bias(at: At, r: Array) -> list[Share]:
        return [(2, at.ops.unbroadcast(beta * r, at.shape(2)))] if at.carries(2) else []

    def given(operand: int) -> Linear:
        return Linear(
            apply=lambda at, x, w: apply(at, operand, x, w),
            adjoint=lambda at, r, w: adjoint(at, operand, r, w),
            operand=operand,
            weight=1 - operand,
            bias=lambda at: beta * at.input(2) if at.node.has(2) else None,
            scale=alpha,
            others=to_bias,
        )

    data = [i for i in data_inputs(node) if i < 2] or [0]
    if len(data) == 1:
        return given(data[0])

    def partials(at: At, r: Array) -> list[Share]:
        return [*((i, alpha * adjoint(at, i, r, at.input(1 - i))) for i in (0, 1)), *to_bias(at, r)]

    return Product(partials, value_of(node), given=given)


def _matmul_partial(at: At, r: Array, i: int, other: Array) -> Array:
    """Share of operand `i` of a MatMul (NumPy semantics: vectors become a row or a column), given the other operand."""
    shapes = at.shape(0), at.shape(1)
    matrices = tuple(
        shape if len(shape) > 1 else ((1, *shape) if j == 0 else (*shape, 1)) for j, shape in enumerate(shapes)
    )
    vectors = sum(len(shape) == 1 for shape in shapes)
    lead = at.output_shape()[: len(at.output_shape()) - 2 + vectors]
    r = at.ops.reshape(r, (*lead, matrices[0][-2], matrices[1][-1]))
    other = at.ops.swap(at.ops.shaped(other, matrices[1 - i]))
    share = at.ops.matmul(r, other) if i == 0 else at.ops.matmul(other, r)
    return at.ops.reshape(at.ops.unbroadcast(share, matrices[i]), shapes[i])


@operator("MatMul")
def matmul(node: Node) -> Operator:
    """By a constant: a linear map. Of two tensors that depend on the input: a product, linear in each of them."""

    def given(operand: int) -> Linear:
        return Linear(
            apply=lambda at, x, w: at.ops.matmul(x, w) if operand == 0 else at.ops.matmul(w, x),
            adjoint=lambda at, r, w: _matmul_partial(at, r, operand, w),
            operand=operand,
            weight=1 - operand,
        )

    if node.is_constant(0) or node.is_constant(1):
        return given(1 if node.is_constant(0) else 0)
    if len(data := data_inputs(node)) == 1:
        return given(data[0])
    return Product(
        lambda at, r: [(0, _matmul_partial(at, r, 0, at.input(1))), (1, _matmul_partial(at, r, 1, at.input(0)))],
        value_of(node),
        given=given,
    )
