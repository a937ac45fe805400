"""Every rule against explicit matrices: the oracle knows neither convolutions nor adjoints (oracles/matrices.py).

Tolerance 1e-10 relative to the largest relevance: both sides compute in float64, and no denominator of these random
maps is closer to zero than about 1e-4 of its terms, so rounding stays below 1e-11. Both engines are held to it: what
the recorder records is computed in float64 too. What ONNX Runtime makes of it in float32 is compared with the array
engine apart, to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings, strategies as st
from oracles import matrices
from oracles.matrices import Matrix
from walking import ENGINES, RecordedWalk, as_written, carry, everywhere, network, relative

from onnxcam.composites import KINDS, Composite
from onnxcam.engines.array import ArrayOps
from onnxcam.engines.reference import ReferenceSession
from onnxcam.engines.session import RuntimeSession
from onnxcam.graph import Graph
from onnxcam.propagate import needed_taps, propagate
from onnxcam.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Pass,
    Proportional,
    SignalTakesAll,
    Vjp,
    WSquare,
    ZBox,
    ZPlus,
)
from onnxcam.taps import expose

TOLERANCE = 1e-10
OPS = ArrayOps(np, "float64")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal numbers that are float32 to the bit, so that a runtime in float32 and the oracle see the same weights."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Map:
    """A linear node: its model, the shape of its input, and its bias as it stands against the output."""

    body: str
    shape: tuple[int, ...]
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    bias: np.ndarray | None = None
    batched: bool = True  # axis 0 holds images; else the tensor is one operand as a whole
    average: bool = False
    opset: int = 17

    @property
    def images(self) -> int:
        return self.shape[0] if self.batched else 1

    def model(self, shape: tuple[int, ...], biased: bool = True) -> onnx.ModelProto:
        weights = {k: v if biased or k != "b" else 0 * v for k, v in self.weights.items()}
        dims = ",".join(map(str, shape))
        return network(f"(float[{dims}] x) => (float y) {{ {self.body} }}", self.opset, **weights)

    def matrix(self) -> Matrix:
        shape = (1, *self.shape[1:]) if self.batched else self.shape
        evaluate = matrices.by_runtime(self.model(shape, biased=False))
        return matrices.matrix_of(evaluate, shape, self.bias, self.average)


def channelwise(rank: int, *values: float) -> np.ndarray:
    return np.array(values, np.float32).reshape(-1, *(1,) * rank)


MAPS = {
    "Conv 1-D, stride 2, one-sided pads": Map(
        "y = Conv<strides=[2], pads=[2,0]>(x, w, b)",
        (2, 3, 9),
        {"w": draw(2, 3, 3), "b": np.float32([0.7, -0.4])},
        channelwise(1, 0.7, -0.4),
    ),
    "Conv 2-D, asymmetric pads, stride 2 over an even size": Map(
        "y = Conv<strides=[2,2], pads=[1,0,0,2]>(x, w, b)",
        (2, 2, 6, 5),
        {"w": draw(3, 2, 3, 3), "b": np.float32([0.7, -0.4, 1.5])},
        channelwise(2, 0.7, -0.4, 1.5),
    ),
    "Conv 2-D, two groups, dilation 2 and 1": Map(
        "y = Conv<group=2, dilations=[2,1], pads=[2,1,2,1]>(x, w, b)",
        (2, 4, 5, 4),
        {"w": draw(4, 2, 3, 3), "b": np.float32([0.7, -0.4, 1.5, 0.0])},
        channelwise(2, 0.7, -0.4, 1.5, 0.0),
    ),
    "Conv 2-D, depthwise, stride 2": Map(
        "y = Conv<group=3, strides=[2,2], pads=[1,1,1,1]>(x, w, b)",
        (2, 3, 5, 5),
        {"w": draw(3, 1, 3, 3), "b": np.float32([0.7, -0.4, 1.5])},
        channelwise(2, 0.7, -0.4, 1.5),
    ),
    "Conv 2-D, depthwise with two outputs a channel": Map(
        "y = Conv<group=2, pads=[0,1,0,1]>(x, w, b)",
        (2, 2, 3, 4),
        {"w": draw(4, 1, 1, 3), "b": np.float32([0.7, -0.4, 1.5, 0.3])},
        channelwise(2, 0.7, -0.4, 1.5, 0.3),
    ),
    "Conv 2-D, pointwise": Map(
        "y = Conv(x, w, b)",
        (2, 4, 3, 2),
        {"w": draw(3, 4, 1, 1), "b": np.float32([0.7, -0.4, 1.5])},
        channelwise(2, 0.7, -0.4, 1.5),
    ),
    "Conv 2-D, pointwise with stride 2, no bias": Map(
        "y = Conv<strides=[2,2]>(x, w)", (2, 3, 5, 4), {"w": draw(4, 3, 1, 1)}
    ),
    "Conv 2-D, bias as an Add of its own": Map(
        'h = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w) y = Add(h, b)',
        (2, 2, 4, 4),
        {"w": draw(3, 2, 3, 3), "b": channelwise(2, 0.7, -0.4, 1.5)},
        channelwise(2, 0.7, -0.4, 1.5),
    ),
    "Conv 3-D": Map(
        "y = Conv<pads=[1,0,1,0,0,1], strides=[1,2,1]>(x, w, b)",
        (2, 2, 3, 3, 3),
        {"w": draw(2, 2, 2, 2, 2), "b": np.float32([0.7, -0.4])},
        channelwise(3, 0.7, -0.4),
    ),
    "ConvTranspose 1-D, dilation": Map(
        "y = ConvTranspose<dilations=[2], strides=[2]>(x, w, b)",
        (2, 3, 4),
        {"w": draw(3, 2, 3), "b": np.float32([0.7, -0.4])},
        channelwise(1, 0.7, -0.4),
    ),
    "ConvTranspose 2-D, groups, pads, output padding": Map(
        "y = ConvTranspose<group=2, strides=[2,2], pads=[1,1,0,1], output_padding=[1,0]>(x, w, b)",
        (2, 4, 3, 3),
        {"w": draw(4, 1, 3, 3), "b": np.float32([0.7, -0.4])},
        channelwise(2, 0.7, -0.4),
    ),
    "ConvTranspose 3-D": Map(
        "y = ConvTranspose<strides=[2,1,1]>(x, w, b)",
        (2, 2, 2, 2, 3),
        {"w": draw(2, 2, 2, 1, 2), "b": np.float32([0.7, -0.4])},
        channelwise(3, 0.7, -0.4),
    ),
    "Gemm, transposed weight, scaled": Map(
        "y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)",
        (2, 7),
        {"w": draw(5, 7), "b": draw(5, seed=1)},
        2 * draw(5, seed=1),
    ),
    "Gemm, weight on the left": Map(
        "y = Gemm<transA=1>(w, x, b)",
        (4, 3),
        {"w": draw(4, 5), "b": draw(5, 1, seed=1)},
        draw(5, 1, seed=1),
        batched=False,
    ),
    "MatMul over tokens, bias as an Add of its own": Map(
        "h = MatMul(x, w) y = Add(b, h)", (2, 3, 4), {"w": draw(4, 5), "b": draw(5, seed=1)}, draw(5, seed=1)
    ),
    "MatMul, weight on the left": Map("y = MatMul(w, x)", (2, 4, 3), {"w": draw(5, 4)}),
    "AveragePool, overlapping, padding not counted": Map(
        "y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)", (2, 2, 5, 4), average=True
    ),
    "AveragePool, padding counted, ceil mode": Map(
        "y = AveragePool<kernel_shape=[3,2], strides=[2,2], pads=[1,0,1,1], count_include_pad=1, ceil_mode=1>(x)",
        (2, 2, 6, 4),
        average=True,
        opset=22,  # shape inference of older opsets counts a window that starts in the padding, which nobody computes
    ),
    "GlobalAveragePool": Map("y = GlobalAveragePool(x)", (2, 3, 3, 4), average=True),
    "ReduceMean": Map("y = ReduceMean<axes=[2,-1], keepdims=0>(x)", (2, 3, 3, 4), average=True),
    "ReduceSum": Map("y = ReduceSum<keepdims=1>(x, a)", (2, 3, 4), {"a": np.int64([2])}, average=True),
}


@cache
def matrix(name: str) -> Matrix:
    return MAPS[name].matrix()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


def ours(
    model: onnx.ModelProto, x: np.ndarray, r: np.ndarray, composite: Composite, engine: str = "numpy"
) -> np.ndarray:
    """Relevance at `x` for relevance `r` at `y`: onnxcam's walk in float64."""
    graph = as_written(model)
    taps = needed_taps(graph, ["x"], "y")
    values = RuntimeSession(expose(graph, taps), taps).run({"x": x.astype(np.float32)})
    return carry(engine, graph, values, {"y": r}, ["x"], composite).relevance["x"]


