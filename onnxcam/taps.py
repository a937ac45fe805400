"""Taps: the graph-surgeon pass that exposes tensors inside a graph as outputs of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxcam.graph import Graph
from onnxcam.weights import LARGE, stub


def detach(surgeon: gs.Graph) -> dict[str, np.ndarray]:
    """Take the large weights out of a graph that is about to be exported, so that they are never copied.

    Each leaves a tensor that claims to lie in a file; a session is given the arrays instead. The graph must be a copy
    made for exporting: its constants cannot be read any more.
    """
    weights: dict[str, np.ndarray] = {}
    for name, tensor in surgeon.tensors().items():
        if not isinstance(tensor, gs.Constant) or tensor.values.nbytes < LARGE or tensor.values.dtype.kind not in "fiu":
            continue
        weights[name] = np.ascontiguousarray(tensor.values)
        tensor._values = LazyValues(stub(name, weights[name]))
    return weights


def expose(graph: Graph, tensors: Sequence[str]) -> onnx.ModelProto:
    """The model whose outputs are `tensors`, in that order, and which computes nothing else.

    Graph inputs may be tapped: they pass through an Identity. The graph handed in is not changed.
    """
    surgeon = graph.surgeon.copy()
    by_name = surgeon.tensors()
    surgeon.outputs = [_readable(surgeon, by_name[name]) for name in tensors]
    surgeon.cleanup(remove_unused_graph_inputs=False).toposort()
    return gs.export_onnx(surgeon, do_type_check=False)


def _readable(surgeon: gs.Graph, tensor: gs.Tensor) -> gs.Variable:
    """ONNX Runtime returns an output only if a node makes it; an input is copied."""
    if tensor.inputs:
        return tensor
    copy = gs.Variable(f"{tensor.name}__tap", dtype=tensor.dtype, shape=tensor.shape)
    surgeon.nodes.append(gs.Node(op="Identity", name=f"{tensor.name}__tap", inputs=[tensor], outputs=[copy]))
    return copy
