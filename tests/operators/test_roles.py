"""What two tensors that meet are to each other, in every spelling: own gates, statistics, weights and values.

Relevance through a normalisation or an activation that a file writes out must be what it is through one node: all of
it to what is normalised or activated, none to means, variances and gates. That is exact arithmetic, so equality holds
to the last digits. The gradient of the same spellings is compared with a central difference in float64, step 1e-5: 1e-7
is what the difference itself is good for.
"""

from __future__ import annotations

import numpy as np
import pytest
from walking import ENGINES, Walker, as_written, canonised, network

from onnxcam.composites import COMPOSITES
from onnxcam.graph import Graph
from onnxcam.operators import lookup
from onnxcam.operators.roles import inside_normalisations, value_of

C, H, W = 6, 3, 5


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def scalars(**values: float) -> dict[str, np.ndarray]:
    return {name: np.array(value, np.float64) for name, value in values.items()}


TOKENS = {
    "g": draw(C, seed=1),
    "b": draw(C, seed=2),
    "last": np.array([-1], np.int64),
    "spatial": np.array([2, 3], np.int64),
    "channel": np.array([1], np.int64),
    "g4": draw(C, 1, 1, seed=3),
    "b4": draw(C, 1, 1, seed=4),
    **scalars(eps=1e-5, two=2.0, half=0.5, minus_half=-0.5, one=1.0, three=3.0, six=6.0, tiny=1e-6, minus=-1.0),
    **scalars(root2=2**0.5, c=0.044715, k=(2 / np.pi) ** 0.5, q=1.702, tau=-0.3),
}
CENTRE = "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) "
VARIANCE = CENTRE + "s = Pow(d, two) v = ReduceMean<axes=[-1]>(s) e = Add(v, eps) "
NORMALISATIONS = {
    # tokens (N, L, C)
    "layer": VARIANCE + "r = Sqrt(e) n = Div(d, r) y0 = Mul(n, g) y = Add(y0, b)",
    "layer, constants first": VARIANCE + "r = Sqrt(e) n = Div(d, r) y0 = Mul(g, n) y = Add(b, y0)",
    "layer, reciprocal": VARIANCE + "q0 = Sqrt(e) r = Reciprocal(q0) n = Mul(d, r) y0 = Mul(n, g) y = Add(y0, b)",
    "layer, reciprocal first": VARIANCE + "q0 = Sqrt(e) r = Reciprocal(q0) n = Mul(r, d) y = Mul(n, g)",
    "layer, one over": VARIANCE + "q0 = Sqrt(e) r = Div(one, q0) n = Mul(d, r) y = Mul(n, g)",
    "layer, power": VARIANCE + "r = Pow(e, minus_half) n = Mul(d, r) y = Mul(n, g)",
    "layer, no weights": VARIANCE + "r = Sqrt(e) y = Div(d, r)",
    "layer, square as product": CENTRE
    + "s = Mul(d, d) v = ReduceMean<axes=[-1]>(s) e = Add(v, eps) r = Sqrt(e) y = Div(d, r)",
    "layer, second subtraction": CENTRE
    + "d2 = Sub(x, m) s = Pow(d2, two) v = ReduceMean<axes=[-1]>(s) e = Add(eps, v) r = Sqrt(e) y = Div(d, r)",
    "layer, cast": CENTRE
    + "dc = Cast<to=1>(d) s = Pow(dc, two) v = ReduceMean<axes=[-1]>(s) e = Add(v, eps) r = Sqrt(e) y = Div(d, r)",
    "layer, as Keras": "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) s = Mul(d, d) v = ReduceMean<axes=[-1]>(s) "
    "e = Add(v, eps) q0 = Sqrt(e) r = Reciprocal(q0) i = Mul(r, g) xs = Mul(x, i) ms = Mul(m, i) t = Sub(b, ms) "
    "y = Add(xs, t)",
    "layer, as Keras, shift first": "m = ReduceMean<axes=[-1]>(x) d = Sub(m, x) s = Mul(d, d) "
    "v = ReduceMean<axes=[-1]>(s) e = Add(v, eps) q0 = Sqrt(e) r = Reciprocal(q0) i = Mul(r, g) xs = Mul(i, x) "
    "ms = Mul(i, m) t = Sub(b, ms) y = Add(t, xs)",
    "layer, negated mean": "m = ReduceMean<axes=[-1]>(x) mm = Neg(m) y = Add(x, mm)",
    "RMS": "s = Pow(x, two) v = ReduceMean<axes=[-1]>(s) e = Add(v, eps) q0 = Sqrt(e) r = Reciprocal(q0) n = Mul(x, r) "
    "y = Mul(n, g)",
    "RMS, quotient": "s = Mul(x, x) v = ReduceMean<axes=[-1]>(s) e = Add(v, eps) r = Sqrt(e) n = Div(x, r) "
    "y = Mul(n, g)",
    "L2, clipped and expanded": "s = ReduceL2<axes=[-1]>(x) t = Clip(s, tiny) z = Shape(x) u = Expand(t, z) "
    "y = Div(x, u)",
    "L2, sum of squares": "s = Mul(x, x) t = ReduceSum(s, last) u = Sqrt(t) y = Div(x, u)",
    "L2, largest": "s = ReduceL2<axes=[-1]>(x) t = Max(s, tiny) y = Div(x, t)",
}
PICTURES = {
    # (N, C, H, W)
    "channels first": "m = ReduceMean<axes=[1]>(x) d = Sub(x, m) s = Pow(d, two) v = ReduceMean<axes=[1]>(s) "
    "e = Add(v, eps) q0 = Sqrt(e) r = Reciprocal(q0) n = Mul(d, r) y0 = Mul(n, g4) y = Add(y0, b4)",
    "channels first, factor left": "m = ReduceMean<axes=[1]>(x) d = Sub(x, m) s = Pow(d, two) "
    "v = ReduceMean<axes=[1]>(s) e = Add(v, eps) q0 = Sqrt(e) r = Reciprocal(q0) n = Mul(r, d) y0 = Mul(g4, n) "
    "y = Add(b4, y0)",
    "instance": "m = ReduceMean<axes=[2,3]>(x) d = Sub(x, m) s = Mul(d, d) v = ReduceMean<axes=[2,3]>(s) "
    "e = Add(v, eps) r = Sqrt(e) n = Div(d, r) y0 = Mul(n, g4) y = Add(y0, b4)",
    "instance, global pool": "m = GlobalAveragePool(x) d = Sub(x, m) s = Mul(d, d) v = GlobalAveragePool(s) "
    "e = Add(v, eps) r = Sqrt(e) y = Div(d, r)",
    "FRN": "s = Pow(x, two) v = ReduceMean<axes=[2,3]>(s) e = Add(v, eps) q0 = Sqrt(e) r = Reciprocal(q0) "
    "n = Mul(x, r) y0 = Mul(n, g4) y = Add(y0, b4)",
    "global response": "s = ReduceL2<axes=[2,3]>(x) m = ReduceMean<axes=[1]>(s) e = Add(m, tiny) f = Div(s, e) "
    "n = Mul(x, f) y = Mul(n, g4)",
    "LpNormalization": "y = LpNormalization<axis=1>(x)",
}
GELU = "a = Div(x, root2) f = Erf(a) "
TANH = "p = Pow(x, three) cp = Mul(c, p) a = Add(x, cp) ka = Mul(k, a) f = Tanh(ka) "
ACTIVATIONS = {
    "SiLU": "s = Sigmoid(x) y = Mul(x, s)",
    "SiLU, gate first": "s = Sigmoid(x) y = Mul(s, x)",
    "SiLU, exp": "n = Neg(x) f = Exp(n) d = Add(one, f) s = Div(one, d) y = Mul(x, s)",
    "SiLU, quotient": "n = Neg(x) f = Exp(n) d = Add(one, f) y = Div(x, d)",
    "QuickGELU": "a = Mul(x, q) s = Sigmoid(a) y = Mul(x, s)",
    "QuickGELU, orders": "a = Mul(q, x) s = Sigmoid(a) y = Mul(s, x)",
    "hard swish": "s = HardSigmoid<alpha=0.2, beta=0.5>(x) y = Mul(x, s)",
    "hard swish, clipped": "a = Add(x, three) s = Clip(a, zero, six) p = Mul(x, s) y = Div(p, six)",
    "hard swish, clip scaled": "a = Add(three, x) s = Clip(a, zero, six) t = Div(s, six) y = Mul(t, x)",
    "GELU": GELU + "g1 = Add(f, one) p = Mul(x, g1) y = Mul(p, half)",
    "GELU, half first": GELU + "g1 = Add(one, f) h = Mul(x, half) y = Mul(h, g1)",
    "GELU, gate first": GELU + "g1 = Add(one, f) h = Mul(half, x) y = Mul(g1, h)",
    "GELU, gate halved": GELU + "g1 = Add(one, f) h = Mul(half, g1) y = Mul(h, x)",
    "GELU, tanh": TANH + "g1 = Add(f, one) h = Mul(half, x) y = Mul(h, g1)",
    "GELU, tanh, gate first": TANH + "g1 = Add(one, f) h = Mul(g1, x) y = Mul(half, h)",
    "GELU, tanh, cube as product": "x2 = Mul(x, x) p = Mul(x2, x) cp = Mul(c, p) a = Add(x, cp) ka = Mul(k, a) "
    "f = Tanh(ka) g1 = Add(f, one) h = Mul(half, x) y = Mul(h, g1)",
    "Mish": "p = Softplus(x) t = Tanh(p) y = Mul(x, t)",
    "Mish, exp": "f = Exp(x) o = Add(one, f) p = Log(o) t = Tanh(p) y = Mul(t, x)",
    "squared ReLU": "p = Relu(x) y = Mul(x, p)",
}
TOKENS |= scalars(zero=0.0)
BODIES = (
    [pytest.param(body, (2, 4, C), id=name) for name, body in NORMALISATIONS.items()]
    + [pytest.param(body, (2, C, H, W), id=name) for name, body in PICTURES.items()]
    + [pytest.param(body, (2, 4, C), id=name) for name, body in ACTIVATIONS.items()]
)


