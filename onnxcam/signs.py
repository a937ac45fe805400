"""Which tensors cannot be negative, told from the graph alone (spec 2.0).

Channel-weighted maps mean little where about half of the activations are negative, so layers are offered by sign, and
rules can take a shorter form where no input is negative.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from onnxcam.dequantised import integer_range
from onnxcam.graph import Graph, Node

# Never negative, whatever comes in.
_ALWAYS = set(
    "Relu Sigmoid HardSigmoid Softmax Exp Abs Softplus Sqrt ReduceL1 ReduceL2 ReduceSumSquare LpPool "
    "GlobalLpPool Shape Size Hardmax".split()
)
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
# Large where the input is, close to zero or small where it is negative.
_MOSTLY = set("LeakyRelu PRelu Elu Selu Celu Swish HardSwish Gelu Mish".split())
_POINTWISE = set(
    "Sigmoid HardSigmoid Tanh Erf Softplus Exp Log Clip Relu Add Sub Mul Div Pow "
    "QuantizeLinear DequantizeLinear".split()
)
LONGEST_GATE = 10  # tensors; the approximation of GELU by tanh takes 8


def nonnegative_tensors(graph: Graph) -> set[str]:
    """The tensors that cannot hold a negative value, constants included."""
    known = {name for name, value in graph.constants.items() if value.dtype.kind in "fiu" and not (value < 0).any()}
    for node in graph.nodes:
        if _cannot_be_negative(node, known):
            known.update(name for name in node.outputs if name)
    return known


def mostly_positive_tensors(graph: Graph, nonnegative: Collection[str]) -> set[str]:
    """The tensors behind an activation that keeps what is positive and lets little of the rest through, as SiLU does.

    Pooled, joined or scaled by what cannot be negative, they stay so; what cannot be negative itself is in as well.
    """
    known = set(nonnegative) | set(self_gates(graph))
    for node in graph.nodes:
        if node.op_type in _MOSTLY or _carries_over(node, known) or _rounds(node, known):
            known.update(name for name in node.outputs if name)
    return known


def self_gates(graph: Graph) -> dict[str, set[str]]:
    """Products x * g where g is made of x alone, point by point: SiLU, hard swish, Mish and GELU as older opsets write
    them. For each product the tensors of its gate: weights, nothing that was seen.
    """
    found = {}
    for node in graph.nodes:
        for i in (0, 1):
            if inner := own_gate(node, i):
                found[node.outputs[0]] = inner
    return found


def own_gate(node: Node, i: int) -> set[str]:
    """The tensors of the gate that operand `i` of a product is multiplied with, where it is made of `i` alone."""
    if node.op_type != "Mul" or len(node.inputs) != 2:
        return set()
    graph, (x, gate) = node.graph, (node.inputs[i], node.inputs[1 - i])
    return _made_of(graph, gate, x) or _made_of(graph, gate, _unscaled(graph, x))


def _unscaled(graph: Graph, tensor: str) -> str:
    """`tensor` before a constant that it was multiplied with."""
    node = graph.producer(tensor)
    if node is None or node.op_type not in ("Mul", "Div"):
        return tensor
    rest = [name for name in node.inputs if name not in graph.constants]
    return rest[0] if len(rest) == 1 else tensor


def _made_of(graph: Graph, tensor: str, x: str) -> set[str]:
    """The tensors from `x` (not included) to `tensor`, where nothing else goes into it; none otherwise."""
    inner: set[str] = set()
    waiting = [tensor]
    while waiting:
        name = waiting.pop()
        if name == x or name in inner or name in graph.constants:
            continue
        node = graph.producer(name)
        if node is None or node.op_type not in _POINTWISE or len(inner) == LONGEST_GATE:
            return set()
        inner.add(name)
        waiting += [n for n in node.inputs if n]
    return inner


def _cannot_be_negative(node: Node, known: set[str]) -> bool:
    if node.op_type in _ALWAYS:
        return True
    if node.op_type == "Clip":
        low, high = (node.attr(n) if node.opset < 11 else node.constant(i) for i, n in ((1, "min"), (2, "max")))
        below_zero = high is not None and bool(np.any(np.asarray(high) < 0))
        floor = low is not None and bool(np.all(np.asarray(low) >= 0))
        return not below_zero and (node.inputs[0] in known or floor)
    if node.op_type == "ThresholdedRelu":
        return bool(node.attr("alpha", 1.0) >= 0)
    if node.op_type == "Max":
        return any(name in known for name in node.inputs)
    if node.op_type == "DequantizeLinear":
        return _dequantises_nonnegative(node, known)
    return _carries_over(node, known)


def _dequantises_nonnegative(node: Node, known: set[str]) -> bool:
    """True where the zero point is the least integer, or what was rounded could not be negative either."""
    rounding, zero = node.producer(0), node.constant(2)
    dtype = zero.dtype if zero is not None else node.graph.dtype(node.inputs[0])
    if dtype is not None and (zero is not None or not node.has(2)):
        limits = integer_range(dtype)
        if limits is not None and bool(np.all(np.asarray(0 if zero is None else zero, np.int64) == limits[0])):
            return True
    if rounding is None or rounding.inputs[0] not in known:
        return False
    if rounding.op_type == "DynamicQuantizeLinear":
        return node.inputs[0] == rounding.outputs[0] and node.inputs[2:3] == rounding.outputs[2:3]
    point = rounding.constant(2)
    same = (zero is None and point is None) or (zero is not None and point is not None and np.array_equal(zero, point))
    return rounding.op_type == "QuantizeLinear" and same


def _rounds(node: Node, known: Collection[str]) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.inputs[0] in known


def _carries_over(node: Node, known: Collection[str]) -> bool:
    """True where the outputs cannot be negative because no data input can."""
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
