"""Heads: what a file puts behind its logits, and the way back to them (spec 5).

Relevance must not start at probabilities, let alone at the number of a class: rules of the epsilon kind would flip
signs for negative logits, and a choice has no gradient. `locate_logits` walks back from an output through what squashes
logits (Softmax, Sigmoid, ...), chooses among them (ArgMax, TopK, a threshold, ...) or only writes them otherwise
(Cast, Reshape, QuantizeLinear, the ZipMap of scikit-learn's converters, ...).
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod

import numpy as np

from onnxcam.errors import ModelError
from onnxcam.graph import Graph, Node, Shape

# Ops that write numbers otherwise.
_REWRITES = {
    "Cast", "CastLike", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "QuantizeLinear", "DequantizeLinear",
    "ZipMap", "LabelEncoder", "Normalizer", "OneHot",
}  # fmt: skip
_SQUASHES = {"Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid"}
_CHOICES = {"ArgMax", "TopK", "Hardmax", "ReduceMax"}  # along the axis of classes
_DECISIONS = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual"}  # by a threshold
_SCALES = {"Log", "Exp", "Clip", "Mul", "Div", "Round", "Floor", "Ceil"}  # of probabilities


def locate_logits(graph: Graph, output: str) -> tuple[str, str | None]:
    """The tensor of logits behind `output`, and the op that squashes it (None where nothing does).

    What only changes the layout of logits is not skipped, unless it takes away the axis of classes.

    Raises:
        ModelError: nothing computes the output.
    """
    if graph.producer(output) is None:
        raise ModelError(f"no node computes the output {output!r}: there is nothing to explain")
    way, logits, squash = [output], 0, None
    while (node := graph.producer(way[-1])) is not None and (before := _before(graph, node)) is not None:
        way.append(before)
        if node.op_type in _SQUASHES or _is_softmax(graph, node):
            logits, squash = len(way) - 1, squash or (node.op_type if node.op_type in _SQUASHES else "Softmax")
        elif node.op_type in _CHOICES | _DECISIONS | {"Clip"} or _is_one_of_two(graph, node):
            logits = len(way) - 1
    while logits + 1 < len(way) and not _could_be_logits(graph, way[logits]):
        logits += 1
    return way[logits], squash


def before_rounding(graph: Graph, logits: str) -> str:
    """The tensor that `logits` are a rounding of, itself where they are none: where relevance begins.

    The range of a rounding was calibrated on what the network puts out, and the logit of the class it predicts lies at
    the end of it or beyond, where rounding has no derivative at all.
    """
    node = graph.producer(logits)
    rounded = graph.producer(node.inputs[0]) if node is not None and node.op_type == "DequantizeLinear" else None
    return rounded.inputs[0] if rounded is not None and rounded.op_type == "QuantizeLinear" else logits


def _before(graph: Graph, node: Node) -> str | None:
    """What the numbers that `node` puts out were before it; None where it is no part of a head."""
    op = node.op_type
    if op in _REWRITES or op in _SQUASHES:
        return node.inputs[0]
    if (written := _is_softmax(graph, node)) is not None:
        return written
    if op in _CHOICES:
        return node.inputs[0] if _chooses_class(graph, node) else None
    if op in _DECISIONS:
        return node.inputs[0] if node.is_constant(1) else None
    if op in _SCALES:
        rest = [i for i in range(len(node.inputs)) if node.has(i) and not node.is_constant(i)]
        return node.inputs[0] if rest == [0] and (op == "Clip" or _squashed(graph, node.inputs[0])) else None
    if op == "Where" and node.is_constant(2) and _squashed(graph, node.inputs[1]):
        return node.inputs[1]  # probabilities, small ones blotted out
    if op in ("Gather", "ArrayFeatureExtractor") and node.is_constant(0):  # names of classes by their numbers
        return node.inputs[1]
    return _is_one_of_two(graph, node)


def _is_softmax(graph: Graph, node: Node) -> str | None:
    """z where the node is a softmax over classes written out, exp(z - max z) / sum exp(z - max z); else None."""
    if node.op_type != "Div":
        return None
    exponential, total = (_behind(graph, name, _COPIES) for name in node.inputs)
    if exponential is None or exponential.op_type != "Exp" or total is None or total.op_type != "ReduceSum":
        return None
    summed, shape = _behind(graph, total.inputs[0], {"Identity", "Cast"}), graph.shape(node.outputs[0])
    if summed is not exponential or shape is None or not one_row_each(shape) or len(shape) < 2:
        return None
    if graph.shape(total.inputs[0]) != shape:
        return None
    axes = _axes(total, len(shape))
    if any(shape[a] == 1 for a in axes) or 0 in axes:
        return None
    shifted = graph.producer(exponential.inputs[0])
    if shifted is not None and shifted.op_type == "Sub":
        most = _behind(graph, shifted.inputs[1], _COPIES)
        if most is not None and most.op_type == "ReduceMax" and most.inputs[0] == shifted.inputs[0]:
            return shifted.inputs[0]
    return exponential.inputs[0]


_COPIES = {"Identity", "Cast", "Expand", "Reshape", "Unsqueeze"}


def _behind(graph: Graph, tensor: str, ops: Collection[str]) -> Node | None:
    """What makes a tensor, but for nodes that only copy it."""
    node = graph.producer(tensor)
    while node is not None and node.op_type in ops:
        node = graph.producer(node.inputs[0])
    return node


def _squashed(graph: Graph, tensor: str) -> bool:
    """True where `tensor` is what a squash puts out, rewritten at most."""
    node = graph.producer(tensor)
    while node is not None and (
        node.op_type in _REWRITES or (node.op_type in _SCALES and not _is_softmax(graph, node))
    ):
        node = graph.producer(node.inputs[0])
    return node is not None and (node.op_type in _SQUASHES or _is_softmax(graph, node) is not None)


def _chooses_class(graph: Graph, node: Node) -> bool:
    """True where a choice or a maximum runs over classes: the operand has no other axis than them and the batch."""
    shape = graph.shape(node.inputs[0])
    if shape is None:
        return node.op_type != "ReduceMax"
    return one_row_each(shape) and (len(shape) == 1 or _axes(node, len(shape)) != [0])


def _axes(node: Node, rank: int) -> list[int]:
    if node.op_type in ("ReduceMax", "ReduceSum"):
        axes = node.attr("axes") or (node.constant(1) if node.has(1) else None)
        return list(range(rank)) if axes is None else [int(a) % rank for a in np.ravel(axes)]
    return [int(node.attr("axis", 0 if node.op_type == "ArgMax" else -1)) % rank]


def _is_one_of_two(graph: Graph, node: Node) -> str | None:
    """p where the node writes a single probability as two, Concat(1 - p, p); else None."""
    if node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    rest, p = node.inputs
    other = graph.producer(rest)
    if other is None or other.op_type != "Sub" or other.inputs[1] != p:
        return None
    one = other.constant(0)
    return p if one is not None and one.size == 1 and float(one.ravel()[0]) == 1 else None


def _could_be_logits(graph: Graph, tensor: str) -> bool:
    shape, dtype = graph.shape(tensor), graph.dtype(tensor)
    return (dtype is None or dtype.kind == "f") and (shape is None or len(shape) > 1)


def one_row_each(shape: Shape) -> bool:
    """True for the shape of logits: one axis of classes beside the batch at most, all others of length 1."""
    return sum(n != 1 for n in shape[1:]) <= 1


def count_classes(shape: Shape, batch: int | None) -> int:
    """How many classes logits of this shape are of, as far as it tells.

    A single axis holds one logit for each image where it is as long as the batch, else the classes of the one image.
    """
    if len(shape) == 1:
        return shape[0] if isinstance(shape[0], int) and (batch == 1 or shape[0] != batch) else 1
    count = 1
    for n in shape[1:]:
        count *= n if isinstance(n, int) else 1
    return count


_POINTWISE = frozenset(
    "Add Sub Mul Div Pow Sqrt Exp Max Min Sum Identity Dropout Cast Clip Relu LeakyRelu PRelu Elu Selu Celu Gelu "
    "Sigmoid HardSigmoid HardSwish Swish Mish Tanh Softplus Softsign Erf Softmax LogSoftmax BatchNormalization "
    "LayerNormalization QuantizeLinear DequantizeLinear Concat Split Slice Neg Abs".split()
)  # what acts on each cell by itself; normalisations over channels among them
_LAYOUT = frozenset("Flatten Reshape Transpose Squeeze Unsqueeze Expand".split())
_GLOBAL = ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
_POOLS = ("AveragePool", "MaxPool", "LpPool", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")


def cells_apart(graph: Graph, tensor: str, logits: str, spatial: Shape) -> bool:
    """Whether nothing between a map and the logits mixes its cells before they are all pooled into one.

    So it is at the last layer of most convolutional networks: pointwise layers and a global pooling follow. Where it is
    not known, the answer is False.
    """
    area = prod(n if isinstance(n, int) else 0 for n in spatial)
    if not spatial or not area:
        return False
    pooled = {tensor: area == 1}
    for node in graph.between([tensor], logits):
        seen = [name for name in node.inputs if name in pooled]
        if (
            all(pooled[name] for name in seen)
            or node.op_type in _GLOBAL
            or (node.op_type in _POOLS and _pools(graph, node, area))
        ):
            state = True
        elif _is_pointwise(node, graph):
            state = False
        else:
            return False
        pooled.update(dict.fromkeys(node.outputs, state))
    return pooled.get(logits, False)


def _is_pointwise(node: Node, graph: Graph) -> bool:
    if node.op_type == "Conv":
        weight = graph.shape(node.inputs[1])
        kernel = () if weight is None else weight[2:]
        ones = bool(kernel) and all(n == 1 for n in kernel)
        return ones and all(n == 1 for n in node.attr("strides", ())) and not any(node.attr("pads", ()))
    if node.op_type == "MatMul":  # of the channels, where they come last
        before = graph.shape(node.inputs[0])
        return node.is_constant(1) and before is not None and len(before) > 2
    return node.op_type in _POINTWISE or node.op_type in _LAYOUT


def _pools(graph: Graph, node: Node, area: int) -> bool:
    """Whether as many numbers become one as a map has cells."""
    sizes = []
    for name in (node.inputs[0], node.outputs[0]):
        shape = graph.shape(name)
        if shape is None:
            return False
        sizes.append(prod(n for n in shape if isinstance(n, int)))
    return sizes[0] == area * sizes[1]