def theirs(m: Matrix, share: Callable[[Matrix, np.ndarray], np.ndarray], x: np.ndarray, r: np.ndarray) -> np.ndarray:
    """The same from explicit matrices, image by image and target by target; `x` (images, I), `r` (T, images, J)."""
    return np.array(
        [[matrices.relevance(share(m, image), r_i) for image, r_i in zip(x, r_t, strict=True)] for r_t in r]
    )


def output_shape(model: onnx.ModelProto, x: np.ndarray) -> tuple[int, ...]:
    return matrices.by_runtime(model)(x).shape


def inputs(shape: tuple[int, ...], sign: str) -> np.ndarray:
    x = draw(*shape, seed=2)
    return np.maximum(x, 0) if sign == "non-negative" else x


@dataclass(frozen=True)
class Setting:
    """A map of the table with an input, run once."""

    graph: Graph
    values: dict[str, np.ndarray]
    x: np.ndarray  # (images, I), float64
    r: np.ndarray  # (3, *output.shape)


@cache
def setting(name: str, sign: str) -> Setting:
    node = MAPS[name]
    graph = as_written(node.model(node.shape))
    taps = needed_taps(graph, ["x"], "y")
    x = inputs(node.shape, sign)
    values = RuntimeSession(expose(graph, taps), taps).run({"x": x})
    r = np.random.default_rng(3).standard_normal((3, *values["y"].shape))
    return Setting(graph, values, x.reshape(node.images, -1).astype(np.float64), r)


