"""The part of a graph behind one tensor, as a model of its own: so that a layer can be changed and the rest run again
without what lies before it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from onnxcam.errors import ModelError
from onnxcam.graph import Graph


@dataclass(frozen=True)
class Tail:
    """A model from `tensor`, and whatever else is needed from before it (`beside`), to the logits."""

    model: onnx.ModelProto
    tensor: str
    beside: tuple[str, ...]


def tail(graph: Graph, tensor: str, logits: str) -> Tail:
    """Cut the graph at `tensor`; the graph itself is not changed.

    Raises:
        ModelError: something beside it does not go image by image, so that copies cannot share a batch.
    """
    behind = graph.between([tensor], logits)
    made = {name for node in behind for name in node.outputs}
    beside = list(
        dict.fromkeys(
            name
            for node in behind
            for name in node.inputs
            if name and name not in made and name != tensor and name not in graph.constants
        )
    )
    for name in beside:
        shape = graph.shape(name)
        if name not in graph.data or not shape:
            raise ModelError(
                f"tensor {name!r} is computed from the size of the batch and is needed behind {tensor!r}, so the rest "
                "of the model cannot be run by itself: give another method, grad-cam or relevance-cam say"
            )
    surgeon = graph.surgeon.copy()
    tensors = surgeon.tensors()
    inputs = []
    for name in (tensor, *beside):
        entry = tensors[name]
        entry.inputs.clear()
        if entry.dtype is None:
            entry.dtype = graph.dtype(name)
        if entry.shape is None:
            entry.shape = graph.shape(name)
        inputs.append(entry)
    surgeon.inputs = inputs
    surgeon.outputs = [tensors[logits]]
    surgeon.cleanup(remove_unused_graph_inputs=False).toposort()
    return Tail(gs.export_onnx(surgeon, do_type_check=False), tensor, tuple(beside))
