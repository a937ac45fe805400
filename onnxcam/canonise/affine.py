"""Merge affine maps per channel into the linear operator before or after them.

An affine map is an inference BatchNormalization, or a Mul, Div, Add or Sub with a constant that is one number or one
number per channel (axis 1). Neighbouring maps are composed; the composition goes into the Conv, ConvTranspose, Gemm
or MatMul that makes its input, else into the one that reads its output, and stays where neither is possible. A MatMul
of a matrix becomes a Gemm where it takes on a bias. Computed in float64, stored in the weight's dtype. Source:
spec/relevance.md, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.canonise.linear import LINEAR, geometry, shift_map, shift_taps
from onnxcam.canonise.names import unique
from onnxcam.canonise.surgery import Names, constant, detach, has, set_constant, static


class Affine(NamedTuple):
    """y = scale x + shift; each of shape () or (C,), float64. `per_channel` where it is more than a number."""

    scale: np.ndarray
    shift: np.ndarray
    per_channel: bool

    def then(self, after: Affine) -> Affine:
        """The map that applies this one first and `after` next."""
        return Affine(
            after.scale * self.scale, after.scale * self.shift + after.shift, self.per_channel or after.per_channel
        )


class Chain(NamedTuple):
    """Affine nodes in a row, the tensor that enters the first, the tensor that leaves the last, and what they do."""

    nodes: list[gs.Node]
    before: gs.Tensor
    after: gs.Tensor
    affine: Affine


ZERO, ONE = np.zeros(()), np.ones(())

ARITHMETIC = {
    # op: (constant on the right, constant on the left), each as (scale, shift) of the other operand
    "Add": (lambda c: (ONE, c), lambda c: (ONE, c)),
    "Sub": (lambda c: (ONE, -c), lambda c: (-ONE, c)),
    "Mul": (lambda c: (c, ZERO), lambda c: (c, ZERO)),
    "Div": (lambda c: (1 / c, ZERO), None),
}


def fold_into_producers(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Merge affine maps into the linear operator before them; True where one could be."""
    names = Names(graph, protected)
    folded = [_into_producer(chain, names) for chain in list(_chains(graph, protected))]
    return any(folded)