def assert_agrees(
    name: str, rule: Any, share: Callable[[Matrix, np.ndarray], np.ndarray], sign: str, engine: str
) -> None:
    s = setting(name, sign)
    got = carry(engine, s.graph, s.values, {"y": s.r}, ["x"], everywhere(rule)).relevance["x"]
    assert got.shape == (3, *MAPS[name].shape)
    want = theirs(matrix(name), share, s.x, s.r.reshape(3, len(s.x), -1))
    assert relative(got.reshape(want.shape), want) <= TOLERANCE


POLICIES = ("ignore", "absorb", "full")
RULES: dict[str, tuple[Any, Callable[[Matrix, np.ndarray], np.ndarray]]] = {
    "LRP-0": (Epsilon(0.0), lambda m, x: matrices.epsilon(m, x, 0.0, "full")),
    "alpha 1 beta 0 is z-plus": (AlphaBeta(1, 0, "absorb", 0.0), lambda m, x: matrices.z_plus(m, x, 0.0, "absorb")),
    "z-box": (
        ZBox(-5.0, 6.0, eps=1e-6),
        lambda m, x: matrices.z_box(m, x, np.full(x.shape, -5.0), np.full(x.shape, 6.0), 1e-6),
    ),
}
for _bias in POLICIES:
    RULES |= {
        f"epsilon 0.1, bias {_bias}": (
            Epsilon(0.1, _bias),
            lambda m, x, b=_bias: matrices.epsilon(m, x, 0.1, b),
        ),
        f"z-plus, bias {_bias}": (ZPlus(_bias), lambda m, x, b=_bias: matrices.z_plus(m, x, 0.0, b)),
        f"alpha 2 beta 1, bias {_bias}": (
            AlphaBeta(2, 1, _bias, 1e-6),
            lambda m, x, b=_bias: matrices.alpha_beta(m, x, 2, 1, 1e-6, b),
        ),
        f"gamma 0.25, bias {_bias}": (
            Gamma(0.25, _bias, 1e-6),
            lambda m, x, b=_bias: matrices.gamma(m, x, 0.25, 1e-6, b),
        ),
        f"w-square, bias {_bias}": (WSquare(_bias), lambda m, x, b=_bias: matrices.w_square(m, x, 0.0, b)),
        f"flat, bias {_bias}": (Flat(_bias), lambda m, x, b=_bias: matrices.flat(m, x, 0.0, b)),
    }


