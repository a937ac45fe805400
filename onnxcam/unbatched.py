"""Models that take one picture without an axis of images, (H, W, 3) say, and add that axis inside: it is put in front.

Everything else in onnxcam counts images along the first axis. So such an input becomes (1, H, W, 3), and a Squeeze
behind it gives the network what it was made for.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcam.input_spec import IMAGE_CHANNELS

# What a picture passes on its way to the axis of images.
_PASSED = set(
    "Cast Identity Transpose Add Sub Mul Div Clip DequantizeLinear QuantizeLinear Resize Pad Slice Gather".split()
)


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
    """True for an input of three axes, one of them channels, that gets an axis of images in front further on."""
    sizes = [d.dim_value if d.HasField("dim_value") else 0 for d in value.type.tensor_type.shape.dim]
    if len(sizes) != 3 or not (sizes[0] in IMAGE_CHANNELS or sizes[2] in IMAGE_CHANNELS):
        return False
    constants = {t.name: t for t in graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute}
    reached = {value.name}
    for node in graph.node:  # in topological order
        if reached.isdisjoint(node.input[:2]):
            continue
        if node.op_type == "Unsqueeze":
            return _axes(node, constants) == [0]
        if node.op_type not in _PASSED:
            return False
        reached.add(node.output[0])
    return False


def _axes(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> list[int] | None:
    given = next((list(a.ints) for a in node.attribute if a.name == "axes"), None)
    if given is None and len(node.input) > 1 and node.input[1] in constants:
        given = [int(i) for i in numpy_helper.to_array(constants[node.input[1]]).ravel()]
    return given


def _fresh(graph: onnx.GraphProto, wanted: str) -> str:
    taken = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    taken |= {t.name for t in (*graph.initializer, *graph.input)}
    while wanted in taken:
        wanted += "_"
    return wanted
