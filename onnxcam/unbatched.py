"""Models that take one picture without an axis of images, (H, W, 3) say, and add that axis inside: it is put in front.

Everything else in onnxcam counts images along the first axis. So such an input becomes (1, H, W, 3), and a Squeeze
behind it gives the network what it was made for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcam.canonise.names import name_nodes
from onnxcam.input_spec import IMAGE_CHANNELS

# What a picture passes on its way to the axis of images, and behind that on its way to what slides over it.
_POINTWISE = set("Cast Identity Add Sub Mul Div Clip DequantizeLinear QuantizeLinear".split())
_PASSED = _POINTWISE | {"Transpose", "Resize", "Pad", "Slice", "Gather"}
_SLIDING = set("Conv QLinearConv ConvInteger FusedConv MaxPool AveragePool Resize Upsample".split())
SMALLEST = 8  # side of a picture


def with_axis_of_images(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, frozenset[str]]:
    """The model with an axis of images in front of each input that is one picture, and the names of these inputs.

    A model without such inputs comes back as it is.
    """
    weights = {t.name for t in proto.graph.initializer}
    found = [v.name for v in proto.graph.input if v.name not in weights and _is_picture(proto.graph, v)]
    if not found:
        return proto, frozenset()
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    graph = changed.graph
    name_nodes(graph)  # before there is one more of them: unnamed ones are called by their number
    opset = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    for name in found:
        inner = _fresh(graph, f"{name}_alone")
        for node in graph.node:
            for i, read in enumerate(node.input):
                if read == name:
                    node.input[i] = inner
        squeeze = onnx.helper.make_node("Squeeze", [name], [inner], name=_fresh(graph, f"{name}_squeeze"))
        if opset < 13:
            squeeze.attribute.append(onnx.helper.make_attribute("axes", [0]))
        else:
            axes = _fresh(graph, f"{name}_axis")
            graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), axes))
            squeeze.input.append(axes)
        graph.node.insert(0, squeeze)
        (value,) = [v for v in graph.input if v.name == name]
        dims = list(value.type.tensor_type.shape.dim)
        del value.type.tensor_type.shape.dim[:]
        value.type.tensor_type.shape.dim.add(dim_value=1)
        value.type.tensor_type.shape.dim.extend(dims)
    return changed, frozenset(found)


def _is_picture(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> bool:
    """True for an input of three axes, (H, W, C) or (C, H, W), that gets an axis of images in front before anything
    slides over it."""
    dims = list(value.type.tensor_type.shape.dim)
    sizes = [d.dim_value if d.HasField("dim_value") else 0 for d in dims]
    if len(sizes) != 3 or not (_fits(sizes[1:], sizes[0]) or _fits(sizes[:2], sizes[2])):
        return False
    firsts = {v.type.tensor_type.shape.dim[0].dim_param for v in graph.output if v.type.tensor_type.shape.dim}
    if dims[0].dim_param and dims[0].dim_param in firsts:
        return False  # that counts images
    constants = {t.name: t for t in graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute}
    alone: set[str] = {value.name}
    joined: set[str] = set()
    for node in graph.node:  # in topological order
        if any(a.HasField("g") or a.graphs for a in node.attribute) and value.name in _captured(node):
            return False
        if joined.intersection(node.input[:2]):
            if node.op_type in _SLIDING:
                return True
            turned = node.op_type == "Transpose" and list(_ints(node, "perm"))[:1] == [0]
            if node.op_type in _POINTWISE or turned:
                joined.add(node.output[0])
        elif alone.intersection(node.input[:2]):
            if node.op_type == "Unsqueeze" and _axes(node, constants) == [0]:
                joined.add(node.output[0])
            elif node.op_type not in _PASSED or (node.op_type == "Gather" and not _keeps_axis(node, constants)):
                return False
            else:
                alone.add(node.output[0])
    return False


def _fits(sides: Sequence[int], channels: int) -> bool:
    return channels in IMAGE_CHANNELS and all(n == 0 or n >= SMALLEST for n in sides)


def _captured(node: onnx.NodeProto) -> set[str]:
    """What the graphs within a node read, at any depth."""
    graphs = [g for a in node.attribute for g in (*([a.g] if a.HasField("g") else []), *a.graphs)]
    return {name for g in graphs for n in g.node for name in (*n.input, *_captured(n))}


def _keeps_axis(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    return len(node.input) > 1 and node.input[1] in constants and len(constants[node.input[1]].dims) == 1


def _ints(node: onnx.NodeProto, name: str) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == name), [])


def _axes(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> list[int] | None:
    given = _ints(node, "axes") or None
    if given is None and len(node.input) > 1 and node.input[1] in constants:
        given = [int(i) for i in numpy_helper.to_array(constants[node.input[1]]).ravel()]
    return given


def _fresh(graph: onnx.GraphProto, wanted: str) -> str:
    taken = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    taken |= {t.name for t in (*graph.initializer, *graph.input)}
    while wanted in taken:
        wanted += "_"
    return wanted
