"""Activations, normalisations, products and sums where opsets differ or an operand is computed in the graph.

The node cases of ONNX cover the newest opset; here are the older ones and the corners. Oracle: central differences in
float64 of the formula written down in NumPy, 1e-7; ONNX Runtime confirms that the formula is what it computes, 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from onnxcam.engines.array import array_ops
from onnxcam.errors import ModelError
from tests.operators.single_node import Single, agree, build, cotangents, runtime
from tests.operators.test_linear import normal

Formula = Callable[..., np.ndarray]


def check(
    op: str,
    formula: Formula,
    inputs: list[np.ndarray],
    constants: tuple[int, ...] = (),
    confirmed: bool = True,
    **attributes: Any,
) -> None:
    """The value by ONNX Runtime, the gradient of every variable operand by differences of `formula(*inputs)`."""
    floats = [a.astype(np.float64) for a in inputs]
    model, feeds = build(op, [a.astype(np.float32) for a in inputs], constants, **attributes)
    if confirmed:
        agree(runtime(model, feeds)[0].astype(np.float64), formula(*floats), 1e-5)
    model, feeds = build(op, floats, constants, **attributes)
    y = formula(*floats)
    u = cotangents(y.shape, 1)
    back = Single(model, feeds, [y]).back({"o0": u})
    assert set(back) == set(feeds)
    for i in set(range(len(inputs))) - set(constants):
        gradient = np.zeros_like(floats[i])
        for cell in np.ndindex(gradient.shape):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [a.copy() for a in floats]
                moved[i][cell] += step
                ends.append((formula(*moved) * u[0]).sum())
            gradient[cell] = (ends[0] - ends[1]) / 2e-5
        agree(back[f"i{i}"][0], gradient, 1e-7)


X = normal(2, 3, 4) * 3


@pytest.mark.parametrize("opset", [6, 7, 11, 13])
@pytest.mark.parametrize("low, high", [(-1.0, 2.0), (None, 1.0), (0.0, None), (None, None)])
def test_clip_takes_its_bounds_from_attributes_or_inputs(opset: int, low: float | None, high: float | None) -> None:
    def formula(x: np.ndarray) -> np.ndarray:
        return np.clip(x, -np.inf if low is None else low, np.inf if high is None else high)

    bounds = {k: v for k, v in (("min", low), ("max", high)) if v is not None}
    if opset < 11:
        check("Clip", formula, [X], opset=opset, **bounds)
        return
    for constants in ((), (1, 2)):
        inputs = [X.astype(np.float32), *(None if v is None else np.float32(v) for v in (low, high))]
        given = [i for i in constants if inputs[i] is not None]
        model, feeds = build("Clip", inputs, given, opset=opset)
        u = cotangents(X.shape)
        back = Single(model, feeds, runtime(model, feeds)).back({"o0": u})
        assert set(back) == {"i0"}
        inside = ((-np.inf if low is None else low) < X) & ((np.inf if high is None else high) > X)
        assert np.array_equal(back["i0"], u * inside)


@pytest.mark.parametrize("slope", [(3, 1), (1,), (4,), (2, 3, 4)])
@pytest.mark.parametrize("constants", [(), (1,)])
def test_prelu_also_with_a_slope_that_is_computed(slope: tuple[int, ...], constants: tuple[int, ...]) -> None:
    check("PRelu", lambda x, s: np.where(x > 0, x, s * x), [X, normal(*slope)], constants, opset=16)


@pytest.mark.parametrize("constants", [(), (0,), (1,)])
def test_powers_of_a_computed_base_or_exponent(constants: tuple[int, ...]) -> None:
    check("Pow", lambda x, p: x**p, [np.abs(X) + 0.5, normal(3, 1)], constants)


def test_the_power_zero_of_zero_has_no_slope() -> None:
    model, feeds = build("Pow", [np.array([0.0, 0.0, 2.0]), np.array([0.0, 1.0, 0.0])], (1,))
    back = Single(model, feeds, [np.array([1.0, 0.0, 1.0])]).back({"o0": np.ones((1, 3))})
    assert back["i0"].tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("opset, axis", [(11, None), (11, 0), (11, 2), (11, -1), (13, None), (13, 1), (13, 0)])
def test_softmax_flattens_the_axes_from_its_own_on_before_opset_13(op: str, opset: int, axis: int | None) -> None:
    default = 1 if opset < 13 else -1
    first = (default if axis is None else axis) % 3
    axes = tuple(range(first, 3)) if opset < 13 else (first,)

    def formula(x: np.ndarray) -> np.ndarray:
        log = x - np.log(np.exp(x).sum(axes, keepdims=True))
        return np.exp(log) if op == "Softmax" else log

    check(op, formula, [X / 3], opset=opset, **({} if axis is None else {"axis": axis}))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_local_response_normalisation(size: int) -> None:
    def formula(x: np.ndarray) -> np.ndarray:
        # ONNX Runtime takes odd sizes only: the specification has the longer half of an even window at the end.
        total = np.zeros_like(x)
        for c in range(x.shape[1]):
            low, high = max(0, c - (size - 1) // 2), min(x.shape[1], c + size // 2 + 1)
            total[:, c] = (x[:, low:high] ** 2).sum(1)
        return x / (1.5 + 0.3 / size * total) ** 0.6

    check("LRN", formula, [normal(1, 4, 2, 2)], (), size % 2 == 1, size=size, alpha=0.3, beta=0.6, bias=1.5)


@pytest.mark.parametrize("opset, scales", [(18, 2), (21, 4)])
def test_group_normalisation_scales_groups_before_opset_21_and_channels_after(opset: int, scales: int) -> None:
    """The formula alone: ONNX Runtime has no kernel for opset 18."""

    def formula(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
        groups = x.reshape(2, 2, 2, 3)
        groups = groups - groups.mean((2, 3), keepdims=True)
        y = (groups / np.sqrt((groups**2).mean((2, 3), keepdims=True) + 1e-3)).reshape(x.shape)
        gamma, beta = (np.repeat(a, 4 // scales)[:, None] for a in (gamma, beta))
        return gamma * y + beta

    inputs = [normal(2, 4, 3), normal(scales), normal(scales + 1)[:scales]]
    epsilon = float(np.float32(1e-3))
    check("GroupNormalization", formula, inputs, (1, 2), opset == 21, opset=opset, num_groups=2, epsilon=epsilon)


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (1, 3, 2, 2)])
def test_batch_normalisation_in_inference(opset: int, shape: tuple[int, ...]) -> None:
    gamma, beta, mean, var = normal(3), normal(4)[:3], normal(5)[:3], np.abs(normal(6)[:3]) + 0.1

    def formula(x: np.ndarray, gamma: Any, beta: Any, mean: Any, var: Any) -> np.ndarray:
        columns = (a.reshape(-1, *(1,) * (len(shape) - 2)) for a in (gamma, beta, mean, var))
        gamma, beta, mean, var = columns
        return gamma * (x - mean) / np.sqrt(var + 1e-3) + beta

    inputs = [normal(*shape), gamma, beta, mean, var]
    check("BatchNormalization", formula, inputs, (1, 2, 3, 4), opset=opset, epsilon=float(np.float32(1e-3)))


def test_batch_normalisation_in_training_mode_is_refused_by_name() -> None:
    model, feeds = build("BatchNormalization", [X, *(np.ones(3),) * 4], (1, 2, 3, 4), training_mode=1)
    with pytest.raises(ModelError, match=r"'batchnormalization'.*training mode"):
        Single(model, feeds, [X])


ACTIVATIONS: list[tuple[str, dict[str, Any]]] = [
    *((op, {}) for op in ("Relu", "Softplus", "Softsign", "Sigmoid", "Tanh", "HardSwish", "Mish", "Swish", "Atan")),
    *((op, {}) for op in ("LeakyRelu", "ThresholdedRelu", "Elu", "Celu", "Selu", "HardSigmoid", "Shrink", "Abs")),
    ("LeakyRelu", {"alpha": 0.3}),
    ("ThresholdedRelu", {"alpha": 2.0}),
    ("Elu", {"alpha": 0.5}),
    ("Celu", {"alpha": 2.0}),
    ("Selu", {"alpha": 2.0, "gamma": 3.0}),
    ("HardSigmoid", {"alpha": 0.5, "beta": 0.6}),
    ("Shrink", {"lambd": 1.5, "bias": 1.5}),
    ("Swish", {"alpha": 1.7}),
    ("Gelu", {"approximate": "tanh"}),
]


@pytest.mark.parametrize("op, attributes", ACTIVATIONS)
def test_an_activation_has_its_derivative_on_both_sides_of_every_kink(op: str, attributes: dict[str, Any]) -> None:
    """Oracle: central differences of onnx.reference in float64 from -9 to 9, 1e-7; further out it stays finite."""
    x = np.linspace(-9, 9, 181) + 0.013
    model, feeds = build(op, [x], opset=24, **attributes)
    reference = ReferenceEvaluator(model)
    ends = [reference.run(None, {"i0": x + step})[0] for step in (1e-5, -1e-5)]
    back = Single(model, feeds, reference.run(None, feeds)).back({"o0": np.ones((1, 181))})["i0"][0]
    agree(back, (ends[0] - ends[1]) / 2e-5, 1e-7)
    for dtype in (np.float32, np.float64):
        far = np.array([-1e4, -100, 0, 100, 1e4], dtype)
        model, feeds = build(op, [far], opset=24, **attributes)
        with np.errstate(all="ignore"):
            y = ReferenceEvaluator(model).run(None, feeds)
        ops = array_ops("numpy", np.dtype(dtype).name)
        assert np.isfinite(Single(model, feeds, y, ops).back({"o0": np.ones((1, 5))})["i0"]).all()


BINARY: dict[str, Formula] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
}


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("a, b", [((2, 3), (2, 3)), ((2, 3), ()), ((3,), (4, 2, 1)), ((2, 1, 4), (3, 1))])
@pytest.mark.parametrize("constants", [(), (0,), (1,)])
def test_arithmetic_sums_over_the_axes_that_were_repeated(
    op: str, a: tuple[int, ...], b: tuple[int, ...], constants: tuple[int, ...]
) -> None:
    left, right = np.asarray(normal(*a)), np.sign(normal(*b)) * (np.abs(normal(*b)) + 0.5)
    check(op, BINARY[op], [left, np.asarray(right)], constants)


@pytest.mark.parametrize("op", BINARY)
def test_the_broadcasting_of_before_opset_7_is_refused_by_name(op: str) -> None:
    model, feeds = build(op, [normal(2, 3, 4), normal(3)], (), opset=6, broadcast=1, axis=1)
    with pytest.raises(
        ModelError, match=rf"node '{op.lower()}': {op} broadcasts along an axis.*opset 6.*onnxcam layers"
    ):
        Single(model, feeds, [normal(2, 3, 4)])


@pytest.mark.parametrize("op", ["Sum", "Mean"])
def test_sums_of_many(op: str) -> None:
    def formula(*xs: np.ndarray) -> np.ndarray:
        total = xs[0] + xs[1] + xs[2]
        return total if op == "Sum" else total / 3

    check(op, formula, [normal(2, 3), normal(3), normal(2, 1)])


@pytest.mark.parametrize("op", ["Add", "Mul", "Sub"])
def test_a_tensor_that_is_both_operands_gets_both_shares(op: str) -> None:
    model, feeds = build(op, [normal(3).astype(np.float64)])
    model.graph.node[0].input.append("i0")
    x = feeds["i0"]
    u = cotangents((3,))
    back = Single(model, feeds, [BINARY[op](x, x)]).back({"o0": u})["i0"]
    agree(back, u * {"Add": 2 + 0 * x, "Mul": 2 * x, "Sub": 0 * x}[op], 1e-12)
