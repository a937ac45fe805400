"""Rounding to integers and back (spec 3.2): relevance passes, and the gradient passes straight through.

The derivative of rounding is taken to be that of its argument, and 0 where the integers saturate: what quantisation
aware training does, and what PyTorch's fake_quantize computes. Operators that compute in integers are lowered to float
ones between these when the graph is canonised; those that are left have a form that cannot be.
"""

from __future__ import annotations

import numpy as np
import onnx

from onnxcam.dequantised import INTEGER_OPS, MICROSOFT, integer_range
from onnxcam.graph import Node
from onnxcam.operators.kinds import Array, At, Elementwise, Operator
from onnxcam.operators.registry import operator, refusal


def _along(at: At, i: int, axis: int) -> Array:
    """Scales or zero points in input `i`, shaped so that they broadcast along `axis`."""
    values = at.input(i)
    if values.ndim == 0:
        return values
    rank = len(at.shape(0))
    return at.ops.shaped(values, tuple(-1 if j == axis % rank else 1 for j in range(rank)))


def rounding_range(node: Node) -> tuple[int, int]:
    """The least and the largest number that a QuantizeLinear puts out."""
    zero = node.constant(2)
    if zero is not None:
        dtype = zero.dtype
    elif node.has(2):
        dtype = node.graph.dtype(node.outputs[0]) or np.dtype(np.uint8)
    else:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(node.attr("output_dtype") or onnx.TensorProto.UINT8)
    limits = integer_range(dtype)
    if limits is None:
        raise refusal(node, f"it rounds to {dtype.name}, which onnxcam does not follow")
    return limits


def _need_no_blocks(node: Node) -> None:
    scale = node.shape(1)
    if node.attr("block_size", 0) or (scale is not None and len(scale) > 1):
        raise refusal(node, f"{node.op_type} has a scale for each block of its input")


@operator("QuantizeLinear", since=10)
@operator("QuantizeLinear", domain=MICROSOFT)
def quantize_linear(node: Node) -> Operator:
    """1 / scale where round(x / scale) + zero point is in range, 0 where it saturates."""
    _need_no_blocks(node)
    low, high = rounding_range(node)
    axis = node.attr("axis", 1)

    def derivative(at: At) -> Array:
        scale = _along(at, 1, axis)
        q = at.input(0) / scale
        if at.node.has(2):
            q = q + _along(at, 2, axis)
        return at.ops.mask(q >= low - 0.5) * at.ops.mask(q <= high + 0.5) / scale

    return Elementwise(derivative)


@operator("DequantizeLinear", since=10)
@operator("DequantizeLinear", domain=MICROSOFT)
def dequantize_linear(node: Node) -> Operator:
    """The scale."""
    _need_no_blocks(node)
    axis = node.attr("axis", 1)
    return Elementwise(lambda at: at.ops.zeros_like(at.output()) + _along(at, 1, axis))


@operator("DynamicQuantizeLinear", since=11)
def dynamic_quantize_linear(node: Node) -> Operator:
    """1 / scale: the range is that of the input, so that nothing saturates. Scale and zero point are statistics."""

    def derivative(at: At) -> Array:
        return at.ops.zeros_like(at.input()) + 1 / at.output(1)

    return Elementwise(derivative)


def _left(node: Node) -> Operator:
    """An operator on integers that was not lowered."""
    raise refusal(
        node,
        f"{node.op_type} can be followed only where scales, zero points and weights are constants of the file, the "
        "scales of activations one number each",
    )


for _domain, _ops in INTEGER_OPS.items():
    operator(*_ops, domain=_domain)(_left)
