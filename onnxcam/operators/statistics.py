"""Ops that relevance does not enter: what computes shapes, compares, counts or draws at random."""

from onnxcam.graph import Node
from onnxcam.operators.kinds import Operator, Statistic
from onnxcam.operators.registry import operator

STOPS = (
    "Shape Size Range ConstantOfShape Constant EyeLike NonZero OneHot ArgMax ArgMin NonMaxSuppression "
    "Equal Greater GreaterOrEqual Less LessOrEqual Not And Or Xor IsNaN IsInf Sign "
    "BitShift BitwiseAnd BitwiseOr BitwiseXor BitwiseNot Mod "
    "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial"
).split()


@operator(*STOPS)
def stop(node: Node) -> Operator:
    return Statistic()