@pytest.mark.parametrize("sign", ["non-negative", "mixed"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MAPS)
def test_a_rule_shares_as_its_matrix_says(name: str, rule: str, sign: str, engine: str) -> None:
    assert_agrees(name, *RULES[rule], sign, engine)


@pytest.mark.parametrize("rule", ["z-box", *(r for r in RULES if r.endswith("absorb") and "flat" not in r)])
@pytest.mark.parametrize("name", MAPS)
def test_a_recorded_rule_gives_in_onnx_runtime_what_the_array_engine_gives(name: str, rule: str) -> None:
    """Float32 against float64, hence 1e-5 of the largest relevance."""
    s, composite = setting(name, "mixed"), everywhere(RULES[rule][0])
    want = propagate(s.graph, s.values, {"y": s.r}, ["x"], composite, OPS).relevance["x"]
    got = RecordedWalk(s.graph, {"y": s.r.shape}, ["x"], composite, "float32")(s.values, {"y": s.r}).relevance["x"]
    assert relative(got, want) <= 1e-5


@pytest.mark.parametrize("bias", POLICIES)
def test_the_stabiliser_of_w_square_and_flat_is_that_of_their_matrices(bias: str, engine: str) -> None:
    """Apart from the table above, where an average has coefficients and no weights to square."""
    name = "Conv 2-D, two groups, dilation 2 and 1"
    assert_agrees(name, WSquare(bias, 0.1), lambda m, x: matrices.w_square(m, x, 0.1, bias), "mixed", engine)
    assert_agrees(name, Flat(bias, 0.1), lambda m, x: matrices.flat(m, x, 0.1, bias), "mixed", engine)


def test_z_box_takes_bounds_for_every_channel_and_pixel(engine: str) -> None:
    node = MAPS["Conv 3-D"]
    low, high = -2 - np.abs(draw(2, 1, 1, 1, seed=5)), 2 + np.abs(draw(2, 3, 3, 3, seed=6))
    low_all, high_all = (np.broadcast_to(v, node.shape[1:]).ravel().astype(np.float64) for v in (low, high))
    assert_agrees(
        "Conv 3-D",
        ZBox(low, high, eps=0.0),
        lambda m, x: matrices.z_box(m, x, low_all, high_all, 0.0),
        "mixed",
        engine,
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_convolution_shares_as_its_matrix_says(data: st.DataObject) -> None:
    """Random geometry, which the table above samples thinly; gamma uses every term there is."""
    rank = data.draw(st.integers(1, 2))
    group = data.draw(st.integers(1, 2))
    kernel, stride, dilation = (data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)) for _ in range(3))
    pads = data.draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(1, e - sum(pads[i::rank])) + data.draw(st.integers(0, 3)) for i, e in enumerate(extent)]
    node = Map(
        f"y = Conv<group={group}, strides={stride}, dilations={dilation}, pads={pads}>(x, w, b)",
        (1, 2 * group, *size),
        {"w": draw(2 * group, 2, *kernel), "b": draw(2 * group, seed=1)},
        channelwise(rank, *draw(2 * group, seed=1)),
    )
    m, x = node.matrix(), draw(*node.shape, seed=2)
    shape = output_shape(node.model(node.shape), x)
    r = np.random.default_rng(3).standard_normal((1, 1, len(m.b)))
    want = theirs(m, lambda m, x: matrices.gamma(m, x, 0.5, 1e-6, "absorb"), x.reshape(1, -1).astype(np.float64), r)
    for engine in ENGINES:
        got = ours(node.model(node.shape), x, r.reshape(1, *shape), everywhere(Gamma(0.5)), engine)
        assert np.abs(got.ravel() - want.ravel()).max() <= TOLERANCE * max(1.0, np.abs(want).max()), engine


# -- what holds for every rule -----------------------------------------------------------------------------------

EACH = {
    "epsilon": Epsilon(),
    "z-plus": ZPlus(),
    "alpha-beta": AlphaBeta(),
    "gamma": Gamma(),
    "w-square": WSquare(),
    "flat": Flat(),
    "z-box": ZBox(-5.0, 5.0),
}
CONV = "Conv 2-D, two groups, dilation 2 and 1"


