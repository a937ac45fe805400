"""Ops of `com.microsoft` that ONNX has under another name, and those that ONNX itself dropped with opset 10."""

from __future__ import annotations

import numpy as np

from onnxcam.canonise.expansion.body import Body, Operand, Refused
from onnxcam.canonise.expansion.table import expansion

LAST = 9  # opset that had the ops that ONNX dropped


@expansion("Trilu", into="Trilu")
def _trilu(b: Body) -> Operand:
    if b.opset < 14:
        raise Refused("Trilu before opset 14, where ONNX has none")
    return b("Trilu", b.input(0), b.input(1), upper=b.attr("upper", 1))


@expansion("GatherND", into="GatherND")
def _gather_nd(b: Body) -> Operand:
    if b.opset < 11:
        raise Refused("GatherND before opset 11, where ONNX has none")
    return b("GatherND", b.input(0), b.input(1))


@expansion("ExpandDims", into="Unsqueeze")
def _expand_dims(b: Body) -> Operand:
    given = b.constant(1)
    if given is None:
        raise Refused("ExpandDims along an axis that is computed in the graph")
    axis = int(given.item())
    return b.unsqueeze(b.input(0), axis if axis >= 0 else axis + len(b.shape(0)) + 1)


@expansion("Pad", into="Pad")
def _pad(b: Body) -> Operand:
    pads = b.constant(1)
    if pads is None:
        raise Refused("Pad by sizes that are computed in the graph")
    pads, mode = pads.reshape(-1), b.attr("mode", "constant")
    if b.opset >= 11:
        return b("Pad", b.input(0), b.ints(*pads), b.input(2), mode=mode)
    value = b.constant(2) if b.has(2) else np.zeros(())
    if value is None:
        raise Refused("Pad with a value that is computed in the graph")
    return b("Pad", b.input(0), mode=mode, pads=[int(p) for p in pads], value=float(value.item()))


@expansion("GridSample", into="GridSample")
def _grid_sample(b: Body) -> Operand:
    if b.opset < 16:
        raise Refused("GridSample before opset 16, where ONNX has none")
    mode = b.attr("mode", "bilinear")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if b.opset >= 20:
        mode = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    attrs = {name: b.attr(name) for name in ("align_corners", "padding_mode") if b.attr(name) is not None}
    return b("GridSample", b.input(0), b.input(1), mode=mode, **attrs)


@expansion("BiasDropout", "BitmaskBiasDropout", into="Add, Add")
def _bias_dropout(b: Body) -> Operand:
    """At rest: data + bias + residual."""
    _at_rest(b, 4)
    return b.sum(b.input(0), b.input(1), b.input(2))


@expansion("BitmaskDropout", into="Identity")
def _dropout(b: Body) -> Operand:
    _at_rest(b, 2)
    return b.input(0)


def _at_rest(b: Body, training: int) -> None:
    mode = b.constant(training)
    if b.has(training) and (mode is None or mode.item()):
        raise Refused(f"{b.node.op} in training mode")


@expansion("Affine", into="Mul, Add", domain="", until=LAST)
def _affine(b: Body) -> Operand:
    return b("Add", b("Mul", b.input(0), b.attr("alpha", 1.0)), b.attr("beta", 0.0))


@expansion("Scale", into="Mul", domain="", until=LAST)
def _scale(b: Body) -> Operand:
    return b("Mul", b.input(0), b.attr("scale", 1.0))


@expansion("ScaledTanh", into="Mul, Tanh, Mul", domain="", until=LAST)
def _scaled_tanh(b: Body) -> Operand:
    y = b("Mul", b("Tanh", b("Mul", b.input(0), b.attr("beta", 1.0))), b.attr("alpha", 1.0))
    return b.named(b.input(0), y)


@expansion("ParametricSoftplus", into="Mul, Softplus, Mul", domain="", until=LAST)
def _parametric_softplus(b: Body) -> Operand:
    y = b("Mul", b("Softplus", b("Mul", b.input(0), b.attr("beta", 1.0))), b.attr("alpha", 1.0))
    return b.named(b.input(0), y)


@expansion("ImageScaler", into="Mul, Add", domain="", until=LAST)
def _image_scaler(b: Body) -> Operand:
    scaled = b("Mul", b.input(0), b.attr("scale", 1.0))
    return b("Add", scaled, b.number(np.reshape(b.attr("bias", [0.0]), (1, -1, 1, 1))))


@expansion("Crop", into="Slice", domain="", until=LAST)
def _crop(b: Body) -> Operand:
    """(N, C, H, W) without its borders: left, top, right, bottom; or a part of a size, from the left top."""
    left, top, right, bottom = b.attr("border")
    height, width = b.attr("scale") or (None, None)
    rows = (top, top + height) if height else (top, b.size(0, 2, "height") - bottom)
    columns = (left, left + width) if width else (left, b.size(0, 3, "width") - right)
    if b.opset < 10:
        starts, ends = zip(rows, columns, strict=True)
        return b("Slice", b.input(0), starts=list(starts), ends=list(ends), axes=[2, 3])
    return b.slice(b.slice(b.input(0), *rows, 2), *columns, 3)


@expansion("Range", into="Range")
def _range(b: Body) -> Operand:
    if b.opset < 11:
        raise Refused("Range before opset 11, where ONNX has none")
    step = b.input(2) if b.has(2) else np.ones((), b.node.inputs[0].dtype)
    return b("Range", b.input(0), b.input(1), step)
