"""Conv, ConvTranspose, Gemm and MatMul over grids of attributes (spec 3.0, 3.1).

Oracle for values: ONNX Runtime in float32, 1e-5. Oracle for the product: the adjoint identity in float64, 1e-10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from walking import ENGINES, as_written, carry

from onnxcam.composites import COMPOSITES
from tests.operators.single_node import Single, agree, build, check_map, cotangents, runtime

GRADIENT = COMPOSITES["gradient"]
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


@dataclass(frozen=True)
class Weighed:
    """A node whose weight, and bias, are inputs like its data; and the same in torch."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    attributes: dict[str, Any]
    torch: Callable[..., torch.Tensor]


WEIGHED = {
    "conv": Weighed(
        "Conv",
        ((2, 4, 7, 8), (6, 2, 3, 2), (6,)),
        {"group": 2, "strides": [2, 1], "dilations": [1, 2], "pads": [1, 0, 2, 1]},
        lambda x, w, b: F.conv2d(F.pad(x, (0, 1, 1, 2)), w, b, (2, 1), 0, (1, 2), 2),
    ),
    "conv with a weight of its own for each image": Weighed(
        "Conv",
        ((1, 6, 5, 5), (9, 2, 3, 3)),
        {"group": 3, "pads": [1] * 4},
        lambda x, w: F.conv2d(x, w, None, 1, 1, 1, 3),
    ),
    "depthwise conv": Weighed(
        "Conv",
        ((2, 3, 6, 6), (3, 1, 3, 3)),
        {"group": 3, "strides": [2, 2]},
        lambda x, w: F.conv2d(x, w, None, 2, 0, 1, 3),
    ),
    "conv over a line": Weighed("Conv", ((2, 3, 9), (2, 3, 4)), {"strides": [3]}, lambda x, w: F.conv1d(x, w, None, 3)),
    "transposed conv": Weighed(
        "ConvTranspose",
        ((2, 4, 5, 4), (4, 3, 3, 2), (6,)),
        {"group": 2, "strides": [2, 3], "pads": [1, 0, 1, 0], "output_padding": [1, 0]},
        lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 3), (1, 0), (1, 0), 2),
    ),
    "gemm": Weighed(
        "Gemm",
        ((4, 3), (5, 4), (5,)),
        {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0},
        lambda a, b, c: 0.5 * a.T @ b.T + 2 * c,
    ),
    "gemm plus a matrix": Weighed("Gemm", ((3, 4), (4, 5), (3, 1)), {}, lambda a, b, c: a @ b + c),
    "layer normalisation": Weighed(
        "LayerNormalization",
        ((2, 3, 4, 5), (4, 5), (4, 5)),
        {"axis": 2},
        lambda x, w, b: F.layer_norm(x, (4, 5)) * w + b,
    ),
    "adaptive layer normalisation": Weighed(
        "LayerNormalization",
        ((2, 3, 5), (2, 1, 5), (2, 1, 5)),
        {},
        lambda x, w, b: F.layer_norm(x, (5,)) * w + b,
    ),
    "instance normalisation": Weighed(
        "InstanceNormalization", ((2, 3, 4, 4), (3,), (3,)), {}, lambda x, w, b: F.instance_norm(x, None, None, w, b)
    ),
    "normalisation by mean and variance": Weighed(
        "MeanVarianceNormalization",
        ((2, 3, 4, 5),),
        {},
        lambda x: (x - x.mean((0, 2, 3), True)) / (x.std((0, 2, 3), False, True) + 1e-9),
    ),
    "normalisation by mean and variance of rows": Weighed(
        "MeanVarianceNormalization",
        ((2, 3, 5),),
        {"axes": [-1]},
        lambda x: (x - x.mean(-1, True)) / (x.std(-1, False, True) + 1e-9),
    ),
    "group normalisation": Weighed(
        "GroupNormalization", ((2, 6, 4, 3), (6,), (6,)), {"num_groups": 3}, lambda x, w, b: F.group_norm(x, 3, w, b)
    ),
}


def _declare(model: onnx.ModelProto, shape: Sequence[int]) -> None:
    """The output's shape, which inference has no answer for in float64 here and there."""
    output = model.graph.output[0]
    output.CopyFrom(onnx.helper.make_tensor_value_info(output.name, onnx.TensorProto.DOUBLE, shape))


