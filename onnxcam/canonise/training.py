"""Refuse a model that computes in training mode: its outputs, and every map, would depend on the batch or on chance."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxcam.canonise.surgery import constant, has
from onnxcam.errors import ModelError


def refuse_training(graph: gs.Graph, keep: frozenset[str]) -> None:
    """Raise where a node trains; drop the outputs of old BatchNormalizations that only training fills.

    Raises:
        ModelError: names the node.
    """
    used = keep | {t.name for t in graph.outputs}
    for node in graph.nodes:
        if _trains(node):
            raise ModelError(
                f"{node.op} {node.name!r} computes in training mode; export the model for inference (in PyTorch: call "
                "model.eval() before the export)"
            )
        if node.op == "BatchNormalization" and len(node.outputs) > 1:
            if any(t.outputs or t.name in used for t in node.outputs[1:]):
                raise ModelError(
                    f"BatchNormalization {node.name!r} hands out its running statistics, which only training does; "
                    "export the model for inference"
                )
            for tensor in node.outputs[1:]:
                tensor.inputs.clear()


def _trains(node: gs.Node) -> bool:
    if node.op == "BatchNormalization":
        return bool(node.attrs.get("training_mode", 0))
    if node.op == "Dropout" and has(node, 2):
        mode, ratio = constant(node, 2), constant(node, 1)
        at_rest = ratio is not None and float(ratio) == 0
        return mode is not None and bool(mode.item()) and not at_rest
    return False
