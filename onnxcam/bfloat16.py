"""Networks in bfloat16, computed in float32: few runtimes have kernels for bfloat16 on the CPU, and NumPy has no such
type.

Every bfloat16 number is a float32 number, so weights stay what they are; what is lost is the rounding between nodes.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto, numpy_helper

BFLOAT16 = TensorProto.BFLOAT16
# Attributes that hold a type.
TYPES = ("to", "dtype", "output_dtype", "stash_type")


def widened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float32 where it is in bfloat16: a copy, or `proto` itself where it has none."""
    if not any(_has_any(graph) for graph in _graphs(proto.graph)):
        return proto
    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    for graph in _graphs(wide.graph):
        for tensor in _tensors(graph):
            if tensor.data_type == BFLOAT16:
                values = numpy_helper.to_array(tensor).astype("float32")
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == BFLOAT16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for attribute in _types(graph):
            attribute.i = TensorProto.FLOAT
    return wide


def _has_any(graph: onnx.GraphProto) -> bool:
    values = (*graph.input, *graph.output, *graph.value_info)
    return (
        any(tensor.data_type == BFLOAT16 for tensor in _tensors(graph))
        or any(value.type.tensor_type.elem_type == BFLOAT16 for value in values)
        or any(True for _ in _types(graph))
    )


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all those inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t


def _types(graph: onnx.GraphProto) -> Iterator[onnx.AttributeProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in TYPES and attribute.i == BFLOAT16:
                yield attribute
