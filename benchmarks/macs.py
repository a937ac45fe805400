"""Multiply-adds of a graph: what bounds the time of an explanation, as the time of inference is bounded by its own."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import onnx

Shape = tuple[int, ...]


def macs_of(op_type: str, inputs: Sequence[Shape], output: Shape) -> int:
    """Multiply-adds of one node; 0 where it is neither a convolution nor a matrix product, or a shape is not known."""
    if len(inputs) < 2 or not inputs[0] or not inputs[1] or not output:
        return 0
    if op_type in ("Conv", "FusedConv"):
        return prod(output) * prod(inputs[1][1:])
    if op_type == "ConvTranspose":
        return prod(inputs[0]) * prod(inputs[1][1:])
    if "MatMul" in op_type or "Gemm" in op_type:
        return prod(output) * inputs[0][-1]
    return 0


def shapes_of(model: onnx.ModelProto) -> dict[str, Shape]:
    """Shapes of all tensors that are known; symbolic axes, the batch that is, count as 1."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        v.name: tuple(d.dim_value or 1 for d in v.type.tensor_type.shape.dim)
        for v in (*graph.input, *graph.value_info, *graph.output)
    }
    return shapes | {t.name: tuple(t.dims) for t in graph.initializer}


def macs(model: onnx.ModelProto) -> int:
    """Multiply-adds of one run on one image. What depends on weights alone is computed at load and not counted."""
    shapes = shapes_of(model)
    total = 0
    for node in model.graph.node:
        known = [shapes.get(name, ()) for name in node.input]
        total += macs_of(node.op_type, known, shapes.get(node.output[0], ()))
    return total
