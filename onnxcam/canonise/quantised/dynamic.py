"""Dynamic quantisation: activations rounded to integers by a scale that is found anew for each input.

ConvInteger and MatMulInteger put out sums of integer products, which the file casts to float and multiplies by the
scales. Where it does just that, cast and multiplication are taken in and a Conv or MatMul of the dequantised values is
left, its weight the real one; else the float operator works on integers, and the multiplication stays.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcam.canonise.quantised.values import STANDARD, Lowering, NotLowered, dequantised_name, input_of
from onnxcam.canonise.surgery import detach, rewire
from onnxcam.dequantised import ScalesDoNotFit, dequantise

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
# What moves integers and leaves their scale as it is.
MOVES = {
    *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "MaxPool", "Slice", "Gather"),
    *("DepthToSpace", "SpaceToDepth", "Expand", "Tile"),
}


def conv_integer(at: Lowering) -> None:
    """ConvInteger(x, w, zx, zw)."""
    _integer(at, "Conv", channel=1, weight_axis=0)


def matmul_integer(at: Lowering) -> None:
    """MatMulInteger(a, b, za, zb); zero points per row of a, per column of b."""
    _integer(at, "MatMul", channel=-1, weight_axis=-1)


def dynamic_matmul(at: Lowering, a: gs.Tensor) -> gs.Tensor:
    """`a` rounded to the integers that suit it, and dequantised again."""
    parts = [at.variable(f"{a.name}_{what}") for what in ("quantised", "scale", "zero_point")]
    for part, dtype in zip(parts, (np.uint8, np.float32, np.uint8), strict=True):
        part.dtype = np.dtype(dtype)
    at.add("DynamicQuantizeLinear", f"{at.node.name}_quantise", [a], list(parts))
    return at.real_of(*parts)


def _integer(at: Lowering, op: str, channel: int, weight_axis: int) -> None:
    node = at.node
    x, w = node.inputs[0], node.inputs[1]
    zx, zw = input_of(node, 2), input_of(node, 3)
    attrs = dict(node.attrs)
    scaled = _scaled(at, channel)
    if scaled is not None:
        steps, factor, nodes, output = scaled
        inputs = []
        for q, zero, scale, axis in ((x, zx, steps[0], -2), (w, zw, steps[1], weight_axis)):
            if isinstance(q, gs.Constant):
                inputs.append(_constant(at, q, zero, factor, axis))
            else:
                assert scale is not None
                inputs.append(at.real_of(q, scale, zero))
        for link in nodes:
            detach(link)
        at.become(op, inputs, [output], **attrs)
        return
    one = at.constant(np.ones((), np.float32), f"{node.name}_one")
    unit = np.ones((), np.float32)
    inputs = [
        _constant(at, q, zero, unit, axis) if isinstance(q, gs.Constant) else at.real_of(q, one, zero)
        for q, zero, axis in ((x, zx, -2), (w, zw, weight_axis))
    ]
    (output,) = node.outputs
    whole = at.variable(f"{output.name}_real", np.float32)
    for cast in list(output.outputs):
        if cast.op == "Cast" and cast.attrs["to"] == onnx.TensorProto.FLOAT and _free(at, cast.outputs[0]):
            rewire(cast.outputs[0], whole)
            detach(cast)
    node.outputs.clear()
    at.add("Cast", f"{node.name}_integers", [whole], [output], to=onnx.TensorProto.INT32)
    at.become(op, inputs, [whole], **attrs)


Scaled = tuple[tuple[gs.Tensor | None, gs.Tensor | None], np.ndarray, list[gs.Node], gs.Tensor]


def _scaled(at: Lowering, channel: int) -> Scaled | None:
    """The multiplication by the scales behind the node.

    Returns:
        The scales of both operands where they are no constants, the product of the constant scales, the nodes that
        are taken in, and the tensor that the last of them makes; None where the file does something else.
    """
    node = at.node
    output = node.outputs[0]
    nodes: list[gs.Node] = []
    for op in ("Cast", "Mul"):
        if len(output.outputs) != 1 or not _free(at, output):
            return None
        reader = output.outputs[0]
        if reader.op != op or reader.domain not in STANDARD or (op == "Cast" and reader.attrs["to"] not in FLOATS):
            return None
        nodes.append(reader)
        before, output = output, reader.outputs[0]
    other = [t for t in nodes[-1].inputs if t is not before]
    if len(other) != 1:
        return None
    constants, scales = _factors(other[0])
    steps = []
    for q in node.inputs[:2]:
        scale = None if isinstance(q, gs.Constant) else _scale_of(q)
        if scale is not None:
            if not any(scale is s for s in scales):
                return None
            scales = _without(scales, scale)
        elif not isinstance(q, gs.Constant):
            return None
        steps.append(scale)
    if scales or sum(isinstance(q, gs.Constant) for q in node.inputs[:2]) > 1:
        return None
    factor = np.ones((), np.float32)
    for values in constants:
        factor = factor * values.astype(np.float32)
    rank = len(at.need(1).shape) if node.op == "ConvInteger" else None
    vector = _per_channel(factor, rank, channel)
    has_weight = any(isinstance(q, gs.Constant) for q in node.inputs[:2])
    # A scale for each column can go into the second operand only, and one scale of two activations into neither.
    if vector is None or (vector.size > 1 and not isinstance(node.inputs[1], gs.Constant)):
        return None
    if not has_weight and not (vector.size == 1 and vector.item() == 1):
        return None
    return (steps[0], steps[1]), vector, nodes, output


def _free(at: Lowering, tensor: gs.Tensor) -> bool:
    return tensor.name not in at.names.protected


def _factors(tensor: gs.Tensor) -> tuple[list[np.ndarray], list[gs.Tensor]]:
    """`tensor` as a product: the constants and the other factors."""
    if isinstance(tensor, gs.Constant):
        return [tensor.values], []
    if len(tensor.inputs) == 1 and tensor.inputs[0].op == "Mul":
        left, right = (_factors(t) for t in tensor.inputs[0].inputs)
        return left[0] + right[0], left[1] + right[1]
    return [], [tensor]


def _scale_of(q: gs.Tensor) -> gs.Tensor | None:
    """The tensor that holds the scale of the integers `q`, from the node that rounded them."""
    while len(q.inputs) == 1:
        maker = q.inputs[0]
        if maker.op == "DynamicQuantizeLinear" and maker.outputs[0] is q:
            return maker.outputs[1]
        if maker.op not in MOVES or isinstance(maker.inputs[0], gs.Constant):
            return None
        q = maker.inputs[0]
    return None


def _without(scales: list[gs.Tensor], scale: gs.Tensor) -> list[gs.Tensor]:
    place = next(i for i, s in enumerate(scales) if s is scale)
    return scales[:place] + scales[place + 1 :]


def _per_channel(factor: np.ndarray, rank: int | None, channel: int) -> np.ndarray | None:
    """A factor of the output as one number or a vector (channels,); None where it varies otherwise."""
    if factor.size == 1:
        return factor.reshape(())
    if channel == -1:
        return factor.reshape(-1) if factor.shape[-1] == factor.size else None
    if rank is None or factor.ndim > rank:
        return None
    full = (1,) * (rank - factor.ndim) + factor.shape
    return factor.reshape(-1) if full[channel] == factor.size else None


def _constant(at: Lowering, q: gs.Constant, zero: gs.Tensor | None, scale: np.ndarray, axis: int) -> gs.Tensor:
    if zero is not None and not isinstance(zero, gs.Constant):
        raise NotLowered
    try:
        real = dequantise(q.values, scale, None if zero is None else zero.values, axis)
    except ScalesDoNotFit as error:
        raise NotLowered from error
    return at.constant(real, dequantised_name(q.name))