def written(body: str, shape: tuple[int, ...], opset: int = 17) -> Graph:
    """The graph of `body` as it is written, with the constants it reads, in float32 as files have them."""
    used = {w for w in TOKENS if w in body.replace("(", " ").replace(")", " ").replace(",", " ").split()}
    weights = {w: TOKENS[w].astype(np.float32) if TOKENS[w].dtype == np.float64 else TOKENS[w] for w in used}
    sizes = ",".join(map(str, shape))
    return as_written(network(f"(float[{sizes}] x) => (float[{sizes}] y) {{ {body} }}", opset, **weights))


@pytest.mark.parametrize(("engine", "attention"), [("numpy", "cp"), ("onnx", "cp"), ("numpy", "attnlrp")])
@pytest.mark.parametrize(("body", "shape"), BODIES)
def test_relevance_passes_what_is_written_out_as_it_passes_one_node(
    body: str, shape: tuple[int, ...], engine: str, attention: str
) -> None:
    r = draw(2, *shape, seed=5)
    composite = COMPOSITES["relevance_cam"].with_attention(attention)
    walk = Walker(written(body, shape), ["x"], "y", engine=engine)({"x": draw(*shape)}, r, composite)
    np.testing.assert_allclose(walk["x"], r, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("body", "shape"), BODIES)
