"""Products and quotients. By a constant they scale; of two tensors, one usually gates the other.

Under LRP the signal takes all the relevance and the gate gets none (spec 4.4). A gate is recognised by where it comes
from: a squashing function, possibly scaled or cast on the way, or a tensor without spatial extent.
"""

from __future__ import annotations

from onnxcam.graph import Node
from onnxcam.operators.kinds import Array, At, Elementwise, Operator, Product, Share
from onnxcam.operators.registry import need_numpy_broadcasting, operator

SQUASHING = {"Sigmoid", "HardSigmoid", "Softmax", "Tanh", "Clip", "Erf", "QLinearSigmoid"}
_TRANSPARENT = {
    *("Mul", "Div", "Add", "Sub", "Cast", "Identity"),
    *("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand"),
}


def squashed(node: Node, i: int) -> bool:
    """True where operand `i` comes from a squashing function, through nothing but constants and layout."""
    maker = node.producer(i)
    while maker is not None and maker.op_type not in SQUASHING:
        dynamic = [j for j in range(len(maker.inputs)) if maker.has(j) and not maker.is_constant(j)]
        if maker.op_type not in _TRANSPARENT or len(dynamic) != 1:
            return False
        maker = maker.producer(dynamic[0])
    return maker is not None


def _extent(node: Node, i: int) -> int:
    """Number of spatial axes along which operand `i` is longer than 1."""
    shape = node.shape(i)
    return sum(n != 1 for n in shape[2:]) if shape is not None and len(shape) > 2 else 0


def signal_of(node: Node) -> int | None:
    """Which operand of a Mul is the signal; None where neither is a gate, or both are the same tensor."""
    if node.inputs[0] == node.inputs[1]:
        return None
    gates = [squashed(node, i) for i in (0, 1)]
    if gates[0] != gates[1]:
        return 0 if gates[1] else 1
    extents = [_extent(node, i) for i in (0, 1)]
    return None if extents[0] == extents[1] else int(extents[1] > extents[0])


def _scaling(operand: int, factor: int, divide: bool = False) -> Operator:
    def derivative(at: At) -> Array:
        constant = at.input(factor)
        return 1 / constant if divide else constant

    return Elementwise(derivative, operand=operand)


@operator("Mul")
def mul(node: Node) -> Operator:
    need_numpy_broadcasting(node)
    for operand in (0, 1):
        if node.is_constant(1 - operand):
            return _scaling(operand, 1 - operand)

    def partials(at: At, r: Array) -> list[Share]:
        return [(i, at.ops.unbroadcast(r * at.input(1 - i), at.shape(i))) for i in (0, 1)]

    return Product(partials, signal_of(node))


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
