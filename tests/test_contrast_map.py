"""`contrast-map`: relevance, channels summed; at the last layer weighted by channel. And where that is.

Oracles: explicit sums in float64 for a network whose every step is a small matrix; the methods it is made of.
"""

from __future__ import annotations

import numpy as np
import pytest
from walking import canonised, network, relative

import onnxcam
from onnxcam.composites import Composite, _lrp
from onnxcam.heads import cells_apart, locate_logits
from onnxcam.rules import Gamma, Proportional, ZPlus
from small_nets import resnet

RNG = np.random.default_rng(5)
W3 = RNG.standard_normal((6, 3, 3, 3)).astype(np.float32)
V3 = RNG.standard_normal((6, 6, 3, 3)).astype(np.float32)
V1 = RNG.standard_normal((5, 6, 1, 1)).astype(np.float32)
D = RNG.standard_normal((6, 5)).astype(np.float32)
FLAT = RNG.standard_normal((6 * 64, 5)).astype(np.float32)
BEGIN = "(float[N,3,8,8] x) => (float y) { c = Conv<pads=[1,1,1,1]>(x, w) a = Relu(c) "
END = "g = GlobalAveragePool(b) f = Flatten(g) y = MatMul(f, d) }"
CASES = {
    "global average, dense": ("g = GlobalAveragePool(a) f = Flatten(g) y = MatMul(f, d) }", True),
    "mean over axes, dense": ("g = ReduceMean<axes=[2,3],keepdims=0>(a) y = MatMul(g, d) }", True),
    "one window over all, dense": ("g = AveragePool<kernel_shape=[8,8]>(a) f = Flatten(g) y = MatMul(f, d) }", True),
    "pointwise, average": ("b = Conv(a, v1) r = Relu(b) g = GlobalAveragePool(r) y = Flatten(g) }", True),
    "channels last, mean": (
        "t = Transpose<perm=[0,2,3,1]>(a) m = MatMul(t, d) y = ReduceMean<axes=[1,2],keepdims=0>(m) }", True,
    ),
    "another convolution": (f"b = Conv<pads=[1,1,1,1]>(a, v3) {END}", False),
    "pooled in part": (f"b = MaxPool<kernel_shape=[2,2],strides=[2,2]>(a) {END}", False),
    "one axis after another": (
        "g = ReduceMean<axes=[2],keepdims=0>(a) h = ReduceMax<axes=[2],keepdims=0>(g) y = MatMul(h, d) }", False,
    ),
    "dense over all cells": ("f = Flatten(a) y = MatMul(f, flat) }", False),
    "resized": (f"b = Resize(a, e, s) {END}", False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_where_cells_stay_apart(name: str) -> None:
    text, apart = CASES[name]
    weights = {
        "w": W3, "v1": V1, "v3": V3, "d": D, "flat": FLAT, "e": np.zeros(0, np.float32), "s": np.float32([1, 1, 2, 2]),
    }  # fmt: skip
    used = {key: value for key, value in weights.items() if f"{key})" in BEGIN + text or f"{key}," in BEGIN + text}
    model = onnxcam.load(network(BEGIN + text, **used), preprocess="unit")
    found = model.canonical((8, 8))
    layer = next(row for row in model.layers((8, 8)) if row.tensor == "a")
    assert cells_apart(found.graph, "a", found.logits, layer.spatial) is apart


def test_a_map_of_unknown_size_is_not_taken_for_one_whose_cells_stay_apart() -> None:
    text = BEGIN.replace("8,8", "H,W") + "g = GlobalAveragePool(a) f = Flatten(g) y = MatMul(f, d) }"
    graph = canonised(network(text, w=W3, d=D))
    assert not cells_apart(graph, "a", locate_logits(graph, "y")[0], ("H", "W"))


@pytest.mark.parametrize("engine", ["onnx", "numpy"])
def test_it_is_relevance_before_the_last_layer_and_weighs_channels_at_it(engine: str) -> None:
    model = onnxcam.load(resnet(), preprocess="unit")
    x = RNG.random((2, 3, 16, 16)).astype(np.float32)
    layers = ["r1", "A2", "A4"]
    ours = model.explain(x, layers, [0, 2], method="contrast-map", engine=engine)
    shared = {"composite": "contrast_map", "start": "contrast", "engine": engine}
    summed = model.explain(x, layers, [0, 2], method="lrp", **shared)
    weighed = model.explain(x, layers, [0, 2], method="relevance-cam", **shared)
    graph, logits = model.canonical((16, 16)).graph, model.canonical((16, 16)).logits
    apart = {name: cells_apart(graph, row.tensor, logits, row.spatial) for name, row in ours.layers.items()}
    assert list(apart.values()) == [False, False, True]
    for name in layers:
        np.testing.assert_array_equal(ours.maps[name], (weighed if apart[name] else summed).maps[name])


def test_it_compiles(tmp_path) -> None:
    import onnxruntime

    model = onnxcam.load(resnet(), preprocess="unit")
    x = RNG.random((2, 3, 16, 16)).astype(np.float32)
    made = onnxcam.compile(model, ["A2", "A4"], [1], method="contrast-map", size=(16, 16))
    session = onnxruntime.InferenceSession(made.to_bytes())
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": x}), strict=True))
    e = model.explain(x, ["A2", "A4"], [1], method="contrast-map")
    for name, output in made.maps.items():
        assert relative(found[output], e.maps[name]) < 1e-5


def test_explicit_sums_of_a_small_network() -> None:
    """1x1 convolution, ReLU, sum over cells, dense: gamma 0.1 at the convolution, z-plus at the dense map."""
    w = RNG.standard_normal((6, 3, 1, 1)).astype(np.float32)
    v = RNG.standard_normal((6, 4)).astype(np.float32)
    text = (
        "(float[N,3,4,5] x) => (float[N,4] y) { h = Conv(x, w) a = Relu(h) s = ReduceSum<keepdims=0>(a, axes) "
        "y = MatMul(s, v) }"
    )
    model = onnxcam.load(network(text, w=w, v=v, axes=np.int64([2, 3])), preprocess="unit")
    x = np.abs(RNG.standard_normal((1, 3, 4, 5)))
    w64, v64 = w[:, :, 0, 0].astype(np.float64), v.astype(np.float64)
    a = np.maximum(np.einsum("nchw,kc->nkhw", x, w64), 0)[0]
    s = a.sum((1, 2))
    start = np.full(4, -1 / 4)
    start[2] = 1.0
    share = s[:, None] * np.maximum(v64, 0)
    r_s = (share / share.sum(0) * start).sum(1)
    r_a = a / np.maximum(s, 1e-30)[:, None, None] * r_s[:, None, None]
    expected = (r_a.mean((1, 2))[:, None, None] * a).sum(0)
    found = model.explain(x.astype(np.float32), ["a"], [2], method="contrast-map", engine="numpy", dtype="float64")
    np.testing.assert_allclose(found.maps["a"][0, 0], expected, rtol=1e-5, atol=1e-9)
    # gamma 0.1: contributions x (W + 0.1 W+), where the output is positive
    both = np.einsum("chw,kc->kchw", x[0], w64 + 0.1 * np.maximum(w64, 0))
    z = both.sum(1)
    r_x = (both / np.where(z > 0, z + 1e-6, 1)[:, None] * np.where(z > 0, r_a, 0)[:, None]).sum(0)
    lrp = model.explain(
        x.astype(np.float32), ["input"], [2], method="lrp", composite="contrast_map", engine="numpy", dtype="float64"
    )
    np.testing.assert_allclose(lrp.maps["input"][0, 0], r_x.sum(0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("engine", ["onnx", "numpy"])
@pytest.mark.parametrize(("kernel", "gamma"), [(1, 0.1), (3, 1.0)])
def test_gamma_depends_on_the_kernel(kernel: int, gamma: float, engine: str) -> None:
    w = RNG.standard_normal((6, 3, kernel, kernel)).astype(np.float32)
    text = (
        f"(float[N,3,8,8] x) => (float y) {{ c = Conv<pads=[{','.join(4 * [str(kernel // 2)])}]>(x, w) a = Relu(c) "
        "g = GlobalAveragePool(a) f = Flatten(g) y = MatMul(f, d) }"
    )
    model = onnxcam.load(network(text, w=w, d=D), preprocess="unit")
    x = RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)

    def relevance(rules: str | Composite) -> np.ndarray:  # of each channel: of each cell it does not depend on gamma
        e = model.explain(x, ["input"], [1], method="channel-relevance", composite=rules, engine=engine)
        return e.maps["input"]

    def one(value: float) -> Composite:
        rule = Gamma(value, "absorb", 1e-6)
        return Composite(f"gamma {value}", _lrp(rule, ZPlus(), Proportional(guard=1e-6)), last=ZPlus())

    np.testing.assert_allclose(relevance("contrast_map"), relevance(one(gamma)), rtol=1e-4, atol=1e-6)
    assert relative(relevance("contrast_map"), relevance(one(1.1 - gamma))) > 1e-2
