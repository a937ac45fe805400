"""Linear maps that ONNX Runtime fuses with what surrounds them: convolutions, Gemm and MatMul, channels last too."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcam.canonise.expansion.body import Body, Operand, Refused
from onnxcam.canonise.expansion.contrib_activations import activation, tanh_gelu
from onnxcam.canonise.expansion.table import expansion

GEOMETRY = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def _chosen(b: Body, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: b.attr(name) for name in names if b.attr(name) is not None}


@expansion("FusedConv", into="Conv, Add, activation")
def _fused_conv(b: Body) -> Operand:
    """act(conv(x) + z)."""
    y = b("Conv", b.input(0), b.input(1), b.input(2), **_chosen(b, GEOMETRY))
    return activation(b, b.sum(y, b.input(3)), b.attr("activation", ""), b.attr("activation_params", []))


@expansion("NhwcConv", "NhwcFusedConv", into="Transpose, Conv, Add, activation, Transpose")
def _nhwc_conv(b: Body) -> Operand:
    """The same on (N, ..., C); its weight is (M, ..., C/g) for CUDA and (M, C/g, ...) for ARM: the sizes tell which."""
    rank = len(b.shape(1))
    w, weight = b.input(1), b.shape(1)
    channels, group = b.size(0, -1, "number of channels"), b.attr("group", 1)
    last, first = weight[-1] * group == channels, weight[1] * group == channels
    kernel = b.attr("kernel_shape")
    if kernel is not None:
        last, first = last and weight[1:-1] == list(kernel), first and weight[2:] == list(kernel)
    if last == first:
        raise Refused(f"{b.node.op} whose weight of shape {weight} may have its channels first or last")
    if last:
        w = b.transpose(w, 0, rank - 1, *range(1, rank - 1))
    y = b("Conv", b.transpose(b.input(0), 0, rank - 1, *range(1, rank - 1)), w, b.input(2), **_chosen(b, GEOMETRY))
    y = b.transpose(y, 0, *range(2, rank), 1)
    return activation(b, b.sum(y, b.input(3)), b.attr("activation", ""), b.attr("activation_params", []))


@expansion("FusedGemm", into="Gemm, activation")
def _fused_gemm(b: Body) -> Operand:
    y = b("Gemm", b.input(0), b.input(1), b.input(2), **_chosen(b, ("alpha", "beta", "transA", "transB")))
    return activation(b, y, b.attr("activation", ""), _parameters(b))


def _parameters(b: Body) -> list[float | None]:
    """alpha, beta and gamma of the activation, without the gaps: Selu has an alpha and a gamma."""
    given = {name: b.attr(f"activation_{name}") for name in ("alpha", "beta", "gamma")}
    names = ("alpha", "gamma") if b.attr("activation") in ("Selu", b"Selu") else ("alpha", "beta")
    return [given[name] for name in names]


def _matmul(b: Body) -> Operand:
    """alpha op(A) op(B): transposed matrices, and a batch that comes after the rows.

    A constant takes in alpha, so that a bias that follows stays the bias of the linear map.
    """
    operands = [_turned(b, i) for i in (0, 1)]
    alpha = b.attr("alpha", 1.0)
    if alpha != 1:
        for i in (1, 0):
            if (constant := b.constant(i)) is not None:
                operands[i] = b.number(_as_turned(constant, _axes(b, i)) * alpha)
                return b("MatMul", *operands)
    y = b("MatMul", *operands)
    return y if alpha == 1 else b.named(y, b("Mul", y, alpha))


def _turned(b: Body, i: int) -> Operand:
    axes = _axes(b, i)
    return b.input(i) if axes is None else b.transpose(b.input(i), *axes)


def _as_turned(constant: np.ndarray, axes: list[int] | None) -> np.ndarray:
    return constant.astype(np.float64) if axes is None else constant.astype(np.float64).transpose(axes)


def _axes(b: Body, i: int) -> list[int] | None:
    """How operand `i` is to be transposed; a vector never is."""
    batch, matrix = (b.attr(f"{what}{'AB'[i]}", 0) for what in ("transBatch", "trans"))
    rank = len(b.shape(i)) if batch or matrix else 0
    if rank < 2:
        return None
    axes = [*range(1, rank - 1), 0, rank - 1] if batch else list(range(rank))
    if matrix:
        axes[-2:] = axes[:-3:-1]
    return None if axes == list(range(rank)) else axes


@expansion("FusedMatMul", "TransposeMatMul", into="Transpose, MatMul, Mul")
def _fused_matmul(b: Body) -> Operand:
    return _matmul(b)


@expansion("FusedMatMulActivation", into="Transpose, MatMul, Mul, activation")
def _fused_matmul_activation(b: Body) -> Operand:
    return activation(b, _matmul(b), b.attr("activation", ""), _parameters(b))


@expansion("GemmFastGelu", into="MatMul, Add, Gelu (by tanh)")
def _gemm_fast_gelu(b: Body) -> Operand:
    return tanh_gelu(b, b.sum(b("MatMul", b.input(0), b.input(1)), b.input(2)))


@expansion("ConvTransposeWithDynamicPads", into="ConvTranspose")
def _conv_transpose(b: Body) -> Operand:
    pads = b.constant(2)
    if pads is None:
        raise Refused("ConvTransposeWithDynamicPads whose pads are computed in the graph")
    attrs = _chosen(b, ("dilations", "group", "kernel_shape", "output_padding", "strides"))
    return b("ConvTranspose", b.input(0), b.input(1), b.input(3), pads=[int(p) for p in pads], **attrs)
