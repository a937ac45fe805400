"""Sums of several tensors: Add, Sub, Sum, Mean. A constant operand carries no relevance."""

from onnxcam.graph import Node
from onnxcam.operators.kinds import Additive, Operator
from onnxcam.operators.registry import need_numpy_broadcasting, operator
from onnxcam.operators.roles import shifts


@operator("Add")
def add(node: Node) -> Operator:
    need_numpy_broadcasting(node)
    return Additive((1.0, 1.0), shifts(node))


@operator("Sub")
def sub(node: Node) -> Operator:
    need_numpy_broadcasting(node)
    return Additive((1.0, -1.0), shifts(node))


@operator("Sum")
def sum_(node: Node) -> Operator:
    return Additive((1.0,) * len(node.inputs))


@operator("Mean")
def mean(node: Node) -> Operator:
    return Additive((1.0 / len(node.inputs),) * len(node.inputs))
