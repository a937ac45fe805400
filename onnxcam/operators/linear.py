"""Linear operators with a weight: Conv, ConvTranspose, Gemm, MatMul by a constant."""

from __future__ import annotations

from onnxcam.engines.window import Window
from onnxcam.graph import Node
from onnxcam.operators.geometry import conv_transpose_window, conv_window
from onnxcam.operators.kinds import Array, At, Linear, Operator, Product
from onnxcam.operators.registry import need_constant, operator


def _per_channel(at: At, i: int) -> Array | None:
    """The bias in input `i`, (M,), shaped so that it broadcasts against (N, M, *spatial)."""
    return at.ops.shaped(at.input(i), (-1, *(1,) * (len(at.shape(0)) - 2))) if at.node.has(i) else None


@operator("Conv")
def conv(node: Node) -> Operator:
    """Adjoint: transposed convolution with the same weight (spec 3.0)."""
    need_constant(node, 1, "weight")
    need_constant(node, 2, "bias")
    group = node.attr("group", 1)

    def window(at: At) -> Window:
        return conv_window(node, at.shape(0)[2:], at.shape(1)[2:])

    return Linear(
        apply=lambda at, x, w: at.ops.conv(x, w, window(at), group),
        adjoint=lambda at, r, w: at.ops.conv_adjoint(r, w, window(at), at.shape(0)[2:], group),
        bias=lambda at: _per_channel(at, 2),
    )


@operator("ConvTranspose")
def conv_transpose(node: Node) -> Operator:
    """The adjoint of a Conv, used forward; its own adjoint is that Conv (spec 3.0)."""
    need_constant(node, 1, "weight")
    need_constant(node, 2, "bias")
    group = node.attr("group", 1)

    def window(at: At) -> Window:
        return conv_transpose_window(node, at.shape(0)[2:], at.shape(1)[2:])

    return Linear(
        apply=lambda at, x, w: at.ops.conv_adjoint(x, w, window(at), at.output_shape()[2:], group),
        adjoint=lambda at, r, w: at.ops.conv(r, w, window(at), group),
        bias=lambda at: _per_channel(at, 2),
    )


@operator("Gemm")
def gemm(node: Node) -> Operator:
    """y = alpha A' B' + beta C, with one of A and B constant."""
    need_constant(node, 0 if node.is_constant(0) else 1, "weight")
    need_constant(node, 2, "bias")
    alpha, beta = node.attr("alpha", 1.0), node.attr("beta", 1.0)
    left = node.is_constant(0)
    trans = [bool(node.attr("transA", 0)), bool(node.attr("transB", 0))]

    def turned(at: At, array: Array, i: int) -> Array:
        return at.ops.swap(array) if trans[i] else array

    def apply(at: At, x: Array, w: Array) -> Array:
        a, b = (w, x) if left else (x, w)
        return at.ops.matmul(turned(at, a, 0), turned(at, b, 1))

    def adjoint(at: At, r: Array, w: Array) -> Array:
        if left:
            return turned(at, at.ops.matmul(at.ops.swap(turned(at, w, 0)), r), 1)
        return turned(at, at.ops.matmul(r, at.ops.swap(turned(at, w, 1))), 0)

    return Linear(
        apply,
        adjoint,
        operand=1 if left else 0,
        weight=0 if left else 1,
        bias=lambda at: beta * at.input(2) if at.node.has(2) else None,
        scale=alpha,
    )


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
    """By a constant: a linear map. Of two tensors that depend on the input: a product."""
    if not node.is_constant(0) and not node.is_constant(1):
        return Product(
            lambda at, r: [
                (0, _matmul_partial(at, r, 0, at.input(1))),
                (1, _matmul_partial(at, r, 1, at.input(0))),
            ]
        )
    operand = 1 if node.is_constant(0) else 0
    return Linear(
        apply=lambda at, x, w: at.ops.matmul(x, w) if operand == 0 else at.ops.matmul(w, x),
        adjoint=lambda at, r, w: _matmul_partial(at, r, operand, w),
        operand=operand,
        weight=1 - operand,
    )