@pytest.mark.parametrize("rule", EACH)
def test_a_rule_is_linear_in_relevance(rule: str, engine: str) -> None:
    """Oracle: the definition of linearity; tolerance: rounding of float64."""
    node, composite = MAPS[CONV], everywhere(EACH[rule])
    model, x = node.model(node.shape), inputs(node.shape, "mixed")
    a, b = np.random.default_rng(4).standard_normal((2, 1, *output_shape(model, x)))
    together = ours(model, x, 2 * a - 3 * b, composite, engine)
    assert (
        relative(together, 2 * ours(model, x, a, composite, engine) - 3 * ours(model, x, b, composite, engine))
        <= TOLERANCE
    )


@pytest.mark.parametrize("rule", EACH)
def test_several_targets_get_what_each_gets_alone(rule: str, engine: str) -> None:
    """Oracle: one call for each target. They may differ by the order of a sum, hence 1e-13."""
    node, composite = MAPS[CONV], everywhere(EACH[rule])
    model, x = node.model(node.shape), inputs(node.shape, "mixed")
    r = np.random.default_rng(4).standard_normal((3, *output_shape(model, x)))
    alone = np.concatenate([ours(model, x, one[None], composite, engine) for one in r])
    assert relative(ours(model, x, r, composite, engine), alone) <= 1e-13


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("rule", EACH)
def test_an_input_of_zeros_gives_finite_relevance(name: str, rule: str, engine: str) -> None:
    """Every denominator made of contributions is zero here. Rules that look at the input give it nothing."""
    node = MAPS[name]
    model, x = node.model(node.shape), np.zeros(node.shape, np.float32)
    got = ours(model, x, np.ones((1, *output_shape(model, x))), everywhere(EACH[rule]), engine)
    assert np.isfinite(got).all()
    if rule in ("epsilon", "z-plus", "alpha-beta", "gamma"):
        assert not got.any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
def test_a_constant_input_of_any_size_gives_finite_relevance(scale: float, dtype: str) -> None:
    """z-plus has no stabiliser: where its denominator vanishes the relevance is dropped, never blown up."""
    model = network("(float[1,2,3,3] x) => (float y) { y = Conv(x, w) }", w=np.float32(1e-6) * draw(2, 2, 3, 3))
    graph = as_written(model)
    values = {"x": np.full((1, 2, 3, 3), scale, np.float32), "y": np.zeros((1, 2, 1, 1), np.float32)}
    got = propagate(graph, values, {"y": np.ones((1, 1, 2, 1, 1))}, ["x"], everywhere(ZPlus()), ArrayOps(np, dtype))
    assert np.isfinite(got.relevance["x"]).all()
    assert np.abs(got.relevance["x"]).max() <= 2


def test_z_plus_drops_what_no_positive_contribution_can_take(engine: str) -> None:
    """Output 0 sees positive contributions and hands all down; output 1 sees only negative ones and hands down none."""
    model = network("(float[1,2] x) => (float y) { y = Gemm<transB=1>(x, w) }", w=np.float32([[1, 3], [-1, -2]]))
    got = ours(model, np.ones((1, 2)), np.array([[[8.0, 5.0]]]), everywhere(ZPlus()), engine)
    np.testing.assert_array_equal(got, [[[2.0, 6.0]]])


def test_flat_counts_weights_of_zero_as_wired(engine: str) -> None:
    model = network("(float[1,3] x) => (float y) { y = Gemm<transB=1>(x, w) }", w=np.float32([[0, 2, -1]]))
    got = ours(model, np.zeros((1, 3)), np.array([[[3.0]]]), everywhere(Flat()), engine)
    np.testing.assert_allclose(got, [[[1.0, 1.0, 1.0]]], rtol=1e-15)


def test_a_constant_that_repeats_the_output_is_no_bias(engine: str) -> None:
    """A position embedding over one token, say: the sum has four tokens, the linear map has one."""
    model = network(
        "(float[2,1,3] x) => (float y) { h = MatMul(x, w) y = Add(h, p) }", w=draw(3, 2), p=draw(1, 4, 2, seed=1)
    )
    r = np.random.default_rng(3).standard_normal((1, 2, 4, 2))
    x = draw(2, 1, 3, seed=2)
    alone = network("(float[2,1,3] x) => (float y) { y = MatMul(x, w) }", w=draw(3, 2))
    for rule in (Epsilon(0.1), ZPlus("full"), Gamma()):
        want = ours(alone, x, r.sum(2, keepdims=True), everywhere(rule), engine)
        assert relative(ours(model, x, r, everywhere(rule), engine), want) <= TOLERANCE


