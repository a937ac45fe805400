"""Normalisations as ONNX Runtime's optimiser fuses them: with the sum before them, by groups, without the mean."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxcam.canonise.expansion.body import Body, Operand, Refused
from onnxcam.canonise.expansion.contrib_activations import swish
from onnxcam.canonise.expansion.table import expansion


def _rms(b: Body, x: Operand, scale: Operand, epsilon: float, axis: int = -1, stash: int = 1) -> Operand:
    """x / sqrt(mean(x x) + epsilon) * scale, over the axes from `axis` (negative) on.

    Half precision is left for the sum of squares, as the fused kernels do, where `stash` says so.
    """
    if b.opset >= 23:
        return b("RMSNormalization", x, scale, axis=axis, epsilon=epsilon)
    half = b.dtype == np.float16 and stash == 1
    wide = b.cast(x, np.float32) if half else x
    kind = np.float32 if half else b.dtype
    square = b("Pow", wide, np.asarray(2, kind))
    deviation = b("Sqrt", b("Add", b.mean(square, *range(axis, 0)), np.asarray(epsilon, kind)))
    y = b("Div", wide, deviation)
    return b("Mul", b.cast(y, np.float16) if half else y, scale)


def _skipped(b: Body, bias: int) -> Operand:
    """input + skip + bias; the bias goes to the one that a MatMul makes, whose bias it was."""
    x, skip = b.input(0), b.input(1)
    if b.has(bias):
        if _is_product(x) and not _is_product(skip):
            x = b("Add", x, b.input(bias))
        else:
            skip = b("Add", skip, b.input(bias))
    return b("Add", x, skip)


def _is_product(x: gs.Tensor | None) -> bool:
    return x is not None and bool(x.inputs) and x.inputs[0].op in ("MatMul", "FusedMatMul", "Gemm")


@expansion("SkipLayerNormalization", into="Add, LayerNormalization")
def _skip_layer_normalization(b: Body) -> list[Operand]:
    total = _skipped(b, 4)
    y = b("LayerNormalization", total, b.input(2), b.input(3), axis=-1, epsilon=b.attr("epsilon", 1e-12))
    return [y, None, None, total]


@expansion("SkipSimplifiedLayerNormalization", into="Add, RMSNormalization, or Pow, ReduceMean, ... before opset 23")
def _skip_rms_normalization(b: Body) -> list[Operand]:
    total = _skipped(b, 3)
    return [_rms(b, total, b.input(2), b.attr("epsilon", 1e-12)), None, None, total]


@expansion("SimplifiedLayerNormalization", domain="", into="RMSNormalization, or Pow, ReduceMean, ... before opset 23")
@expansion("SimplifiedLayerNormalization", into="RMSNormalization, or Pow, ReduceMean, ... before opset 23")
def _rms_normalization(b: Body) -> Operand:
    axis = b.attr("axis", -1)
    axis = axis if axis < 0 else axis - len(b.shape(0))
    return _rms(b, b.input(0), b.input(1), b.attr("epsilon", 1e-5), axis, b.attr("stash_type", 1))


@expansion("LayerNormalization", into="LayerNormalization")
def _layer_normalization(b: Body) -> Operand:
    """Files of before opset 17 may have it in this domain."""
    axis, epsilon = b.attr("axis", -1), b.attr("epsilon", 1e-5)
    return b("LayerNormalization", b.input(0), b.input(1), b.input(2), axis=axis, epsilon=epsilon)


def _grouped(b: Body, x: Operand, rank: int) -> Operand:
    """Group normalisation of (N, C, ...), and the activation that goes with it."""
    groups, epsilon = b.attr("groups"), b.attr("epsilon", 1e-5)
    gamma, beta = b.constant(1), b.constant(2)
    if gamma is None or beta is None:
        raise Refused(f"{b.node.op} whose scale or bias is computed in the graph")
    if b.opset >= 21:
        y: Operand = b("GroupNormalization", x, b.number(gamma), b.number(beta), num_groups=groups, epsilon=epsilon)
    else:
        one = np.ones(groups)
        flat = b.reshape(x, 0, groups, -1)
        normal = b("InstanceNormalization", flat, b.number(one), b.number(0 * one), epsilon=epsilon)
        back = b("Reshape", normal, b("Shape", x))
        column = (-1, *(1,) * (rank - 2))
        y = b("Add", b("Mul", back, b.number(gamma.reshape(column))), b.number(beta.reshape(column)))
    return swish(b, y) if b.attr("activation", 0) == 1 else y


@expansion("GroupNorm", into="Transpose, GroupNormalization, Sigmoid, Mul, Transpose")
def _group_norm(b: Body) -> Operand:
    return _turned(b, b.input(0), len(b.shape(0)))


@expansion("SkipGroupNorm", into="Add, Transpose, GroupNormalization, Sigmoid, Mul, Transpose")
def _skip_group_norm(b: Body) -> list[Operand]:
    rank, skip = len(b.shape(0)), b.input(3)
    if not b.attr("channels_last", 1):
        raise Refused("SkipGroupNorm with channels first")
    if len(b.shape(3)) == 2:
        skip = b.unsqueeze(skip, *range(1, rank - 1))
    total = b.sum(b.input(0), skip, b.input(4))
    return [_turned(b, total, rank), total]


def _turned(b: Body, x: Operand, rank: int) -> Operand:
    if not b.attr("channels_last", 1):
        return _grouped(b, x, rank)
    y = _grouped(b, b.transpose(x, 0, rank - 1, *range(1, rank - 1)), rank)
    return b.transpose(y, 0, *range(2, rank), 1)