@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", WEIGHED.values(), ids=list(WEIGHED))
def test_a_weight_that_depends_on_the_input_gets_its_gradient(case: Weighed, engine: str, targets: int) -> None:
    """Oracle: torch's autograd in float64; sums in another order, hence 1e-10."""
    arrays = [normal(*shape).astype(np.float64) for shape in case.shapes]
    model, feeds = build(case.op, arrays, **case.attributes)
    leaves = [torch.from_numpy(a).requires_grad_() for a in arrays]
    y = case.torch(*leaves)
    _declare(model, y.shape)
    start = cotangents(y.shape, targets)
    flow = carry(engine, as_written(model), feeds | {"o0": y.detach().numpy()}, {"o0": start}, list(feeds), GRADIENT)
    for i, leaf in enumerate(leaves):
        want = [torch.autograd.grad(y, leaf, torch.from_numpy(u), retain_graph=True)[0].numpy() for u in start]
        agree(flow.relevance[f"i{i}"], np.stack(want), 1e-10)


@pytest.mark.parametrize("op, opset", [("GroupNormalization", 20)])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_scale_for_each_group_gets_its_gradient(op: str, opset: int, engine: str) -> None:
    """Before opset 21 scale and shift are one number per group. Oracle: torch's autograd in float64, 1e-10."""
    arrays = [normal(*shape).astype(np.float64) for shape in ((2, 6, 4, 3), (3,), (3,))]
    model, feeds = build(op, arrays, opset=opset, num_groups=3)
    x, w, b = (torch.from_numpy(a).requires_grad_() for a in arrays)
    y = F.group_norm(x, 3, w.repeat_interleave(2), b.repeat_interleave(2))
    _declare(model, y.shape)
    start = cotangents(y.shape, 1)
    graph = as_written(model)
    flow = carry(engine, graph, feeds | {"o0": y.detach().numpy()}, {"o0": start}, list(feeds), GRADIENT)
    want = torch.autograd.grad(y, (x, w, b), torch.from_numpy(start[0]))
    for i in range(3):
        agree(flow.relevance[f"i{i}"], want[i].numpy()[None], 1e-10)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["relevance_cam", "epsilon_plus", "epsilon_alpha2_beta1"])
@pytest.mark.parametrize("case", ["conv with a weight of its own for each image", "transposed conv"])
def test_relevance_goes_to_what_a_computed_weight_weighs(case: str, name: str, engine: str) -> None:
    """It is what the same weight as a constant of the file gives, and the weight gets none."""
    given = WEIGHED[case]
    raw, *rest = [normal(*shape).astype(np.float64) for shape in given.shapes[1:]]
    arrays = [normal(*given.shapes[0]).astype(np.float64), torch.softmax(torch.from_numpy(raw), -1).numpy(), *rest]
    y = given.torch(*map(torch.from_numpy, arrays)).numpy()
    start, found = cotangents(y.shape), []
    for constants in ((), range(1, len(arrays))):
        model, _ = build(given.op, arrays, constants, **given.attributes)
        if not constants:
            model.graph.node.insert(0, onnx.helper.make_node("Softmax", ["w"], ["i1"], axis=-1, name="weights"))
            model.graph.input[1].name = "w"
        graph = as_written(model)
        values = {f"i{i}": a for i, a in enumerate(arrays)} | {"o0": y, "w": raw}
        found.append(carry("numpy" if constants else engine, graph, values, {"o0": start}, ["i0"], COMPOSITES[name]))
    agree(found[0].relevance["i0"], found[1].relevance["i0"], 1e-9)
    assert set(found[0].relevance) == {"i0"}


def test_a_weight_that_alone_depends_on_the_input_gets_the_relevance() -> None:
    """Bias apart, it is all handed on: z-plus conserves."""
    x, w = np.abs(normal(1, 3, 6, 6)), np.abs(normal(4, 3, 3, 3))
    for op, weight in (("Conv", w), ("ConvTranspose", w[:3])):
        model, feeds = build(op, [x, weight], (0,))
        back = Single(model, feeds, y := runtime(model, feeds)).back({"o0": np.ones((1, *y[0].shape))}, "relevance_cam")
        agree(back["i1"].sum(), np.asarray(y[0].size, np.float64), 1e-9)
        assert set(back) == {"i1"}