def test_the_gradient_of_what_is_written_out_is_its_slope(body: str, shape: tuple[int, ...]) -> None:
    walker = Walker(written(body, shape), ["x"], "y")
    x, r, way, step = draw(*shape), draw(1, *shape, seed=5), draw(*shape, seed=6), 1e-5
    slope = sum(sign * walker.forward({"x": x + sign * step * way})["y"] for sign in (1, -1)) / (2 * step)
    got = walker({"x": x}, r, COMPOSITES["gradient"])["x"][0]
    # ONNX's reference evaluator computes Erf with seven digits only where a file has it in float32.
    tolerance = 1e-5 if "Erf" in body else 1e-7
    assert abs((got * way).sum() - (r[0] * slope).sum()) <= tolerance * np.abs(got * way).sum()


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_only_the_end_of_a_normalisation_is_worth_looking_at(name: str) -> None:
    graph = written(NORMALISATIONS[name], (2, 4, C))
    made = {tensor for node in graph.nodes for tensor in node.outputs} - {"y", "z"}
    assert inside_normalisations(graph) - {"z"} == made


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("m = GlobalAveragePool(x) y = Add(x, m)", None),  # context that is added is no statistic taken off
        ("m = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x) y = Sub(m, x)", None),  # the mixer of PoolFormer
        ("m = GlobalAveragePool(x) y = Sub(m, x)", None),
    ],
)
def test_what_is_no_statistic_takes_its_share_of_a_sum(body: str, expected: None, engine: str) -> None:
    shape = (1, 2, 3, 3)
    graph = written(body, shape)
    r = draw(1, *shape, seed=5)
    got = Walker(graph, ["x"], "y", engine=engine)({"x": 2 + draw(*shape) / 10}, r, COMPOSITES["relevance_cam"])["x"]
    assert np.abs(got - r).max() > 1e-3
    np.testing.assert_allclose(got.sum(), r.sum(), rtol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gate_that_was_expanded_has_no_extent_of_its_own(engine: str) -> None:
    """The context vector of separable attention (MobileViTv2): a sum over positions, expanded to all of them."""
    body = (
        "s = Softmax<axis=-1>(a) w = Mul(b, s) c0 = ReduceSum(w, last) z = Shape(x) g0 = Expand(c0, z) v = Relu(x) "
        "y = Mul(v, g0)"
    )
    shapes = ", ".join(f"float[1,2,3,4] {name}" for name in "abx")
    graph = as_written(network(f"({shapes}) => (float[1,2,3,4] y) {{ {body} }}", last=TOKENS["last"]))
    r, values = draw(1, 1, 2, 3, 4), {name: draw(1, 2, 3, 4, seed=i) for i, name in enumerate("abx")}
    walk = Walker(graph, ["a", "b", "x"], "y", engine=engine)(values, r, COMPOSITES["relevance_cam"])
    assert set(walk.flow.relevance) == {"x"}
    np.testing.assert_array_equal(walk["x"], r)


# -- attention ---------------------------------------------------------------------------------------------------

QKV = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) kt = Transpose<perm=[0,2,1]>(k) "
SCORES = QKV + "s = MatMul(q, kt) "
ATTENTIONS = {
    # body: the node whose output is the mixture, and the tensor that is its value
    "softmax": (SCORES + "p = Softmax<axis=-1>(s) y = MatMul(p, v)", "v"),
    "softmax of opset 11": (SCORES + "p = Softmax<axis=2>(s) y = MatMul(p, v)", "v"),
    "scaled, masked, cast": (
        SCORES + "s1 = Div(s, root2) s2 = Add(s1, b55) p0 = Softmax<axis=-1>(s2) p1 = Cast<to=1>(p0) y = MatMul(p1, v)",
        "v",
    ),
    "masked by Where": (SCORES + "s1 = Where(seen, s, low) p = Softmax<axis=-1>(s1) y = MatMul(p, v)", "v"),
    "value left": (
        SCORES + "p = Softmax<axis=-1>(s) pt = Transpose<perm=[0,2,1]>(p) vt = Transpose<perm=[0,2,1]>(v) "
        "o = MatMul(vt, pt) y = Transpose<perm=[0,2,1]>(o)",
        "vt",
    ),
    "cross-covariance": (
        QKV + "qt = Transpose<perm=[0,2,1]>(q) s = MatMul(qt, k) p = Softmax<axis=-1>(s) "
        "vt = Transpose<perm=[0,2,1]>(v) o = MatMul(p, vt) y = Transpose<perm=[0,2,1]>(o)",
        "vt",
    ),
    "weights mixed afterwards": (
        SCORES + "p = Softmax<axis=-1>(s) p1 = MatMul(p, w55) y = MatMul(p1, v)",
        "v",
    ),
    "softmax written out": (
        SCORES + "f = Exp(s) t = ReduceSum(f, last) p = Div(f, t) y = MatMul(p, v)",
        "v",
    ),
    "divided by its sum": (
        SCORES + "f = Sigmoid(s) t = ReduceSum(f, last) t1 = Clip(t, tiny) p = Div(f, t1) y = MatMul(p, v)",
        "v",
    ),
    "linear": (QKV + "kr = Relu(kt) qr = Relu(q) c0 = MatMul(kr, v) y = MatMul(qr, c0)", "c0"),
    "linear, keys": (QKV + "kr = Relu(kt) qr = Relu(q) c0 = MatMul(kr, v) y = MatMul(qr, c0)", "v"),
    "linear, elu": (
        QKV + "ke = Elu(kt) kr = Add(ke, one) qe = Elu(q) qr = Add(one, qe) c0 = MatMul(kr, v) y = MatMul(qr, c0)",
        "v",
    ),
    "factorised": (QKV + "ks = Softmax<axis=-1>(kt) c0 = MatMul(ks, v) c1 = Mul(c0, half) y = MatMul(q, c1)", "c1"),
    "efficient": (
        QKV + "ks = Softmax<axis=-1>(kt) qs = Softmax<axis=-1>(q) c0 = MatMul(ks, v) y = MatMul(qs, c0)",
        "c0",
    ),
    "neither": (SCORES + "y = MatMul(s, v)", None),
    "no way to tell": (QKV + "c0 = MatMul(kt, v) y = MatMul(q, c0)", None),
}


