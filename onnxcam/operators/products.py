"""Products and quotients. By a constant they scale; of two tensors, one usually gates the other.

Under LRP the signal takes all the relevance and the gate gets none (spec 4.4); `roles` tells which is which.
"""

from __future__ import annotations

from onnxcam.graph import Node
from onnxcam.operators.kinds import Array, At, Elementwise, Operator, Product, Share, Statistic
from onnxcam.operators.registry import need_numpy_broadcasting, operator
from onnxcam.operators.roles import data_inputs, own_signal, signal_of


def _scaling(operand: int, factor: int, divide: bool = False) -> Operator:
    def derivative(at: At) -> Array:
        constant = at.input(factor)
        return 1 / constant if divide else constant

    return Elementwise(derivative, operand=operand)


@operator("Mul")
def mul(node: Node) -> Operator:
    need_numpy_broadcasting(node)
    data = data_inputs(node)
    for operand in (0, 1):
        if node.is_constant(1 - operand) or data == [operand]:
            return _scaling(operand, 1 - operand)

    def partials(at: At, r: Array) -> list[Share]:
        return [(i, at.ops.unbroadcast(r * at.input(1 - i), at.shape(i))) for i in (0, 1)]

    own = own_signal(node)
    return Product(partials, signal_of(node) if own is None else own, gated=own is None)


@operator("Div")
def div(node: Node) -> Operator:
    """The denominator is a statistic: it gets no relevance (spec 3.6)."""
    need_numpy_broadcasting(node)
    if node.is_constant(1):
        return _scaling(0, 1, divide=True)

    def partials(at: At, r: Array) -> list[Share]:
        b = at.input(1)
        shares = [(0, at.ops.unbroadcast(r / b, at.shape(0)))] if at.carries(0) else []
        return [*shares, (1, at.ops.unbroadcast(-r * at.output(0) / b, at.shape(1)))]

    return Product(partials, 0 if not node.is_constant(0) else 1)


@operator("Mod", since=10)
def mod(node: Node) -> Operator:
    """x - b times a whole number: 1 for x, minus the whole number for b. On whole numbers it counts, and carries
    nothing."""
    dtype = node.graph.dtype(node.outputs[0])
    if dtype is not None and dtype.kind in "iu":
        return Statistic()

    def partials(at: At, r: Array) -> list[Share]:
        shares = [(0, at.ops.unbroadcast(r, at.shape(0)))] if at.carries(0) else []
        if at.carries(1):
            times = at.ops.round((at.input(0) - at.output(0)) / at.input(1))
            shares.append((1, at.ops.unbroadcast(-(r * times), at.shape(1))))
        return shares

    return Product(partials, 0)
