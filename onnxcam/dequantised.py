"""Integers and the real numbers they stand for: real = (integer - zero point) * scale.

The weights of a quantised network stay integers in its graph, each behind a DequantizeLinear, so that whoever runs the
graph may compute with integers as in deployment. To the rest of onnxcam they are constants all the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

MICROSOFT = "com.microsoft"
# Operators that compute in integers, by domain: canonising turns them into float operators between roundings.
INTEGER_OPS = {
    "": ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"),
    MICROSOFT: (
        *("QLinearConv", "QGemm", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearWhere", "QLinearSigmoid"),
        *("QLinearLeakyRelu", "QLinearSoftmax", "QLinearAveragePool", "QLinearGlobalAveragePool", "NhwcMaxPool"),
        *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"),
    ),
}


class ScalesDoNotFit(ValueError):
    """Scales or zero points are not one number, or one for each place along an axis."""


def along(values: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """One number as (), or a vector turned so that it broadcasts along `axis` of a tensor of that rank.

    Raises:
        ScalesDoNotFit: `values` are neither.
    """
    if values.size == 1:
        return values.reshape(())
    if values.ndim != 1 or not -rank <= axis < rank:
        raise ScalesDoNotFit
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def dequantise(q: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, axis: int) -> np.ndarray:
    """(q - zero) * scale in float32; vectors of scales and zero points lie along `axis`."""
    real = q.astype(np.float32)
    if zero is not None:
        real = real - along(zero.astype(np.float32), q.ndim, axis)
    return np.asarray(real * along(scale.astype(np.float32), q.ndim, axis), np.float32)


Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None, int]  # integers, scale, zero point, axis


def parts(node: gs.Node) -> Parts | None:
    """What `dequantise` needs, from a DequantizeLinear of constants; None for any other node."""
    if node.op != "DequantizeLinear" or node.domain not in (None, "", "ai.onnx") or node.attrs.get("block_size", 0):
        return None
    if not all(isinstance(t, gs.Constant) for t in node.inputs):
        return None
    q, scale, *zero = (t.values for t in node.inputs)
    if q.dtype.kind not in "iu" or scale.dtype != np.float32 or (scale.ndim > 1 and scale.size > 1):
        return None
    return q, scale, zero[0] if zero else None, node.attrs.get("axis", 1)


def dequantised_constants(graph: gs.Graph) -> Iterator[tuple[str, np.ndarray]]:
    """Name and value of every tensor that a DequantizeLinear of constants makes."""
    for node in graph.nodes:
        found = parts(node)
        if found is not None and node.outputs:
            yield node.outputs[0].name, dequantise(*found)


def integer_range(dtype: np.dtype) -> tuple[int, int] | None:
    """The least and the largest number of an integer type, those of 4 and of 2 bits included; None for other types."""
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return int(info.min), int(info.max)
    if dtype.name in ("int4", "uint4", "int2", "uint2"):
        bits = int(dtype.name[-1])
        low = -(2 ** (bits - 1)) if dtype.name.startswith("i") else 0
        return low, low + 2**bits - 1
    return None
