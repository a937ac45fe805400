"""Which tensors cannot be negative, told from the graph alone (spec 2.0).

Channel-weighted maps mean little where about half of the activations are negative, so layers are offered by sign, and
rules can take a shorter form where no input is negative.
"""

from __future__ import annotations

import numpy as np

from onnxcam.graph import Graph, Node

# Never negative, whatever comes in.
_ALWAYS = set(
    "Relu Sigmoid HardSigmoid Softmax Exp Abs Softplus Sqrt ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp LpPool "
    "GlobalLpPool Shape Size Hardmax".split()
) - {"ReduceLogSumExp"}
# Not negative where none of the data inputs is.
_PRESERVE = set(
    "MaxPool AveragePool GlobalAveragePool GlobalMaxPool Concat Add Sum Mean Mul Div Reshape Flatten Squeeze Unsqueeze "
    "Transpose Slice Split Gather Identity Dropout Cast Expand Tile DepthToSpace SpaceToDepth ReduceMean ReduceSum "
    "ReduceMax ReduceMin Min LRN Where LeakyRelu PRelu Elu Selu Celu Swish HardSwish Gelu Mish Tanh Erf Softsign "
    "Resize Upsample Pad Floor Ceil Round Pow Reciprocal GatherND GatherElements CumSum Trilu".split()
)
# Inputs that hold data; the others are shapes, axes, indices and do not matter.
_FIRST_ONLY = set(
    "Reshape Squeeze Unsqueeze Slice Split Gather Expand Tile ReduceMean ReduceSum ReduceMax ReduceMin Resize Upsample "
    "Pad Dropout Pow GatherND GatherElements CumSum Trilu PRelu".split()
)


def nonnegative_tensors(graph: Graph) -> set[str]:
    """The tensors that cannot hold a negative value, constants included."""
    known = {name for name, value in graph.constants.items() if value.dtype.kind in "fiu" and not (value < 0).any()}
    for node in graph.nodes:
        if _cannot_be_negative(node, known):
            known.update(name for name in node.outputs if name)
    return known


def _cannot_be_negative(node: Node, known: set[str]) -> bool:
    if node.op_type in _ALWAYS:
        return True
    if node.op_type == "Clip":
        low = node.attr("min") if node.opset < 11 else node.constant(1)
        return node.inputs[0] in known or (low is not None and bool(np.all(np.asarray(low) >= 0)))
    if node.op_type == "ThresholdedRelu":
        return bool(node.attr("alpha", 1.0) >= 0)
    if node.op_type == "Max":
        return any(name in known for name in node.inputs)
    if node.op_type in ("Resize", "Upsample") and node.attr("mode", "nearest") == "cubic":
        return False
    if node.op_type == "Pad" and node.attr("mode", "constant") == "constant":
        value = node.attr("value", 0.0) if node.opset < 11 else (node.constant(2) if node.has(2) else 0.0)
        if value is None or np.any(np.asarray(value) < 0):
            return False
    if node.op_type not in _PRESERVE:
        return False
    data = node.inputs[:1] if node.op_type in _FIRST_ONLY else node.inputs
    return all(name in known for name in data if name)
