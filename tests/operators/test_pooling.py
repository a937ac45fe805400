"""Pools and reductions over grids of attributes (spec 3.5).

Oracle for values: ONNX Runtime in float32, 1e-5. Oracle for averages: the adjoint identity in float64, 1e-10. Oracle
for maxima: ONNX Runtime's own Indices and numpy.add.at, to the last bit. Norms: the derivative of their NumPy formula.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from tests.operators.single_node import Single, Values, agree, build, check_map, cotangents, runtime
from tests.operators.test_linear import normal, sampled

PADS = ((0, 0), (1, 1), (1, 0), (0, 1), (2, 1))
SIZES = {1: (2, 3, 13), 2: (2, 3, 9, 10), 3: (1, 2, 6, 7, 5)}
GRID = [
    (rank, kernel, stride, dilation, pads, ceil)
    for rank, kernel, stride, dilation, pads, ceil in product((1, 2, 3), (1, 2, 3), (1, 2, 3), (1, 2), PADS, (0, 1))
    if max(pads) < kernel and (rank < 3 or dilation == 1)
]


def window(rank: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int], ceil: int) -> dict[str, object]:
    return {
        "kernel_shape": [kernel] * rank,
        "strides": [stride] * rank,
        "dilations": [dilation] * rank,
        "pads": [pads[0]] * rank + [pads[1]] * rank,
        "ceil_mode": ceil,
    }


@pytest.mark.parametrize("rank, kernel, stride, dilation, pads, ceil", sampled(iter(GRID), 150))
@pytest.mark.parametrize("include_pad", [0, 1])
def test_average_pool(
    rank: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int], ceil: int, include_pad: int
) -> None:
    attributes = window(rank, kernel, stride, dilation, pads, ceil)
    check_map(*build("AveragePool", [normal(*SIZES[rank])], count_include_pad=include_pad, **attributes))


AUTO = list(product(("SAME_UPPER", "SAME_LOWER", "VALID"), (2, 3), (1, 2, 3), (0, 1)))


@pytest.mark.parametrize("auto_pad, kernel, stride, include_pad", AUTO)
def test_average_pool_with_automatic_padding(auto_pad: str, kernel: int, stride: int, include_pad: int) -> None:
    check_map(
        *build(
            "AveragePool",
            [normal(2, 3, 9, 10)],
            auto_pad=auto_pad,
            kernel_shape=[kernel] * 2,
            strides=[stride] * 2,
            count_include_pad=include_pad,
        )
    )


def check_max_pool(x: np.ndarray, **attributes: object) -> None:
    model, feeds = build("MaxPool", [x], outputs=2, **attributes)
    y, index = runtime(model, feeds)
    u = cotangents(y.shape)
    back = Single(model, feeds, [y, index]).back({"o0": u})["i0"]
    expected = np.zeros((2, x.size))
    for target in range(2):
        np.add.at(expected[target], index.ravel(), u[target].ravel())
    agree(back, expected.reshape(2, *x.shape), 1e-15)


@pytest.mark.parametrize("values", ["distinct", "tied"])
@pytest.mark.parametrize("rank, kernel, stride, dilation, pads, ceil", sampled(iter(GRID), 150))
def test_max_pool_routes_to_the_indices_of_onnx_runtime(
    rank: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int], ceil: int, values: str
) -> None:
    x = normal(*SIZES[rank])
    check_max_pool(
        np.maximum(np.round(x), 0) if values == "tied" else x, **window(rank, kernel, stride, dilation, pads, ceil)
    )


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("kernel, stride", [(2, 1), (2, 2), (3, 2), (3, 3)])
def test_max_pool_with_automatic_padding(auto_pad: str, kernel: int, stride: int) -> None:
    check_max_pool(normal(2, 3, 9, 10), auto_pad=auto_pad, kernel_shape=[kernel] * 2, strides=[stride] * 2)


def test_max_pool_hands_all_of_a_window_of_equal_cells_to_the_first() -> None:
    model, feeds = build("MaxPool", [np.zeros((1, 1, 4, 4), np.float32)], kernel_shape=[2, 2], strides=[2, 2])
    back = Single(model, feeds, runtime(model, feeds)).back({"o0": np.ones((1, 1, 1, 2, 2))}, "relevance_cam")["i0"]
    expected = np.zeros((4, 4))
    expected[::2, ::2] = 1
    assert np.array_equal(back[0, 0, 0], expected)


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 5, 6), (1, 2, 3, 4, 5)])
def test_global_average_pool(shape: tuple[int, ...]) -> None:
    check_map(*build("GlobalAveragePool", [normal(*shape)]))


@pytest.mark.parametrize("op", ["GlobalMaxPool", "ReduceMax"])
def test_a_global_maximum_hands_all_to_the_largest_entry_and_evenly_to_ties(op: str) -> None:
    x = np.array([[[[1, 5], [3, 2]], [[4, 0], [4, 1]]]], np.float32)
    inputs = [x] if op == "GlobalMaxPool" else [x, np.array([-1, 2])]
    model, feeds = build(op, inputs, range(1, len(inputs)))
    back = Single(model, feeds, runtime(model, feeds)).back({"o0": np.full((1, 1, 2, 1, 1), 6.0)}, "relevance_cam")
    assert back["i0"][0, 0].tolist() == [[[0, 6], [0, 0]], [[3, 0], [3, 0]]]


@pytest.mark.parametrize("op, opset", [("ReduceMean", 13), ("ReduceMean", 18), ("ReduceSum", 11), ("ReduceSum", 13)])
@pytest.mark.parametrize("axes", [None, [1], [-1, -2], [0, 2]])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions(op: str, opset: int, axes: list[int] | None, keepdims: int) -> None:
    as_input = (op, opset) in (("ReduceMean", 18), ("ReduceSum", 13))
    inputs = [normal(2, 3, 4, 5), *([np.array(axes)] if as_input and axes else [])]
    attributes = {"axes": axes} if axes and not as_input else {}
    check_map(*build(op, inputs, opset=opset, keepdims=keepdims, **attributes))


def test_a_reduction_over_no_axes_is_the_identity_where_the_node_says_so() -> None:
    check_map(*build("ReduceSum", [normal(2, 3), np.zeros(0, np.int64)], (1,), noop_with_empty_axes=1))


@pytest.mark.parametrize("exclusive, reverse", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_cumulative_sums(exclusive: int, reverse: int, axis: int) -> None:
    check_map(*build("CumSum", [normal(3, 4, 5), np.array(axis)], exclusive=exclusive, reverse=reverse))


def numeric(formula: object, x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Gradient of <u, formula(x)> by central differences, error about 1e-9."""
    gradient = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = 1e-5
        gradient[i] = ((formula(x + step) - formula(x - step)) * u).sum() / 2e-5  # type: ignore[operator]
    return gradient


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("op", ["LpPool", "GlobalLpPool"])
def test_the_gradient_of_a_norm_is_that_of_its_formula(op: str, p: int) -> None:
    x = normal(1, 2, 4, 4).astype(np.float64)

    def formula(x: np.ndarray) -> np.ndarray:
        blocks = x.reshape(1, 2, 2, 2, 2, 2) if op == "LpPool" else x.reshape(1, 2, 1, 4, 1, 4)
        return (np.abs(blocks) ** p).sum((3, 5)) ** (1 / p)

    attributes = {"kernel_shape": [2, 2], "strides": [2, 2]} if op == "LpPool" else {}
    model, feeds = build(op, [x.astype(np.float32)], p=p, **attributes)
    agree(runtime(model, feeds)[0], formula(x.astype(np.float32)), 1e-5)
    u = cotangents(formula(x).shape, 1)
    agree(Single(model, {"i0": x}, [formula(x)]).back({"o0": u})["i0"][0], numeric(formula, x, u[0]), 1e-7)


