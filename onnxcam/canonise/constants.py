"""Fold what depends on constants only: Constant nodes, wrapped initialisers, shape arithmetic, dequantised weights.

graph-surgeon's own `fold_constants` is not used: it reads the `value_float` of a Constant as float64, leaves
DequantizeLinear alone, ignores `start` and `end` of Shape, rewrites float shape arithmetic in integers, and loses the
outputs of a branch that are constants.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcam.canonise.evaluate import evaluate
from onnxcam.canonise.quantised.weights import stays_quantised

# Nodes of these draw random numbers, so that each run has its own.
RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout")
)
DOMAINS = frozenset((None, "", "ai.onnx", "ai.onnx.ml", "com.microsoft"))

ATTRIBUTE_TYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def lower_constants(graph: onnx.GraphProto) -> None:
    """Turn the Constant nodes of `graph`, and of the graphs inside it, into initialisers, and dense ones at that; in
    place.

    A Constant of strings stays a node.
    """
    kept = []
    for node in graph.node:
        tensor = _constant(node) if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
        if tensor is None:
            kept.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    lower_constants(inner)
    graph.initializer.extend(_dense(sparse, sparse.values.name) for sparse in graph.sparse_initializer)
    del graph.sparse_initializer[:]
    if len(kept) < len(graph.node):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copies)


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            return None
        if attribute.name == "value":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(attribute.t)
            return tensor
        if attribute.name == "sparse_value":
            return _dense(attribute.sparse_tensor, "")
        if attribute.name in ATTRIBUTE_TYPES:
            value = onnx.helper.get_attribute_value(attribute)
            return onnx.numpy_helper.from_array(np.asarray(value, ATTRIBUTE_TYPES[attribute.name]))
    return None


def _dense(sparse: onnx.SparseTensorProto, name: str) -> onnx.TensorProto:
    values = onnx.numpy_helper.to_array(sparse.values)
    indices = onnx.numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return onnx.numpy_helper.from_array(dense, name)


def fold_constants(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Replace the tensors that depend on constants only by constants; True where there was one."""
    known: set[str] = set()
    nodes = []
    for node in graph.nodes:
        if _foldable(node, known, protected):
            known.update(t.name for t in node.outputs if not t.is_empty())
            nodes.append(node)
    members = {id(node) for node in nodes}
    wanted = [
        t
        for node in nodes
        for t in node.outputs
        if not t.is_empty() and any(id(reader) not in members for reader in t.outputs)
    ]
    if not wanted:
        return False
    values = evaluate(graph, nodes, wanted)
    tensors = graph.tensors()
    for name, value in values.items():
        tensors[name].inputs.clear()
        tensors[name].to_constant(value)
    return bool(values)


def _foldable(node: gs.Node, known: set[str], protected: frozenset[str]) -> bool:
    return (
        node.op not in RANDOM
        and "Sequence" not in node.op
        and "Optional" not in node.op
        and node.domain in DOMAINS
        and not any(True for _ in node.subgraphs())
        and not any(isinstance(value, gs.Node.AttributeRef) for value in node.attrs.values())
        and not any(t.name in protected for t in node.outputs)
        and not stays_quantised(node, protected)
        and all(t.is_empty() or isinstance(t, gs.Constant) or t.name in known for t in node.inputs)
    )
