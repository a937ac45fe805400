"""Conv, ConvTranspose, Gemm and MatMul over grids of attributes (spec 3.0, 3.1).

Oracle for values: ONNX Runtime in float32, 1e-5. Oracle for the product: the adjoint identity in float64, 1e-10.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest

from onnxcam.errors import ModelError
from tests.operators.single_node import Single, agree, build, check_map, cotangents, runtime

PADS = ((0, 0), (1, 1), (1, 0), (0, 2), (2, 1))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def sampled(configs: Iterator[tuple[Any, ...]], count: int) -> list[tuple[Any, ...]]:
    """A fixed random sample of a grid."""
    every = list(configs)
    chosen = np.random.default_rng(0).choice(len(every), min(count, len(every)), replace=False)
    return [every[i] for i in sorted(chosen)]


CONV = {
    rank: sampled(product((rank,), (1, 2, 4), (1, 2, 3), (1, 2, 3), (1, 2, 3, 5), PADS, (0, 1)), count)
    for rank, count in ((1, 60), (2, 150), (3, 40))
}


@pytest.mark.parametrize("rank, group, stride, dilation, kernel, pads, extra", [c for cs in CONV.values() for c in cs])
def test_conv(
    rank: int, group: int, stride: int, dilation: int, kernel: int, pads: tuple[int, int], extra: int
) -> None:
    extent = (kernel - 1) * dilation + 1
    size = min(extent + 2 * stride + extra, 9 + extra) if rank == 3 else extent + 3 * stride + extra
    if size + 1 + sum(pads) < extent or size + sum(pads) < extent:
        size = extent
    x, w, b = normal(2, 4, *(size,) * (rank - 1), size + 1), normal(8, 4 // group, *(kernel,) * rank), normal(8)
    check_map(
        *build(
            "Conv",
            [x, w, b],
            (1, 2),
            group=group,
            strides=[stride] * rank,
            dilations=[dilation] * rank,
            pads=[pads[0]] * rank + [pads[1]] * rank,
        )
    )


@pytest.mark.parametrize("channels, multiplier", [(6, 1), (6, 2), (1, 3)])
@pytest.mark.parametrize("kernel, stride, pad", [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (5, 2, 2)])
def test_depthwise_conv(channels: int, multiplier: int, kernel: int, stride: int, pad: int) -> None:
    x, w = normal(2, channels, 8, 9), normal(channels * multiplier, 1, kernel, kernel)
    check_map(*build("Conv", [x, w], (1,), group=channels, strides=[stride] * 2, pads=[pad] * 4))


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("kernel, stride, dilation", [(2, 1, 1), (3, 1, 1), (3, 2, 1), (4, 3, 1), (2, 2, 1)])
@pytest.mark.parametrize("size", [7, 8])
def test_conv_with_automatic_padding(auto_pad: str, kernel: int, stride: int, dilation: int, size: int) -> None:
    x, w = normal(1, 3, size, size + 3), normal(4, 3, kernel, kernel)
    check_map(*build("Conv", [x, w], (1,), auto_pad=auto_pad, strides=[stride] * 2, dilations=[dilation] * 2))


def test_conv_with_a_size_of_its_own_for_each_axis() -> None:
    x, w = normal(2, 4, 9, 14), normal(6, 2, 3, 5)
    check_map(*build("Conv", [x, w], (1,), group=2, strides=[2, 3], dilations=[1, 2], pads=[0, 3, 2, 1]))


TRANSPOSED = sampled(product((1, 2, 3), (1, 2), (1, 2, 3), (1, 2), (2, 3), PADS[:4], (0, 1)), 140)


@pytest.mark.parametrize("rank, group, stride, dilation, kernel, pads, extra", TRANSPOSED)
def test_conv_transpose(
    rank: int, group: int, stride: int, dilation: int, kernel: int, pads: tuple[int, int], extra: int
) -> None:
    padding = extra if extra < max(stride, dilation) else 0
    if padding >= stride:  # ONNX Runtime refuses it
        padding = 0
    x, w, b = normal(2, 4, *(5,) * (rank - 1), 6), normal(4, 6 // group, *(kernel,) * rank), normal(6)
    check_map(
        *build(
            "ConvTranspose",
            [x, w, b],
            (1, 2),
            group=group,
            strides=[stride] * rank,
            dilations=[dilation] * rank,
            pads=[pads[0]] * rank + [pads[1]] * rank,
            output_padding=[padding] * rank,
        )
    )


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("kernel, stride, padding", [(2, 1, 0), (3, 1, 0), (3, 2, 0), (3, 2, 1), (2, 2, 0), (4, 3, 2)])
def test_conv_transpose_with_automatic_padding(auto_pad: str, kernel: int, stride: int, padding: int) -> None:
    x, w = normal(1, 3, 5, 6), normal(3, 4, kernel, kernel)
    check_map(
        *build("ConvTranspose", [x, w], (1,), auto_pad=auto_pad, strides=[stride] * 2, output_padding=[padding] * 2)
    )


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("shape", [(10, 12), (11, 13), (9, 11)])
@pytest.mark.parametrize("kernel", [2, 3])
def test_conv_transpose_to_a_given_shape(auto_pad: str, shape: tuple[int, int], kernel: int) -> None:
    x, w = normal(1, 3, 5, 6), normal(3, 4, kernel, kernel)
    check_map(*build("ConvTranspose", [x, w], (1,), auto_pad=auto_pad, strides=[2, 2], output_shape=list(shape)))


@pytest.mark.parametrize("trans_a, trans_b", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.parametrize("bias", [None, (), (1,), (5,), (1, 5), (3, 1), (3, 5)])
def test_gemm(trans_a: int, trans_b: int, constant: int, bias: tuple[int, ...] | None) -> None:
    a, b = normal(3, 4), normal(4, 5)
    inputs = [a.T.copy() if trans_a else a, b.T.copy() if trans_b else b]
    if bias is not None:
        inputs.append(np.asarray(normal(*bias)))
    check_map(
        *build("Gemm", inputs, {constant, len(inputs) - 1} - {1 - constant}, transA=trans_a, transB=trans_b, alpha=0.5)
    )


SHAPES = [
    ((3, 4), (4, 5)),
    ((2, 3, 4), (4, 5)),
    ((2, 1, 3, 4), (6, 4, 5)),
    ((6, 3, 4), (2, 1, 4, 5)),
    ((4,), (4, 5)),
    ((3, 4), (4,)),
    ((4,), (4,)),
    ((2, 3, 4), (4,)),
    ((4,), (2, 4, 5)),
]


@pytest.mark.parametrize("a, b", SHAPES)
@pytest.mark.parametrize("constant", [0, 1])
def test_matmul_by_a_constant(a: tuple[int, ...], b: tuple[int, ...], constant: int) -> None:
    single = check_map(*build("MatMul", [normal(*a), normal(*b)], (constant,)))
    assert single.operator.kind == "linear"


@pytest.mark.parametrize("a, b", SHAPES)
def test_matmul_of_two_signals_is_bilinear(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Both partial products are adjoints: <y, u> = <a, back_a(u)> = <b, back_b(u)>. Values of y from NumPy, float64."""
    x, w = normal(*a).astype(np.float64), normal(*b).astype(np.float64)
    model, feeds = build("MatMul", [x, w])
    y = np.asarray(x @ w)
    u = cotangents(y.shape)
    back = Single(model, feeds, [y]).back({"o0": u})
    expected = (y * u).reshape(2, -1).sum(1)
    for name, value in feeds.items():
        agree((back[name] * value).reshape(2, -1).sum(1), expected, 1e-10)


@pytest.mark.parametrize(
    "op, inputs, dynamic",
    [
        ("Conv", [normal(1, 2, 5, 5), normal(3, 2, 3, 3)], "weight"),
        ("Conv", [normal(1, 2, 5, 5), normal(3, 2, 3, 3), normal(3)], "bias"),
        ("ConvTranspose", [normal(1, 2, 5, 5), normal(2, 3, 3, 3)], "weight"),
        ("Gemm", [normal(2, 3), normal(3, 4)], "weight"),
        ("Gemm", [normal(2, 3), normal(3, 4), normal(4)], "bias"),
    ],
)
def test_a_weight_or_bias_that_depends_on_the_input_is_refused_by_name(
    op: str, inputs: list[np.ndarray], dynamic: str
) -> None:
    model, feeds = build(op, inputs, (1,) if dynamic == "bias" else ())
    with pytest.raises(ModelError, match=f"node '{op.lower()}': the {dynamic} of {op} .*onnxcam layers"):
        Single(model, feeds, runtime(model, feeds))
