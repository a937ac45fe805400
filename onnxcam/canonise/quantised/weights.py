"""Weights that stay integers: those of linear operators whose operand was rounded to integers as well.

As float constants they would not be what is deployed: ONNX Runtime rounds float weights that it finds between quantised
activations to integers of its own choice, with one scale for all channels.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.canonise.quantised.values import STANDARD, Lowering
from onnxcam.canonise.surgery import Names, constant, has
from onnxcam.dequantised import parts

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def stays_quantised(node: gs.Node, protected: frozenset[str]) -> bool:
    """True for a DequantizeLinear of such weights or biases, which may be transposed on the way."""
    if node.op != "DequantizeLinear" or node.domain not in STANDARD or not _simple(node):
        return False
    return any(
        _reads(reader, node.outputs[0])
        or (reader.op == "Transpose" and _turnable(reader, protected) and _for_linear(reader))
        for reader in node.outputs[0].outputs
    )


def turn_weights(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Transpose the integers of such weights instead of their real values; True where there were some."""
    names = Names(graph, protected)
    changed = False
    for node in list(graph.nodes):
        if node.op != "Transpose" or len(node.inputs[0].inputs) != 1:
            continue
        maker = node.inputs[0].inputs[0]
        found = parts(maker)
        if found is None or not (_turnable(node, protected) and _for_linear(node)):
            continue
        at = Lowering(graph, node, names)
        q, scale, _, axis = found
        perm = list(node.attrs.get("perm", range(q.ndim)[::-1]))
        attrs = {"axis": perm.index(axis % q.ndim)} if scale.size > 1 else {}
        integers = at.constant(np.transpose(q, perm), f"{maker.inputs[0].name}_turned")
        at.become("DequantizeLinear", [integers, *maker.inputs[1:]], list(node.outputs), **attrs)
        changed = True
    return changed


def _simple(node: gs.Node) -> bool:
    """Constant scales, one number or a vector, and integers that are a constant or will be one once it is folded."""
    scale, (q, *_) = constant(node, 1), node.inputs
    if scale is None or scale.dtype != np.float32 or (scale.ndim > 1 and scale.size > 1):
        return False
    if node.attrs.get("block_size", 0) or (has(node, 2) and constant(node, 2) is None):
        return False
    if isinstance(q, gs.Constant):
        return parts(node) is not None
    maker = q.inputs[0] if len(q.inputs) == 1 else None
    return maker is not None and maker.op == "QuantizeLinear"


def _turnable(node: gs.Node, protected: frozenset[str]) -> bool:
    return node.domain in STANDARD and node.outputs[0].name not in protected


def _for_linear(node: gs.Node) -> bool:
    return any(_reads(reader, node.outputs[0]) for reader in node.outputs[0].outputs)


def _reads(reader: gs.Node, weight: gs.Tensor) -> bool:
    """True where `weight` is weight or bias of a linear operator whose operand was dequantised."""
    if reader.op not in LINEAR or not any(t is weight for t in reader.inputs[1:]):
        return False
    makers = reader.inputs[0].inputs
    return len(makers) == 1 and makers[0].op == "DequantizeLinear"