def fold_into_consumers(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Merge affine maps into the linear operator after them; True where one could be."""
    names = Names(graph, protected)
    folded = [_into_consumer(graph, chain, names) for chain in list(_chains(graph, protected))]
    return any(folded)


def _chains(graph: gs.Graph, protected: frozenset[str]) -> Iterator[Chain]:
    seen: set[int] = set()
    for node in graph.nodes:
        found = None if id(node) in seen else _affine(node)
        if found is None:
            continue
        before, affine = found
        nodes = [node]
        while _alone(nodes[-1].outputs[0], protected):
            follower = nodes[-1].outputs[0].outputs[0]
            found = _affine(follower)
            if found is None:
                break
            affine = affine.then(found[1])
            nodes.append(follower)
        seen.update(map(id, nodes))
        yield Chain(nodes, before, nodes[-1].outputs[0], affine)


def _alone(tensor: gs.Tensor, protected: frozenset[str]) -> bool:
    """True where one node reads `tensor` once, and nobody wants to see it."""
    return len(tensor.outputs) == 1 and tensor.name not in protected


def _affine(node: gs.Node) -> tuple[gs.Tensor, Affine] | None:
    """The tensor that `node` maps, and how; None where it is no affine map per channel."""
    if node.domain not in (None, "", "ai.onnx"):
        return None
    if node.op == "BatchNormalization":
        return _batchnorm(node)
    if node.op in ARITHMETIC and len(node.inputs) == 2:
        for i, rule in zip((1, 0), ARITHMETIC[node.op], strict=True):
            values = constant(node, i)
            if values is not None and rule is not None and isinstance(node.inputs[1 - i], gs.Variable):
                c = _per_channel(values, node.inputs[1 - i].shape)
                if c is None:
                    return None
                with np.errstate(divide="ignore"):
                    scale, shift = rule(c)
                return _finite(node.inputs[1 - i], np.asarray(scale), np.asarray(shift), c.ndim == 1)
    return None


def _finite(
    before: gs.Tensor, scale: np.ndarray, shift: np.ndarray, per_channel: bool
) -> tuple[gs.Tensor, Affine] | None:
    if not (np.all(np.isfinite(scale)) and np.all(np.isfinite(shift))):
        return None
    return before, Affine(scale, shift, per_channel)


def _batchnorm(node: gs.Node) -> tuple[gs.Tensor, Affine] | None:
    parameters = [constant(node, i) for i in (1, 2, 3, 4)]
    if any(p is None or p.ndim != 1 for p in parameters) or not isinstance(node.inputs[0], gs.Variable):
        return None
    if node.attrs.get("spatial", 1) != 1:
        return None
    gamma, beta, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        return _finite(node.inputs[0], scale, beta - mean * scale, True)


def _per_channel(values: np.ndarray, shape: list[int | str | None] | None) -> np.ndarray | None:
    """`values` as () or (C,) in float64 where it broadcasts along axis 1 of `shape` or everywhere; else None."""
    if shape is None or not is_float(values.dtype) or values.ndim > len(shape):
        return None
    if values.size == 1:
        return values.astype(np.float64).reshape(())
    full = (1,) * (len(shape) - values.ndim) + values.shape
    if len(shape) < 2 or full[1] != values.size or full[1] != shape[1]:
        return None
    return values.astype(np.float64).reshape(-1)


def is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _linear_weight(node: gs.Node) -> np.ndarray | None:
    """The constant weight of a linear node in float64; None where it has none, or works on more than a matrix."""
    if node.op not in LINEAR or node.domain not in (None, "", "ai.onnx"):
        return None
    weight = constant(node, 1)
    if weight is None or not is_float(weight.dtype):
        return None
    if isinstance(node.inputs[0], gs.Constant):
        return None
    if node.op == "MatMul":
        shape = node.inputs[0].shape
        if weight.ndim != 2 or shape is None or len(shape) != 2:
            return None
    if has(node, 2) and constant(node, 2) is None:
        return None
    return weight.astype(np.float64)


def _bias(node: gs.Node) -> np.ndarray:
    """What `node` adds to the product, in float64; zero where it adds nothing."""
    values = constant(node, 2)
    return ZERO if values is None else np.asarray(values.astype(np.float64) * node.attrs.get("beta", 1.0))


def _fits(values: np.ndarray, dtype: np.dtype) -> bool:
    """True where `dtype` can hold `values`: a scale may overflow float16."""
    with np.errstate(over="ignore"):
        return bool(np.all(np.isfinite(values.astype(dtype).astype(np.float64))))


def _store(node: gs.Node, weight: np.ndarray, bias: np.ndarray, names: Names) -> bool:
    """Give `node` a new weight and bias, in the old weight's dtype; False, and no change, where they do not fit in
    it."""
    dtype = node.inputs[1].values.dtype
    if not (_fits(weight, dtype) and _fits(bias, dtype)):
        return False
    set_constant(node, 1, weight.astype(dtype), f"{node.name}_weight", names)
    if np.any(bias):
        if node.op == "MatMul":
            node.op = "Gemm"
            node.attrs.clear()
        set_constant(node, 2, bias.astype(dtype), f"{node.name}_bias", names)
        node.attrs.pop("beta", None)
    else:
        while len(node.inputs) > 2:
            node.inputs.pop()
    return True


def _into_producer(chain: Chain, names: Names) -> bool:
    if not _alone(chain.before, names.protected) or len(chain.before.inputs) != 1:
        return False
    node = chain.before.inputs[0]
    weight = _linear_weight(node)
    if weight is None:
        return False
    linear = LINEAR[node.op]
    channels = (linear.out_channels(node, weight),)
    scale = np.broadcast_to(chain.affine.scale, channels)
    shift = np.broadcast_to(chain.affine.shift, channels)
    if not _store(node, linear.scale_out(node, weight, scale), _bias(node) * scale + shift, names):
        return False
    for link in chain.nodes:
        detach(link)
    node.outputs[0] = chain.after
    return True


def _into_consumer(graph: gs.Graph, chain: Chain, names: Names) -> bool:
    # A lone number between two operators is mostly part of an activation's formula, as in x * clip(x + 3, 0, 6) / 6,
    # and scaling everything alike changes no relevance.
    if not (chain.affine.per_channel or _enters(graph, chain.before)):
        return False
    if not _alone(chain.after, names.protected):
        return False
    node = chain.after.outputs[0]
    weight = _linear_weight(node)
    if weight is None or node.inputs[0] is not chain.after or node.attrs.get("transA", 0):
        return False
    linear = LINEAR[node.op]
    channels = (linear.in_channels(node, weight),)
    scale = np.broadcast_to(chain.affine.scale, channels)
    shift = np.broadcast_to(chain.affine.shift, channels)
    shifted = _shifted(node, weight, shift, chain.before.shape)
    if shifted is None:
        return False
    weight = linear.scale_in(node, weight, scale)
    if shifted.ndim < 2:
        if not _store(node, weight, _bias(node) + shifted, names):
            return False
    else:
        bias_map = shifted + _bias(node).reshape(1, -1, *[1] * (shifted.ndim - 2))
        dtype = node.inputs[1].values.dtype
        if not (_fits(bias_map, dtype) and _store(node, weight, ZERO, names)):
            return False
        _add_after(graph, node, bias_map.astype(dtype), names)
    for link in chain.nodes:
        detach(link)
    node.inputs[0] = chain.before
    return True


def _enters(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    """True where `tensor` is an input of the graph, in whatever layout."""
    while tensor.inputs and tensor.inputs[0].op == "Transpose":
        tensor = tensor.inputs[0].inputs[0]
    return any(tensor is t for t in graph.inputs)


def _shifted(node: gs.Node, weight: np.ndarray, shift: np.ndarray, shape: list[int | str | None]) -> np.ndarray | None:
    """What a `shift` (C,) of the input adds to the output: () or (M,), or (1, M, *size) where it differs at the
    borders.

    None where that cannot be told, because a size is unknown or `node` is a ConvTranspose.
    """
    if not np.any(shift):
        return ZERO
    if node.op in ("Gemm", "MatMul"):
        matrix = weight.T if node.attrs.get("transB", 0) else weight
        return np.asarray(node.attrs.get("alpha", 1.0) * (shift @ matrix))
    if node.op != "Conv":
        return None
    size = static(shape[2:])
    where = geometry(node, weight.shape[2:], size)
    if where is None:
        return None
    taps = shift_taps(node, weight, shift)
    if not any(where.begins) and not any(where.ends):
        return taps.reshape(taps.shape[0], -1).sum(axis=1)
    return None if size is None else shift_map(taps, where, size)


def _add_after(graph: gs.Graph, node: gs.Node, values: np.ndarray, names: Names) -> None:
    """Let an Add of the constant `values` follow `node` and make the tensor that `node` made."""
    output = node.outputs[0]
    inner = gs.Variable(names.fresh(f"{output.name}_unbiased"))
    bias_map = gs.Constant(names.fresh(f"{node.name}_bias_map"), values)
    node.outputs[0] = inner
    name = unique(f"{node.name}_bias", frozenset(n.name for n in graph.nodes))
    graph.nodes.append(gs.Node("Add", name, {}, [inner, bias_map], [output]))