def test_a_negative_alpha_of_gemm_turns_the_signs_of_the_weight(engine: str) -> None:
    """Oracle: the same map with the factor in the weight, by the matrix of z-plus."""
    w = draw(5, 7)
    node = Map("y = Gemm<transB=1, alpha=-0.5>(x, w)", (2, 7), {"w": w})
    x, r = inputs(node.shape, "mixed"), np.random.default_rng(3).standard_normal((1, 2, 5))
    m = Matrix(-0.5 * w.astype(np.float64), np.zeros(5), w != 0, biased=False)
    want = theirs(m, lambda m, x: matrices.z_plus(m, x, 0.0, "ignore"), x.astype(np.float64), r)
    assert relative(ours(node.model(node.shape), x, r, everywhere(ZPlus()), engine), want) <= TOLERANCE


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 2.0), (0.5, -0.5), (1.0, 1e-3)])
def test_alpha_beta_refuses_numbers_that_do_not_conserve(alpha: float, beta: float) -> None:
    with pytest.raises(ValueError, match="alpha - beta = 1"):
        AlphaBeta(alpha, beta)


def test_z_box_without_bounds_says_what_is_missing() -> None:
    model = network("(float[1,2] x) => (float y) { y = Gemm<transB=1>(x, w) }", w=draw(1, 2))
    with pytest.raises(ValueError, match="low and high"):
        ours(model, np.ones((1, 2)), np.ones((1, 1, 1)), everywhere(ZBox()))


# -- sums, products, and what passes -----------------------------------------------------------------------------


def table(**rules: Any) -> Composite:
    return Composite("test", {kind: Vjp() for kind in KINDS} | rules)


def at_node(engine: str, body: str, rule: Any, r: np.ndarray, **operands: np.ndarray) -> dict[str, np.ndarray]:
    """Relevance of the operands of one node that all are inputs of the graph."""
    declared = ", ".join(f"float[{','.join(map(str, v.shape))}] {k}" for k, v in operands.items())
    graph = as_written(network(f"({declared}) => (float y) {{ {body} }}"))
    taps = needed_taps(graph, list(operands), "y")
    values = ReferenceSession(expose(graph, taps), taps).run(operands)
    values |= operands
    return carry(engine, graph, values, {"y": r}, list(operands), table(additive=rule, product=rule)).relevance


def test_a_sum_shares_in_proportion_to_signed_summands(engine: str) -> None:
    """Oracle: R_a = R a / (a + b), summed over what was broadcast."""
    a, b = draw(2, 3, 4, 4, seed=1), draw(2, 3, 1, 1, seed=2)
    r = np.random.default_rng(3).standard_normal((2, 2, 3, 4, 4))
    got = at_node(engine, "y = Add(a, b)", Proportional(), r, a=a, b=b)
    s = r / (a.astype(np.float64) + b)
    assert relative(got["a"], a * s) <= TOLERANCE
    assert relative(got["b"], (b * s).sum((3, 4), keepdims=True)) <= TOLERANCE


@pytest.mark.parametrize(
    ("body", "signs"),
    [("y = Sub(a, b)", (1, -1, 0)), ("y = Sum(a, b, c)", (1, 1, 1)), ("y = Mean(a, b, c)", (1 / 3, 1 / 3, 1 / 3))],
)
def test_differences_sums_and_means_share_like_sums(body: str, signs: tuple[float, ...], engine: str) -> None:
    operands = {k: draw(2, 5, seed=i) for i, k in enumerate("abc"[: 2 + (signs[2] != 0)])}
    r = np.random.default_rng(3).standard_normal((1, 2, 5))
    got = at_node(engine, body, Proportional(eps=0.01), r, **operands)
    terms = [c * v.astype(np.float64) for c, v in zip(signs, operands.values(), strict=False)]
    total = sum(terms)
    for name, term in zip(operands, terms, strict=True):
        assert relative(got[name], term * r / (total + np.where(total < 0, -0.01, 0.01))) <= TOLERANCE


