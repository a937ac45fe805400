"""Lower quantised operators to float operators on dequantised values, between DequantizeLinear and QuantizeLinear.

QLinearConv(x, w) becomes QuantizeLinear(Conv(DequantizeLinear(x), DequantizeLinear(w))), and so do the other operators
that compute in integers: what is left is QDQ form, where relevance lives on real numbers, every rounding of the
deployed network still takes place, and a runtime may fuse each of these groups into the integer kernel it came from.
The integers that come out are those of the file, up to float32 rounding right at the middle between two of them.
Source: spec/relevance.md, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.canonise.quantised.dynamic import conv_integer, dynamic_matmul, matmul_integer
from onnxcam.canonise.quantised.values import STANDARD, Lowering, NotLowered
from onnxcam.canonise.surgery import Names, has
from onnxcam.dequantised import MICROSOFT


def lower_quantised(graph: gs.Graph, protected: frozenset[str]) -> bool:
    """Lower the quantised operators that can be; True where there was one.

    What cannot be lowered, as its scales are computed in the graph, stays, and its operator says so.
    """
    names = Names(graph, protected)
    changed = False
    for node in list(graph.nodes):
        lower = _LOWERINGS.get((node.domain if node.domain not in STANDARD else "", node.op))
        if lower is None or not node.outputs:
            continue
        at = Lowering(graph, node, names)
        try:
            lower(at)
        except NotLowered:
            at.undo()
            continue
        changed = True
    return changed


def _replace(at: Lowering, op: str, inputs: list[gs.Tensor], scale: int, zero: int, **attrs: Any) -> None:
    """The node becomes `op` of `inputs`, its result rounded to the integers of `scale` and `zero`."""
    last = bool(attrs.pop("channels_last", 0))
    real = at.variable(f"{at.node.outputs[0].name}_real")
    rounding = at.quantised(real, scale, zero)
    if last:
        rank = _rank(at.node.inputs[0], at)
        inputs = [_turned(at, inputs[0], (0, rank - 1, *range(1, rank - 1))), *inputs[1:]]
        made = rounding.outputs[0]
        first = at.variable(f"{made.name}_channels_first")
        rounding.outputs = [first]
        at.add("Transpose", f"{at.node.name}_channels_last", [first], [made], perm=[0, *range(2, rank), 1])
    at.become(op, inputs, [real], **attrs)


def _rank(tensor: gs.Tensor, at: Lowering) -> int:
    kernel = at.node.attrs.get("kernel_shape")
    if kernel is not None:
        return len(kernel) + 2
    if tensor.shape is None:
        raise NotLowered
    return len(tensor.shape)


def _turned(at: Lowering, tensor: gs.Tensor, perm: tuple[int, ...]) -> gs.Tensor:
    out = at.variable(f"{tensor.name}_channels_first")
    at.add("Transpose", f"{at.node.name}_channels_first", [tensor], [out], perm=list(perm))
    return out


def _conv(at: Lowering) -> None:
    """QLinearConv(x, sx, zx, w, sw, zw, sy, zy, bias); the bias counts in steps of sx * sw."""
    x, w = at.real(0, 1, 2), at.real(3, 4, 5, axis=0)
    inputs = [x, w]
    if has(at.node, 8):
        inputs.append(at.bias(8, at.need(1).astype(np.float32) * at.need(4).astype(np.float32)))
    _replace(at, "Conv", inputs, 6, 7, **at.node.attrs)


def _matmul(at: Lowering) -> None:
    """QLinearMatMul(a, sa, za, b, sb, zb, sy, zy); scales per row of a, per column of b."""
    _replace(at, "MatMul", [at.real(0, 1, 2, axis=-2), at.real(3, 4, 5, axis=-1)], 6, 7)


def _gemm(at: Lowering) -> None:
    """QGemm(a, sa, za, b, sb, zb, c, sy, zy); c counts in steps of alpha * sa * sb, and without sy the result is
    float."""
    attrs = {k: v for k, v in at.node.attrs.items() if k in ("alpha", "transA", "transB")}
    inputs = [at.real(0, 1, 2), at.real(3, 4, 5, axis=0 if attrs.get("transB", 0) else 1)]
    if has(at.node, 6):
        steps = np.float32(attrs.get("alpha", 1.0)) * at.need(1).astype(np.float32) * at.need(4).astype(np.float32)
        inputs.append(at.bias(6, steps))
    if has(at.node, 7):
        _replace(at, "Gemm", inputs, 7, 8, **attrs)
    else:
        at.become("Gemm", inputs, list(at.node.outputs), **attrs)


def _binary(op: str) -> Callable[[Lowering], None]:
    def lower(at: Lowering) -> None:
        _replace(at, op, [at.real(0, 1, 2), at.real(3, 4, 5)], 6, 7)

    return lower


def _unary(op: str, *attributes: str) -> Callable[[Lowering], None]:
    def lower(at: Lowering) -> None:
        kept = {k: v for k, v in at.node.attrs.items() if k in attributes}
        _replace(at, op, [at.real(0, 1, 2)], 3, 4, **kept)

    return lower


def _softmax(at: Lowering) -> None:
    """Before opset 13 a softmax went over all axes from `axis` on; the node says which of the two it means."""
    old, axis = at.node.attrs.get("opset", 13) < 13, at.node.attrs.get("axis", -1)
    if old != (at.graph.opset < 13):
        x = at.node.inputs[0]
        if x.shape is None or axis % len(x.shape) != len(x.shape) - 1:
            raise NotLowered
    _replace(at, "Softmax", [at.real(0, 1, 2)], 3, 4, axis=axis)


def _concat(at: Lowering) -> None:
    """QLinearConcat(sy, zy, then x, sx, zx of each)."""
    inputs = [at.real(i, i + 1, i + 2) for i in range(2, len(at.node.inputs), 3)]
    _replace(at, "Concat", inputs, 0, 1, axis=at.node.attrs["axis"])


def _where(at: Lowering) -> None:
    """QLinearWhere(condition, x, sx, zx, y, sy, zy, sz, zz)."""
    _replace(at, "Where", [at.node.inputs[0], at.real(1, 2, 3), at.real(4, 5, 6)], 7, 8)


def _nhwc_max_pool(at: Lowering) -> None:
    """NhwcMaxPool(x), integers with channels last: a MaxPool of the standard between two Transposes."""
    rank = _rank(at.node.inputs[0], at)
    x = _turned(at, at.node.inputs[0], (0, rank - 1, *range(1, rank - 1)))
    first = at.variable(f"{at.node.outputs[0].name}_channels_first")
    at.add("Transpose", f"{at.node.name}_channels_last", [first], list(at.node.outputs), perm=[0, *range(2, rank), 1])
    at.node.outputs.clear()
    at.become("MaxPool", [x], [first], **at.node.attrs)


def _matmul_to_float(at: Lowering) -> None:
    """MatMulIntegerToFloat(a, b, sa, sb, za, zb, bias)."""
    _with_bias(at, [at.real(0, 2, 4, axis=-2), at.real(1, 3, 5, axis=-1)], 6)


def _dynamic_quantize_matmul(at: Lowering) -> None:
    """DynamicQuantizeMatMul(a, b, sb, zb, bias): a is float, and rounded to the integers that suit it."""
    _with_bias(at, [dynamic_matmul(at, at.node.inputs[0]), at.real(1, 2, 3, axis=-1)], 4)


def _matmul_nbits(at: Lowering) -> None:
    """MatMulNBits(a, b, scales, zero points, group index, bias): b is (N, blocks, bytes), the weight's transpose.

    Integers of any width lie one after the other, the lowest bits first; each block along K has a scale of its own.
    """
    attrs = at.node.attrs
    n, k, bits, block = (int(attrs[name]) for name in ("N", "K", "bits", "block_size"))
    packed, scales = at.need(1), at.need(2)
    if has(at.node, 4) or attrs.get("weight_prepacked", 0) or not packed.size:
        raise NotLowered
    blocks = -(-k // block)
    q = _unpacked(packed.reshape(n, -1), bits, blocks * block).reshape(n, blocks, block).astype(np.float32)
    zero = at.values(3)
    if zero is None:
        points = np.full((n, blocks), 2 ** (bits - 1), np.float32)
    elif zero.dtype == np.uint8:
        points = _unpacked(zero.reshape(n, -1), bits, blocks).astype(np.float32)
    else:
        points = zero.reshape(n, blocks).astype(np.float32)
    real = (q - points[..., None]) * scales.reshape(n, blocks, 1).astype(np.float32)
    weight = real.reshape(n, -1)[:, :k].T.astype(scales.dtype)
    _with_bias(at, [at.node.inputs[0], at.constant(weight, f"{at.node.inputs[1].name}_real")], 5)


def _unpacked(rows: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` integers of `bits` bits in every row of bytes."""
    stream = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")
    whole = stream[:, : count * bits].reshape(len(rows), count, bits).astype(np.int32)
    return np.asarray(whole @ (1 << np.arange(bits, dtype=np.int32)))


