"""The array engine over other array libraries: the same lines give the same numbers as with NumPy.

`array_api_strict` refuses whatever is not in the array API standard, so passing on it is what lets CuPy in; PyTorch is
a library whose promotion rules and views differ from NumPy's. Oracle: the engine on NumPy in float64. Libraries may add
in another order, hence 1e-12 where there are sums, and equality where entries only move.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxcam.composites import COMPOSITES
from onnxcam.engines.array import ArrayOps, array_ops
from onnxcam.engines.reference import in_double
from onnxcam.engines.window import Window, resolve_conv
from onnxcam.errors import UsageError
from onnxcam.graph import Graph
from onnxcam.propagate import needed_taps, propagate
from onnxcam.taps import expose

NUMPY = array_ops("numpy", "float64")


def _strict() -> ArrayOps:
    xp = pytest.importorskip("array_api_strict")
    return ArrayOps(xp, "float64", np.from_dlpack)


def _torch() -> ArrayOps:
    pytest.importorskip("torch")
    xp = pytest.importorskip("array_api_compat.torch")
    return ArrayOps(xp, "float64", lambda x: x.resolve_neg().numpy())


@pytest.fixture(params=[_strict, _torch], ids=["strict", "torch"])
def other(request: pytest.FixtureRequest) -> ArrayOps:
    return request.param()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape)


X, W = normal(2, 3, 4, 7, 8), normal(6, 2, 3, 2)
CONV = resolve_conv((7, 8), (3, 2), "NOTSET", (1, 2), (1, 0, 2, 1), (2, 1))
POOL = Window((3, 2), (2, 2), (1, 1), (1, 1), (0, 1))
Y = normal(2, 3, 6, *CONV.output((7, 8)))
SHORT = normal(2, 3, 4, *POOL.output((7, 8)))
POSITIVE = np.abs(X) + 0.1
TIED = np.round(X)

# Name: (call, arrays it takes, whether it moves entries only).
PRIMITIVES: dict[str, tuple[Callable[..., Any], tuple[np.ndarray, ...], bool]] = {
    "where with numbers": (lambda o, x: o.where(x > 0, 1.0, 0.0), (X,), True),
    "where with an integer": (lambda o, x: o.where(x > 0, x, 0), (X,), True),
    "positive": (lambda o, x: o.positive(x), (X,), True),
    "negative": (lambda o, x: o.negative(x), (X,), True),
    "mask": (lambda o, x: o.mask(x > 0), (X,), True),
    "abs": (lambda o, x: o.abs(x), (X,), True),
    "sign": (lambda o, x: o.sign(x), (X,), True),
    "zeros like": (lambda o, x: o.zeros_like(x), (X,), True),
    "ones like": (lambda o, x: o.ones_like(x), (X,), True),
    "exp": (lambda o, x: o.exp(x), (X,), False),
    "log": (lambda o, x: o.log(x), (POSITIVE,), False),
    "sqrt": (lambda o, x: o.sqrt(x), (POSITIVE,), False),
    "sin": (lambda o, x: o.sin(x), (X,), False),
    "cos": (lambda o, x: o.cos(x), (X,), False),
    "tanh": (lambda o, x: o.tanh(x), (X,), False),
    "sigmoid": (lambda o, x: o.sigmoid(x), (X,), False),
    "power of a number": (lambda o, x: o.power(x, 1.7), (POSITIVE,), False),
    "power of an array": (lambda o, x, p: o.power(x, p), (POSITIVE, X), False),
    "sum": (lambda o, x: o.sum(x, (-1, -3)), (X,), False),
    "sum over nothing": (lambda o, x: o.sum(x, ()), (X,), True),
    "mean": (lambda o, x: o.mean(x, (-1, -2), keepdims=True), (X,), False),
    "prod": (lambda o, x: o.prod(x, (-1,)), (X,), False),
    "min": (lambda o, x: o.min(x, (1, 2)), (X,), True),
    "max": (lambda o, x: o.max(x, (-1,)), (X,), True),
    "reshape": (lambda o, x: o.reshape(x, (12, 56)), (X,), True),
    "shaped": (lambda o, x: o.shaped(x, (-1, 8)), (X,), True),
    "permute": (lambda o, x: o.permute(x, (2, 0, 3, 1)), (X,), True),
    "expand": (lambda o, x: o.expand(x, (5, 3, 4, 7, 8)), (X,), True),
    "expanded, then added to": (lambda o, x: o.expand(x, (5, 3, 4, 7, 8)) + 1.0, (X,), True),
    "unbroadcast": (lambda o, x: o.unbroadcast(x, (4, 1, 8)), (X,), False),
    "unbroadcast to a scalar": (lambda o, x: o.unbroadcast(x, ()), (X,), False),
    "concat": (lambda o, x, y: o.concat([x, y], -1), (X, X[..., :3]), True),
    "slice": (lambda o, x: o.slice(x, -2, 1, 6), (X,), True),
    "slice by steps": (lambda o, x: o.slice(x, -1, 1, 8, 3), (X,), True),
    "take": (lambda o, x: o.take(x, np.array([3, 0, 3]), -3), (X,), True),
    "scatter in order": (lambda o, x: o.scatter_add(x, np.arange(2, 9), -2, 11), (X,), True),
    "scatter by steps": (lambda o, x: o.scatter_add(x, np.arange(0, 16, 2), -1, 17), (X,), True),
    "scatter backwards": (lambda o, x: o.scatter_add(x, np.arange(7, -1, -1), -1, 8), (X,), True),
    "scatter one": (lambda o, x: o.scatter_add(x[..., :1], np.array([3]), -1, 5), (X,), True),
    "scatter none": (lambda o, x: o.scatter_add(x[..., :0], np.zeros(0, np.int64), -1, 5), (X,), True),
    "scatter with repeats": (
        lambda o, x: o.scatter_add(x, np.array([1, 1, 0, -1, 1, 4, -1, 4]), -1, 6),
        (X,),
        False,
    ),
    "scatter of an inside": (lambda o, x: o.scatter_add(x, np.array([-1, -1, 0, 1, 2, 3, -1]), -2, 4), (X,), True),
    "scatter of nothing inside": (lambda o, x: o.scatter_add(x, np.full(7, -1), -2, 4), (X,), True),
    "matmul": (lambda o, x, y: o.matmul(x, o.swap(y)), (X, X), False),
    "along the last axis": (lambda o, x, m: o.along(x, m, -1), (X, normal(5, 8)), False),
    "along the last axis but one": (lambda o, x, m: o.along(x, m, -2), (X, normal(5, 7)), False),
    "along another axis": (lambda o, x, m: o.along(x, m, -3), (X, normal(5, 4)), False),
    "conv": (lambda o, x, w: o.conv(x, w, CONV, 2), (X, W), False),
    "conv adjoint": (lambda o, r, w: o.conv_adjoint(r, w, CONV, (7, 8), 2), (Y, W), False),
    "depthwise conv": (lambda o, x, w: o.conv(x, w, CONV, 4), (X, normal(4, 1, 3, 2)), False),
    "depthwise conv adjoint": (
        lambda o, r, w: o.conv_adjoint(r, w, CONV, (7, 8), 4),
        (Y[:, :, :4], normal(4, 1, 3, 2)),
        False,
    ),
    "pointwise conv": (
        lambda o, x, w: o.conv(x, w, resolve_conv((7, 8), (1, 1)), 2),
        (X, normal(6, 2, 1, 1)),
        False,
    ),
    "window sum": (lambda o, x: o.window_sum(x, POOL), (X,), False),
    "window sum adjoint": (lambda o, r: o.window_sum_adjoint(r, POOL, (7, 8)), (SHORT,), False),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_primitive_gives_what_it_gives_on_numpy(other: ArrayOps, name: str) -> None:
    call, arrays, moves = PRIMITIVES[name]
    expected = call(NUMPY, *(NUMPY.asarray(a) for a in arrays))
    given = [other.asarray(a) for a in arrays]
    got = other.to_host(call(other, *given))
    assert got.dtype == np.float64
    assert got.shape == expected.shape
    assert np.array_equal(got, expected) if moves else np.allclose(got, expected, rtol=1e-12, atol=1e-12)
    assert all(np.array_equal(other.to_host(a), b) for a, b in zip(given, arrays, strict=True)), "changed its operand"


def test_the_winners_of_a_pool_are_the_same_with_ties(other: ArrayOps) -> None:
    def back(ops: ArrayOps) -> Any:
        x = ops.asarray(TIED)
        y = ops.asarray(pooled)
        return ops.to_host(ops.window_max_adjoint(ops.asarray(SHORT), x, y, POOL))

    padded = np.pad(TIED, ((0, 0),) * 3 + ((1, 0), (1, 1)), constant_values=-np.inf)
    taps = [padded[(..., *tap)] for tap in POOL.taps(POOL.output((7, 8)))]
    pooled = np.maximum.reduce(taps)
    assert np.allclose(back(other), back(NUMPY), rtol=0, atol=1e-15)


NETWORK = """
<ir_version: 8, opset_import: ["": 17]>
network (double[2,3,12,13] x) => (double[2,5] y) {
  c0 = Conv<pads=[1,1,1,1]>(x, w0, b0)
  r0 = Relu(c0)
  d0 = Conv<group=8, strides=[2,1], pads=[0,2,1,0]>(r0, w1)
  n0 = BatchNormalization(d0, g, b, m, v)
  s0 = Sigmoid(n0)
  m0 = Mul(n0, s0)
  p0 = MaxPool<kernel_shape=[2,3], strides=[2,2], pads=[0,1,1,1]>(m0)
  e0 = Resize<mode="linear">(p0, none, scales)
  e1 = Resize<mode="cubic", coordinate_transformation_mode="align_corners">(p0, none, scales)
  a0 = Add(e0, e1)
  t0 = Transpose<perm=[0,2,3,1]>(a0)
  k0 = MatMul(t0, w2)
  k1 = Add(k0, b2)
  t1 = Transpose<perm=[0,3,1,2]>(k1)
  h0 = Gather<axis=1>(t1, pick)
  v0 = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(h0)
  u0 = ConvTranspose<strides=[2,2]>(v0, w3)
  f0 = Pad<mode="reflect">(u0, pads)
  q0 = GlobalAveragePool(f0)
  q1 = GlobalMaxPool(f0)
  o0 = Concat<axis=1>(q0, q1)
  l0 = Flatten(o0)
  y = Gemm<transB=1>(l0, w4, b4)
}
"""
CONSTANTS = {
    "w0": normal(8, 3, 3, 3),
    "b0": normal(8),
    "w1": normal(8, 1, 2, 3),
    "g": np.abs(normal(8, seed=1)) + 0.1,
    "b": normal(8, seed=2),
    "m": normal(8, seed=3),
    "v": np.abs(normal(8, seed=4)) + 0.1,
    "none": np.zeros(0, np.float32),
    "scales": np.array([1, 1, 2, 1.5], np.float32),
    "w2": normal(8, 6),
    "b2": normal(6),
    "pick": np.array([0, 5, 2, 2], np.int64),
    "w3": normal(4, 6, 3, 3),
    "pads": np.array([0, 0, 1, 2, 0, 0, 2, 1], np.int64),
    "w4": normal(5, 12),
    "b4": normal(5),
}
LAYERS = ("x", "r0", "m0", "a0", "t1", "v0")


@pytest.fixture(scope="module")
def network() -> tuple[Graph, dict[str, np.ndarray]]:
    model = onnx.parser.parse_model(NETWORK)
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in CONSTANTS.items())
    graph = Graph(gs.import_onnx(onnx.shape_inference.infer_shapes(model)))
    names = needed_taps(graph, LAYERS, "y")
    values = ReferenceEvaluator(in_double(expose(graph, names))).run(None, {"x": normal(2, 3, 12, 13)})
    return graph, dict(zip(names, values, strict=True))


def relevances(network: Any, ops: ArrayOps, name: str, start: np.ndarray) -> dict[str, np.ndarray]:
    graph, taps = network
    low, high = np.full((1, 3, 1, 1), -4.0), np.full((1, 3, 1, 1), 4.0)
    flow = propagate(graph, taps, {"y": start}, LAYERS, COMPOSITES[name].with_box(low, high), ops)
    return {layer: ops.to_host(r) for layer, r in flow.relevance.items()}


START = normal(3, 2, 5)


def assert_close(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert set(got) == set(expected) == set(LAYERS)
    for layer, r in expected.items():
        assert np.abs(got[layer] - r).max() <= tolerance * np.abs(r).max(), layer


@pytest.mark.parametrize("composite", COMPOSITES)
def test_a_walk_gives_what_it_gives_on_numpy(other: ArrayOps, network: Any, composite: str) -> None:
    """Quotients of nearly cancelling sums amplify the last bit, hence 1e-10 after twenty nodes."""
    expected = relevances(network, NUMPY, composite, START)
    assert_close(relevances(network, other, composite, START), expected, 1e-10)


@pytest.mark.parametrize("composite", COMPOSITES)
def test_many_targets_in_one_walk_are_one_walk_each(network: Any, composite: str) -> None:
    together = relevances(network, NUMPY, composite, START)
    for target in range(3):
        alone = relevances(network, NUMPY, composite, START[target : target + 1])
        assert_close(alone, {layer: r[target : target + 1] for layer, r in together.items()}, 1e-12)


@pytest.mark.parametrize("composite", COMPOSITES)
def test_a_batch_of_two_is_two_batches_of_one(network: Any, composite: str) -> None:
    graph, taps = network
    together = relevances(network, NUMPY, composite, START)
    for image in range(2):
        own = {name: value[image : image + 1] for name, value in taps.items()}
        alone = relevances((graph, own), NUMPY, composite, START[:, image : image + 1])
        assert_close(alone, {layer: r[:, image : image + 1] for layer, r in together.items()}, 1e-12)


@pytest.mark.parametrize("name", [n for n, (_, arrays, _) in PRIMITIVES.items() if arrays[0].ndim == 5])
def test_a_primitive_treats_targets_one_by_one(name: str) -> None:
    """Whatever takes (T, ...) does to each target what it does to it alone."""
    if name in ("min", "shaped"):
        pytest.skip("reduces or reshapes the axes in front on purpose")
    call, arrays, _ = PRIMITIVES[name]
    together = call(NUMPY, *arrays)
    for target in range(2):
        split = [a[target : target + 1] if a.ndim == 5 else a for a in arrays]
        assert np.allclose(call(NUMPY, *split), together[target : target + 1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_arithmetic_is_in_the_type_asked_for(dtype: str, network: Any) -> None:
    ops = array_ops("numpy", dtype)
    for composite in COMPOSITES:
        assert all(r.dtype == dtype for r in relevances(network, ops, composite, START).values()), composite


@pytest.mark.parametrize("given", [np.float16, np.float32, np.float64, np.int64, np.uint8, np.bool_])
def test_arrays_of_any_real_type_come_in(other: ArrayOps, given: type) -> None:
    value = np.array([[0, 1], [1, 0]], given)
    assert other.to_host(other.asarray(value)).tolist() == [[0, 1], [1, 0]]
    assert other.to_host(other.asarray(value[:, ::-1])).tolist() == [[1, 0], [0, 1]]


def test_engines_are_known_by_name() -> None:
    with pytest.raises(UsageError, match="unknown array engine 'jax': it is one of numpy, cupy"):
        array_ops("jax")


RANKS = [(rank, group) for rank, group in product((1, 2, 3), (1, 2, 4))]


@pytest.mark.parametrize("rank, group", RANKS)
def test_a_convolution_is_its_definition(rank: int, group: int) -> None:
    """Oracle: sums over explicit indices, O(everything)."""
    size, kernel = (5, 4, 6)[:rank], (2, 3, 2)[:rank]
    pads = (1, 0, 2)[:rank] + (0, 1, 1)[:rank]
    window = resolve_conv(size, kernel, "NOTSET", (2, 1, 1)[:rank], pads, (1, 2, 2)[:rank])
    x, w = normal(2, 4, *size), normal(8, 4 // group, *kernel)
    got = NUMPY.conv(x, w, window, group)
    expected = np.zeros((2, 8, *window.output(size)))
    for m, place, c, offset in product(range(8), np.ndindex(expected.shape[2:]), range(4 // group), np.ndindex(kernel)):
        cell = tuple(
            p * s + o * d - b
            for p, s, o, d, b in zip(place, window.strides, offset, window.dilations, window.begin, strict=True)
        )
        if all(0 <= i < n for i, n in zip(cell, size, strict=True)):
            channel = m // (8 // group) * (4 // group) + c
            expected[(slice(None), m, *place)] += x[(slice(None), channel, *cell)] * w[(m, c, *offset)]
    assert np.allclose(got, expected, rtol=1e-12, atol=1e-12)