def attention(body: str, opset: int = 17) -> Graph:
    weights = {
        **{w: draw(4, 4, seed=i).astype(np.float32) for i, w in enumerate(("wq", "wk", "wv"))},
        "w55": draw(5, 5, seed=7).astype(np.float32),
        "b55": draw(5, 5, seed=8).astype(np.float32),
        "seen": draw(5, 5, seed=9) > -1,
        "low": np.float32(-np.inf),
        **{name: np.float32(TOKENS[name]) for name in ("root2", "one", "half", "tiny")},
        "last": TOKENS["last"],
    }
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: np.asarray(value) for name, value in weights.items() if name in words}
    return as_written(network(f"(float[2,5,4] x) => (float[2,5,4] y) {{ {body} }}", opset, **used))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_value_of_an_attention_is_told_from_its_weights(name: str) -> None:
    body, value = ATTENTIONS[name]
    graph = attention(body, 11 if "opset 11" in name else 17)
    products = [n for n in graph.nodes if n.op_type == "MatMul" and all(i in graph.data for i in n.inputs)]
    if value is None:
        assert value_of(products[-1]) is None
    else:
        (mixing,) = [n for n in products if value in n.inputs]
        assert mixing.inputs[value_of(mixing)] == value


def test_scores_have_no_value() -> None:
    graph = attention(ATTENTIONS["softmax"][0])
    (scores,) = [n for n in graph.nodes if n.outputs[0] == "s"]
    assert value_of(scores) is None and lookup(scores).given is not None