def _with_bias(at: Lowering, inputs: list[gs.Tensor], bias: int) -> None:
    """The node becomes a MatMul, followed by an Add where it has a bias."""
    outputs = list(at.node.outputs)
    if has(at.node, bias):
        extra, product = at.node.inputs[bias], at.variable(f"{outputs[0].name}_unbiased")
        at.node.outputs.clear()
        at.add("Add", f"{at.node.name}_bias", [product, extra], outputs)
        outputs = [product]
    at.become("MatMul", inputs, outputs)


def _standard(at: Lowering) -> None:
    """QuantizeLinear and DequantizeLinear of ONNX Runtime's domain, where the standard's take the same types."""
    zero = at.node.inputs[2] if has(at.node, 2) else None
    integer = zero.dtype if zero is not None else np.dtype(np.uint8)
    vector = not isinstance(at.node.inputs[1], gs.Constant) or at.node.inputs[1].values.size > 1
    since = 10 if integer in (np.int8, np.uint8, np.int32) else 21
    if at.graph.opset < max(since, 13 if vector else 10):
        raise NotLowered
    at.become(at.node.op, list(at.node.inputs), list(at.node.outputs), **at.node.attrs)


_POOL = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides", "channels_last")
_LOWERINGS: dict[tuple[str, str], Callable[[Lowering], None]] = {
    ("", "QLinearConv"): _conv,
    ("", "QLinearMatMul"): _matmul,
    ("", "ConvInteger"): conv_integer,
    ("", "MatMulInteger"): matmul_integer,
    (MICROSOFT, "QLinearConv"): _conv,
    (MICROSOFT, "QGemm"): _gemm,
    (MICROSOFT, "QLinearAdd"): _binary("Add"),
    (MICROSOFT, "QLinearMul"): _binary("Mul"),
    (MICROSOFT, "QLinearConcat"): _concat,
    (MICROSOFT, "QLinearWhere"): _where,
    (MICROSOFT, "QLinearSigmoid"): _unary("Sigmoid"),
    (MICROSOFT, "QLinearLeakyRelu"): _unary("LeakyRelu", "alpha"),
    (MICROSOFT, "QLinearSoftmax"): _softmax,
    (MICROSOFT, "QLinearAveragePool"): _unary("AveragePool", *_POOL),
    (MICROSOFT, "QLinearGlobalAveragePool"): _unary("GlobalAveragePool", "channels_last"),
    (MICROSOFT, "NhwcMaxPool"): _nhwc_max_pool,
    (MICROSOFT, "MatMulIntegerToFloat"): _matmul_to_float,
    (MICROSOFT, "DynamicQuantizeMatMul"): _dynamic_quantize_matmul,
    (MICROSOFT, "MatMulNBits"): _matmul_nbits,
    (MICROSOFT, "QuantizeLinear"): _standard,
    (MICROSOFT, "DequantizeLinear"): _standard,
}
LOWERED = frozenset(_LOWERINGS)
