"""What part a tensor plays where two meet: signal or gate, value or mixing weights, data or a statistic of them.

Told from the graph alone, by how each operand was made; so it holds for every spelling, at every opset, fused or not.

* A *gate* comes from a squashing function, or is repeated along axes of the other operand, space mostly; SiLU, hard
  swish, GELU and Mish, where a file writes them out, are products of x with a gate made of x alone.
* A *statistic* of x is made of sums over axes of x, point by point: a mean, a variance, a norm. Normalisations that a
  file writes out subtract and scale by statistics of the very data they normalise.
* The *weights* of an attention mix the rows of its *value*. Best they are known as they come from a softmax, or are
  divided by their own sum. Without any (linear attention), what a value was already mixed into is the value of the next
  product, and failing that an operand behind a kernel that cannot be negative (ReLU, ELU, exp) is weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from onnxcam.graph import Graph, Node
from onnxcam.signs import own_gate

_OPENING = {"Sigmoid", "HardSigmoid", "Softmax", "QLinearSigmoid"}
SQUASHING = {"Sigmoid", "HardSigmoid", "Softmax", "Tanh", "Clip", "Erf", "QLinearSigmoid"}
LAYOUT = {
    *("Reshape", "Flatten", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Cast", "Identity", "Dropout"),
    *("QuantizeLinear", "DequantizeLinear"),
}
_SCALING = {"Mul", "Div", "Add", "Sub"}
_PARTS = {"Slice", "Split", "Gather", "Pad", "Tile", "Concat"}
_LINEAR = {"MatMul", "Gemm", "Conv", "Einsum", "BatchNormalization"}
_BILINEAR = {"MatMul", "Einsum"}
_KERNELS = {"Relu", "Elu", "Exp", "Sigmoid", "Softplus", "HardSigmoid"}
_REDUCTIONS = {
    *("ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceMax", "ReduceMin"),
    *("ReduceLogSum", "ReduceLogSumExp", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"),
}
_POINTWISE = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Neg", "Abs", "Exp", "Log", "Clip", "Max", "Min"),
    *("Sum", "Mean", "Where"),
}
# Tensors that a search goes back over: enough for every normalisation and attention met with, and no more than a layer.
REACH = 24


def data_inputs(node: Node) -> list[int]:
    """The inputs that what the model sees flows in through."""
    return [i for i, name in enumerate(node.inputs) if name and name in node.graph.data]


def _only(node: Node) -> int | None:
    inputs = data_inputs(node)
    return inputs[0] if len(inputs) == 1 else None


# -- gates -------------------------------------------------------------------------------------------------------


def squashed(node: Node, i: int, by: Collection[str] = SQUASHING) -> bool:
    """True where operand `i` comes from a squashing function, through nothing but constants, layout and parts of it."""
    maker = node.producer(i)
    while maker is not None and maker.op_type not in by:
        before = _only(maker)
        if before is None or maker.op_type not in LAYOUT | _SCALING | _PARTS:
            return False
        maker = maker.producer(before)
    return maker is not None


def _extent(node: Node, i: int) -> int:
    """Number of axes behind the first along which operand `i` is longer than 1, before it was expanded to the other."""
    shape = node.shape(i)
    rank = 0 if shape is None else len(shape)
    maker = node.producer(i)
    while maker is not None and maker.op_type == "Expand":
        shape, maker = maker.shape(0), maker.producer(0)
    return 0 if shape is None else sum(n != 1 for k, n in enumerate(shape[::-1]) if k < rank - 1)


def signal_of(node: Node) -> int | None:
    """Which operand of a Mul is the signal; None where neither is a gate, or both are the same tensor."""
    if node.inputs[0] == node.inputs[1]:
        return None
    gates = [squashed(node, i) for i in (0, 1)]
    if all(gates):
        # What opens and closes between 0 and 1 gates what merely saturates: i tanh(...) and o tanh(c) of an LSTM.
        gates = [squashed(node, i, _OPENING) for i in (0, 1)]
    if gates[0] != gates[1]:
        return 0 if gates[1] else 1
    extents = [_extent(node, i) for i in (0, 1)]
    return None if extents[0] == extents[1] else int(extents[1] > extents[0])


def own_signal(node: Node) -> int | None:
    """The operand of a Mul that the other one merely scales, being its own gate or a statistic of it; else None."""
    for i in (0, 1):
        if own_gate(node, i) or statistic_of(node, 1 - i, i):
            return i
    return None


# -- statistics --------------------------------------------------------------------------------------------------


def reduced(graph: Graph, tensor: str) -> set[str]:
    """The tensors whose sums over axes `tensor` is made of, point by point; none where anything else goes into it."""
    roots: set[str] = set()
    seen: set[str] = set()
    waiting = [tensor]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in graph.data:
            continue
        seen.add(name)
        node = graph.producer(name)
        if node is None or len(seen) > REACH:
            return set()
        if node.op_type in _REDUCTIONS:
            roots.add(node.inputs[0])
        elif node.op_type in LAYOUT | _POINTWISE:
            waiting += [node.inputs[i] for i in data_inputs(node)]
        else:
            return set()
    return roots


def _made_from(graph: Graph, tensor: str) -> Iterator[str]:
    """`tensor` and what it was made from point by point, nearest first."""
    seen, row = {tensor}, [tensor]
    while row and len(seen) <= REACH:
        yield from row
        makers = [node for name in row if (node := graph.producer(name)) and node.op_type in LAYOUT | _POINTWISE]
        row = list(dict.fromkeys(n.inputs[i] for n in makers for i in data_inputs(n) if n.inputs[i] not in seen))
        seen.update(row)


def statistic_of(node: Node, i: int, of: int) -> bool:
    """True where operand `i` is a statistic of the data in operand `of`."""
    roots = reduced(node.graph, node.inputs[i])
    if not roots:
        return False
    data = set(_made_from(node.graph, node.inputs[of]))
    return all(_sums(node.graph, root, data) for root in roots)


def _sums(graph: Graph, root: str, data: set[str]) -> bool:
    """True where `root` was made from any of `data`, or is made of sums that were."""
    if any(name in data for name in _made_from(graph, root)):
        return True
    inner = reduced(graph, root)
    return bool(inner) and all(_sums(graph, name, data) for name in inner)


def shifts(node: Node) -> tuple[int, ...]:
    """The operands of a sum that only shift the other one by a statistic of it: the mean that is subtracted."""
    if node.op_type not in ("Add", "Sub") or len(data_inputs(node)) != 2:
        return ()
    for i in (1, 0) if node.op_type == "Add" else (1,):
        negative = node.op_type == "Sub" or _negated(node.graph, node.inputs[i])
        if negative and statistic_of(node, i, 1 - i):
            return (i,)
    return ()


def _negated(graph: Graph, tensor: str) -> bool:
    """True where what `tensor` is made of enters it negatively: as -x, c - x, or times a negative constant."""
    node = graph.producer(tensor)
    while node is not None:
        i = _only(node)
        if node.op_type == "Neg" or (node.op_type == "Sub" and i == 1):
            return True
        factor = node.constant(1 - i) if node.op_type == "Mul" and i is not None else None
        if factor is not None and bool((factor < 0).all()):
            return True
        if i is None or node.op_type not in LAYOUT | _SCALING:
            return False
        node = node.producer(i)
    return False


# -- normalisations written out ------------------------------------------------------------------------------------


def statistic_operands(node: Node) -> tuple[int, ...]:
    """The operands by which `node` centres or scales the other one with statistics of it."""
    if node.op_type in ("Add", "Sub"):
        return shifts(node)
    if node.op_type == "Div":
        return (1,) if len(data_inputs(node)) == 2 and statistic_of(node, 1, 0) else ()
    if node.op_type == "Mul" and len(data_inputs(node)) == 2:
        return tuple(i for i in (0, 1) if statistic_of(node, i, 1 - i))[:1]
    return ()


def inside_normalisations(graph: Graph) -> set[str]:
    """The tensors inside normalisations that the file writes out, all but the last: nothing to look at by themselves.

    They are the statistics with what only they read, and the signal before it is centred, scaled and shifted.
    """
    operands = {node.name: found for node in graph.nodes if (found := statistic_operands(node))}
    steps = set(operands)
    for node in graph.nodes:
        i = _only(node) if node.op_type in ("Mul", "Add") else None
        maker = node.producer(i) if i is not None else None
        if maker is not None and maker.name in steps:
            steps.add(node.name)  # the scale and the shift that are learnt
    statistics: set[str] = set()
    unfinished: set[str] = set()
    for node in reversed(graph.nodes):
        uses = [(reader, name) for name in node.outputs for reader in graph.consumers(name)]
        if not uses or set(node.outputs) & set(graph.outputs):
            continue
        onward = [reader for reader, name in uses if not _as_statistic(reader, name, operands, statistics)]
        if not onward:
            statistics.update(node.outputs)
        elif node.name in steps and len(onward) == 1 and onward[0].name in steps:
            unfinished.update(node.outputs)
    return statistics | unfinished


def _as_statistic(reader: Node, name: str, operands: dict[str, tuple[int, ...]], statistics: set[str]) -> bool:
    """True where `reader` only normalises with the tensor, or makes nothing but statistics of it."""
    places = {i for i, read in enumerate(reader.inputs) if read == name}
    return places <= set(operands.get(reader.name, ())) or set(reader.outputs) <= statistics


# -- attention ---------------------------------------------------------------------------------------------------


def value_of(node: Node) -> int | None:
    """Which operand of a bilinear product is the value, that the other one only mixes; None where that cannot be told.

    Three signs are asked in turn, and the first that speaks of one operand only decides.
    """
    if data_inputs(node) != [0, 1] or node.inputs[0] == node.inputs[1]:
        return None
    signs = (_normalised_weights, lambda node, i: _mixture(node, 1 - i), _behind_kernel)
    for sign in signs:
        weights = [sign(node, i) for i in (0, 1)]
        if weights[0] != weights[1]:
            return 1 if weights[0] else 0
    return None


def _back(node: Node, i: int, through: set[str]) -> Iterator[Node]:
    """The makers of operand `i`, as long as each has one data input and is of a type in `through`; the last is not."""
    maker = node.producer(i)
    while maker is not None:
        yield maker
        before = _only(maker)
        if before is None or maker.op_type not in through:
            return
        maker = maker.producer(before)


def _normalised_weights(node: Node, i: int) -> bool:
    """True where operand `i` comes from a softmax or was divided by its sum; heads may have been mixed since."""
    through = LAYOUT | _SCALING | _PARTS | _LINEAR | {"Where", "Clip"}
    return any(maker.op_type == "Softmax" or _divided_by_sum(maker) for maker in _back(node, i, through))


def _divided_by_sum(node: Node) -> bool:
    """True for x / sum(x), the sum perhaps kept away from zero."""
    if node.op_type != "Div" or data_inputs(node) != [0, 1]:
        return False
    through = LAYOUT | {"Add", "Clip", "Max"}
    return any(
        maker.op_type in ("ReduceSum", "ReduceL1") and maker.inputs[0] == node.inputs[0]
        for maker in _back(node, 1, through)
    )


def _mixture(node: Node, i: int) -> bool:
    """True where operand `i` is a product of weights with a value."""
    through = LAYOUT | _SCALING | _PARTS
    return any(maker.op_type in _BILINEAR and value_of(maker) is not None for maker in _back(node, i, through))


def _behind_kernel(node: Node, i: int) -> bool:
    through = LAYOUT | _SCALING | _PARTS
    return any(maker.op_type in _KERNELS for maker in _back(node, i, through))


_NORMALISING = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}


def leaves_signed(graph: Graph, logits: str) -> bool:
    """True where features of both signs go on to `logits`, as behind layer normalisation and attention: in
    transformers and their relatives, while the ReLU of a convolutional network leaves one sign."""
    for node in graph.between(graph.inputs, logits):
        if node.op_type in _NORMALISING and 0 in data_inputs(node):
            return True
        if node.op_type == "MatMul" and len(data_inputs(node)) == 2:
            return True
        if node.op_type in ("Div", "Mul") and statistic_operands(node):
            return True
    return False
