"""Ops that relevance does not enter: what computes shapes, compares, counts or draws at random."""

from onnxcam.graph import Node
from onnxcam.operators.kinds import Operator, Statistic
from onnxcam.operators.registry import operator

STOPS = (
    *("Shape", "Size", "Range", "ConstantOfShape", "Constant", "EyeLike", "NonZero", "OneHot", "NonMaxSuppression"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor", "IsNaN", "IsInf"),
    *("ArgMax", "ArgMin", "Hardmax", "Sign", "BitShift"),
    *("BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"),
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"),
)


@operator(*STOPS)
def stop(node: Node) -> Operator:
    return Statistic()