# -- biases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("composite", ["epsilon_plus", "relevance_cam"])
def test_a_bias_behind_a_reshape_is_the_bias_of_its_product(composite: str, engine: str) -> None:
    """The epsilon rule gives the bias its share of the denominator, wherever the Add stands."""
    weights = {"w": draw(4, 6).astype(np.float32), "b": draw(6, seed=1).astype(np.float32)}
    weights |= {"rows": np.array([2, 5, 6], np.int64), "lines": np.array([10, 4], np.int64)}
    x, r = draw(2, 5, 4, seed=2), draw(1, 2, 5, 6, seed=3)
    bodies = (
        "z = MatMul(x, w) y = Add(z, b)",
        "z = MatMul(x, w) y = Add(b, z)",
        "l = Reshape(x, lines) z0 = MatMul(l, w) z = Reshape(z0, rows) y = Add(z, b)",
    )
    found = []
    for body in bodies:
        used = {k: v for k, v in weights.items() if f" {k})" in body or f"({k}," in body}
        graph = as_written(network(f"(float[2,5,4] x) => (float[2,5,6] y) {{ {body} }}", **used))
        found.append(Walker(graph, ["x"], "y", engine=engine)({"x": x}, r, COMPOSITES[composite])["x"])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-12)
    w, b = weights["w"].astype(np.float64), weights["b"].astype(np.float64)
    if composite == "epsilon_plus":
        z = x @ w + b
        expected = x * ((r / (z + 1e-6 * np.where(z < 0, -1, 1))) @ w.T)
        np.testing.assert_allclose(found[0], expected, rtol=1e-9)


# -- BatchNormalization written out -------------------------------------------------------------------------------


def test_a_batch_normalisation_written_out_folds_into_the_convolution_before_it() -> None:
    """As JAX and Keras export it, ten nodes with constants: one Conv is left, and computes the same."""
    body = (
        "h = Conv<pads=[1,1,1,1]>(x, w) e = Add(var, eps) q0 = Sqrt(e) r = Reciprocal(q0) i = Mul(r, g4) "
        "d = Sub(h, mean) n = Mul(d, i) y = Add(n, b4)"
    )
    rng = np.random.default_rng(0)
    weights = {
        "w": draw(C, 3, 3, 3).astype(np.float32),
        "var": rng.uniform(0.5, 2, (C, 1, 1)).astype(np.float32),
        "mean": draw(C, 1, 1, seed=1).astype(np.float32),
        "eps": np.float32(1e-5),
        "g4": TOKENS["g4"].astype(np.float32),
        "b4": TOKENS["b4"].astype(np.float32),
    }
    weights = {name: np.asarray(value) for name, value in weights.items()}
    model = network(f"(float[1,3,5,5] x) => (float[1,{C},5,5] y) {{ {body} }}", 13, **weights)
    graph = canonised(model)
    assert [n.op_type for n in graph.nodes] == ["Conv"]
    x = draw(1, 3, 5, 5)
    before, after = (Walker(g, ["x"], "y").forward({"x": x})["y"] for g in (as_written(model), graph))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