def test_where_summands_cancel_the_guard_shares_evenly_and_loses_nothing(engine: str) -> None:
    """Four cells: plain, cancelling to within the guard, cancelling exactly, and nothing there at all."""
    a, b = np.array([[3.0, 1.0, 2.0, 0.0]]), np.array([[1.0, -1.0 + 2**-22, -2.0, 0.0]])
    got = at_node(engine, "y = Add(a, b)", Proportional(guard=1e-6), np.full((1, 1, 4), 4.0), a=a, b=b)
    np.testing.assert_allclose(got["a"], [[[3.0, 2.0, 2.0, 2.0]]], rtol=1e-6)
    np.testing.assert_allclose(got["b"], [[[1.0, 2.0, 2.0, 2.0]]], rtol=1e-6)


def test_a_constant_summand_takes_nothing(engine: str) -> None:
    graph = as_written(network("(float[2,3] a) => (float y) { y = Add(k, a) }", k=np.float32([[5.0], [-5.0]])))
    values = {"a": draw(2, 3), "y": draw(2, 3)}
    for rule in (Proportional(), Proportional(1e-6), Proportional(guard=1e-6)):
        got = carry(engine, graph, values, {"y": np.ones((1, 2, 3))}, ["a"], table(additive=rule))
        np.testing.assert_array_equal(got.relevance["a"], np.ones((1, 2, 3)))


def test_the_signal_of_a_product_takes_all_and_its_gate_nothing(engine: str) -> None:
    """A squeeze-and-excitation gate: (N, C, 1, 1) against (N, C, H, W), in either slot."""
    r = np.random.default_rng(3).standard_normal((2, 2, 3, 4, 4))
    for body in ("y = Mul(a, b)", "y = Mul(b, a)"):
        got = at_node(engine, body, SignalTakesAll(), r, a=draw(2, 3, 4, 4), b=draw(2, 3, 1, 1))
        assert list(got) == ["a"]
        np.testing.assert_array_equal(got["a"], r)


def test_swish_written_as_a_product_passes_relevance_to_its_input_once(engine: str) -> None:
    r = np.random.default_rng(3).standard_normal((1, 2, 5))
    got = at_node(engine, "s = Sigmoid(a) y = Mul(a, s)", SignalTakesAll(), r, a=draw(2, 5))
    np.testing.assert_array_equal(got["a"], r)


def test_two_equal_signals_get_half_each_and_a_square_gets_all(engine: str) -> None:
    r = np.random.default_rng(3).standard_normal((1, 2, 5))
    got = at_node(engine, "y = Mul(a, b)", SignalTakesAll(), r, a=draw(2, 5), b=draw(2, 5, seed=1))
    np.testing.assert_array_equal(got["a"], r / 2)
    np.testing.assert_array_equal(got["b"], r / 2)
    np.testing.assert_array_equal(at_node(engine, "y = Mul(a, a)", SignalTakesAll(), r, a=draw(2, 5))["a"], r)


def test_a_product_of_two_matrices_gives_each_half_of_its_epsilon_share(engine: str) -> None:
    """Oracle: AttnLRP, Prop. 3.3, entry by entry: O = A B, R_A = A (R / 2O) B^T."""
    a, b = draw(2, 3, 4, seed=1), draw(2, 4, 5, seed=2)
    r = np.random.default_rng(3).standard_normal((1, 2, 3, 5))
    got = at_node(engine, "y = MatMul(a, b)", SignalTakesAll(), r, a=a, b=b)
    c = np.einsum("nik,nkj->nijk", a.astype(np.float64), b)
    o = c.sum(-1)
    share = 0.5 * c * (r[0] / (o + np.where(o < 0, -1e-9, 1e-9)))[..., None]
    assert relative(got["a"][0], share.sum(2)) <= TOLERANCE
    assert relative(got["b"][0], share.sum(1).swapaxes(1, 2)) <= TOLERANCE


def test_pass_leaves_relevance_where_it_is_and_sums_it_over_what_was_broadcast(engine: str) -> None:
    r = np.random.default_rng(3).standard_normal((2, 2, 3, 4))
    graph = as_written(network("(float[2,3,1] a) => (float y) { y = Mul(a, k) }", k=np.float32([2.0, 3.0, 4.0, 5.0])))
    values = {"a": draw(2, 3, 1), "y": draw(2, 3, 1) * np.float32([2.0, 3.0, 4.0, 5.0])}
    flow = carry(engine, graph, values, {"y": r}, ["a"], table(activation=Pass()))
    np.testing.assert_allclose(flow.relevance["a"], r.sum(3, keepdims=True), rtol=1e-14)