@pytest.mark.parametrize("pads, ceil", [((0, 0), 0), ((1, 1), 0), ((1, 0), 0), ((0, 0), 1)])
@pytest.mark.parametrize("p", [1, 2])
def test_a_norm_shares_relevance_by_powers_of_magnitude(p: int, pads: tuple[int, int], ceil: int) -> None:
    """Oracle: |x|^p / y^p of a window, with y from ONNX Runtime in float32, hence 1e-5; all of it arrives."""
    attributes = window(2, 3, 2, 1, pads, ceil)
    model, feeds = build("LpPool", [normal(1, 1, 8, 8)], p=p, **attributes)
    y = runtime(model, feeds)[0]
    single = Single(model, feeds, [y])
    linear = single.operator.bind(single.at)
    agree(linear.apply(linear.x, None) ** (1 / p), y.astype(np.float64), 1e-5)
    u = np.abs(cotangents(y.shape, 1))
    back: Values = single.back({"o0": u}, "relevance_cam")
    agree(back["i0"].sum(), u.sum(), 1e-12)
    one = np.zeros_like(u)
    one[..., 1, 1] = 1
    got = single.back({"o0": one}, "relevance_cam")["i0"][0, 0, 0]
    row = slice(2 - pads[0], 5 - pads[0])
    agree(got[row, row], (np.abs(feeds["i0"].astype(np.float64)) ** p)[0, 0, row, row] / y[0, 0, 1, 1] ** p, 1e-5)


NORMS = {
    "ReduceL1": (lambda x: np.abs(x).sum(1), np.abs),
    "ReduceL2": (lambda x: np.sqrt((x * x).sum(1)), np.square),
    "ReduceSumSquare": (lambda x: (x * x).sum(1), np.square),
    "ReduceLogSum": (lambda x: np.log(x.sum(1)), lambda x: x),
    "ReduceLogSumExp": (lambda x: np.log(np.exp(x).sum(1)), np.exp),
    "ReduceProd": (lambda x: x.prod(1), np.ones_like),
}


@pytest.mark.parametrize("op", NORMS)
def test_a_reduction_shares_relevance_in_proportion_to_what_it_sums(op: str) -> None:
    """Oracle: the share amount / sum of amounts by its formula."""
    formula, amount = NORMS[op]
    x = np.abs(normal(3, 4).astype(np.float64)) + 0.1
    model, feeds = build(op, [x, np.array([1])], (1,), keepdims=0)
    u = cotangents((3,), 2)
    back = Single(model, feeds, [formula(x)]).back({"o0": u}, "relevance_cam")["i0"]
    agree(back, u[:, :, None] * amount(x) / amount(x).sum(1, keepdims=True), 1e-12)


def test_the_gradient_of_a_product_is_that_of_the_other_factors_also_beside_a_zero() -> None:
    x = np.array([[2.0, 3.0, -4.0], [2.0, 0.0, -4.0], [0.0, 0.0, 5.0]])
    model, feeds = build("ReduceProd", [x, np.array([1])], (1,), keepdims=0)
    back = Single(model, feeds, [x.prod(1)]).back({"o0": np.ones((1, 3))})["i0"][0]
    assert back.tolist() == [[-12, -8, 6], [0, -8, 0], [0, 0, 0]]


def test_a_norm_of_nothing_but_zeros_has_no_gradient_and_hands_nothing_down() -> None:
    model, feeds = build("ReduceL2", [np.zeros((2, 3)), np.array([1])], (1,), keepdims=0)
    single = Single(model, feeds, [np.zeros(2)])
    for composite in ("gradient", "relevance_cam"):
        assert not single.back({"o0": np.ones((1, 2))}, composite)["i0"].any()
