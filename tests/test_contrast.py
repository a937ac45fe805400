"""Contrastive relevance and relevance through chosen channels.

Oracles: explicit matrices in float64 for a network of two dense maps written out by hand; additivity over channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
from walking import network, relative

import onnxcam
from onnxcam.errors import UsageError

ENGINES = ("onnx", "numpy")
Within = Callable[..., None]
MATRICES = "explicit matrices"


@cache
def parts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {
        "w": rng.standard_normal((6, 3, 1, 1)).astype(np.float32),
        "v": 0.05 * rng.standard_normal((6, 4)).astype(np.float32),
        "x": np.abs(rng.standard_normal((2, 3, 4, 5))).astype(np.float32),
    }


def model() -> onnx.ModelProto:
    """1x1 convolution, ReLU, sum over cells, dense: every step is a small matrix."""
    p = parts()
    return network(
        "(float[N,3,4,5] x) => (float[N,4] y) { h = Conv(x, w) a = Relu(h) s = ReduceSum<keepdims=0>(a, axes) "
        "y = MatMul(s, v) }",
        w=p["w"], v=p["v"], axes=np.int64([2, 3]),
    )  # fmt: skip


def z_plus(start: np.ndarray, negate_last: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Relevance of `a` (N, 6, h, w) and of `x` (N, 3, h, w) from relevance at the logits (N, 4), by explicit sums."""
    p = {k: v.astype(np.float64) for k, v in parts().items()}
    a = np.maximum(np.einsum("nchw,kc->nkhw", p["x"], p["w"][:, :, 0, 0]), 0)
    s = a.sum((2, 3))
    v = np.maximum(-p["v"] if negate_last else p["v"], 0)
    share = s[:, :, None] * v
    r_s = (share / share.sum(1, keepdims=True) * start[:, None]).sum(2)
    r_a = a / np.maximum(s, 1e-30)[:, :, None, None] * r_s[:, :, None, None]
    w = np.maximum(p["w"][:, :, 0, 0], 0)
    share = p["x"][:, None] * w[None, :, :, None, None]  # (N, 6, 3, h, w)
    r_x = (share / np.maximum(share.sum(2, keepdims=True), 1e-30) * r_a[:, :, None]).sum(1)
    return r_a, r_x


def logits() -> np.ndarray:
    p = {k: v.astype(np.float64) for k, v in parts().items()}
    a = np.maximum(np.einsum("nchw,kc->nkhw", p["x"], p["w"][:, :, 0, 0]), 0)
    return a.sum((2, 3)) @ p["v"]


def explained(method: str, layer: str, engine: str, **how: object) -> np.ndarray:
    loaded = onnxcam.load(model(), preprocess="none")
    return next(iter(loaded.explain(parts()["x"], layer, [1, 3], method=method, engine=engine, **how).maps.values()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", ["a", "x"])
@pytest.mark.parametrize("method", ["clrp1", "clrp2"])
def test_contrastive_relevance_is_the_difference_of_two_shares(
    within: Within, method: str, layer: str, engine: str
) -> None:
    z, maps = logits(), []
    for c in (1, 3):
        one = np.eye(4)[c]
        own = z_plus(z * one)
        dual = z_plus(np.abs(z) * (1 - one)) if method == "clrp1" else z_plus(z * one, negate_last=True)
        own_map, dual_map = (r["ax".index(layer)].sum(1) for r in (own, dual))
        shares = [m / m.sum((1, 2), keepdims=True) for m in (own_map, dual_map)]
        maps.append(np.maximum(shares[0] - shares[1], 0))
    within(method, MATRICES, explained(method, layer, engine), np.stack(maps, 1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", ["a", "x"])
def test_sglrp_starts_from_the_gradient_of_the_probability(within: Within, layer: str, engine: str) -> None:
    z = logits()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    maps = [z_plus(p[:, c : c + 1] * (np.eye(4)[c] - p))["ax".index(layer)].sum(1) for c in (1, 3)]
    within("sglrp", MATRICES, explained("sglrp", layer, engine), np.stack(maps, 1))


@pytest.mark.parametrize("engine", ENGINES)
def test_relevance_through_some_channels_is_their_part(engine: str) -> None:
    z = logits()
    whole = explained("lrp", "x", engine, start="logit")
    pairs = [explained("lrp", "x", engine, start="logit", concepts={"a": [k, k + 3]}) for k in range(3)]
    assert relative(sum(pairs), whole) <= 1e-5
    r_a, _ = z_plus(z * np.eye(4)[1])
    kept = np.isin(np.arange(6), [1, 4])
    one = explained("lrp", "a", engine, start="logit", concepts={"a": [1, 4]})[:, 0]
    assert relative(one, (r_a * kept[:, None, None]).sum(1)) <= 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_channels_are_ranked_by_their_relevance(within: Within, engine: str) -> None:
    z = logits()
    expected = np.stack([z_plus(z * np.eye(4)[c])[0].sum((2, 3)) for c in (1, 3)], 1)
    within("channel-relevance", MATRICES, explained("channel-relevance", "a", engine, start="logit"), expected)
    loaded = onnxcam.load(model(), preprocess="none")
    e = loaded.explain(parts()["x"], "a", [1, 3], method="channel-relevance", start="logit", engine=engine)
    assert e.is_vector("a")
    best = np.argsort(-np.abs(expected[1, 0]), kind="stable")[:3]
    assert [k for k, _ in e.top_features("a", 1, 0, 3)] == best.tolist()


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ({"a": [6]}, "layer 'a' has channels 0 to 5, not 6"),
        ({"a": []}, "channels 0 to 5, not none"),
        ({"nowhere": [1]}, "nowhere"),
    ],
)
def test_concepts_that_are_not_there_are_refused(concepts: dict[str, list[int]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        explained("lrp", "x", "onnx", concepts=concepts)


def test_concepts_need_relevance() -> None:
    with pytest.raises(UsageError, match="method rise carries no relevance"):
        explained("rise", "x", "onnx", concepts={"a": [1]})


def rap(target: int) -> np.ndarray:
    """Relevance of the input (N, 3, h, w), by loops over units, as the paper and its code have it.

    Dense: the sizes of contributions share the logit. Convolution with inputs p >= 0, P = p w+ and N = -p w-: R+ shared
    by P / sum P and by N / sum(P + N), R- by N / sum N and by N / sum(P + N); then shifted.
    """
    p = {k: v.astype(np.float64) for k, v in parts().items()}
    x, w = p["x"], p["w"][:, :, 0, 0]
    a = np.maximum(np.einsum("nchw,kc->nkhw", x, w), 0)
    s = a.sum((2, 3))
    size = np.abs(s * p["v"][:, target])
    r_s = size / size.sum(1, keepdims=True) * (s @ p["v"])[:, target][:, None]
    r_a = a / np.maximum(s, 1e-30)[:, :, None, None] * r_s[:, :, None, None]
    out = np.zeros_like(x)
    for n, h, v in np.ndindex(x.shape[0], *x.shape[2:]):
        for j in range(6):
            r, one = r_a[n, j, h, v], x[n, :, h, v]
            positive, negative = one * np.maximum(w[j], 0), -one * np.minimum(w[j], 0)
            out[n, :, h, v] += max(r, 0) * positive / max(positive.sum(), 1e-30)
            out[n, :, h, v] += min(r, 0) * negative / max(negative.sum(), 1e-30)
            out[n, :, h, v] += r * negative / max((positive + negative).sum(), 1e-30)
    reached = out != 0
    excess = (out.sum((1, 2, 3)) - r_a.sum((1, 2, 3))) / reached.sum((1, 2, 3))
    return out - reached * excess[:, None, None, None]


@pytest.mark.parametrize("engine", ENGINES)
def test_rap_turns_little_influence_negative_and_keeps_the_sum(within: Within, engine: str) -> None:
    """The first linear rule, a box, is taken out: the oracle is of the rule for all the other convolutions."""
    rules = replace(onnxcam.COMPOSITES["rap"], first=None)
    found = explained("rap", "x", engine, composite=rules)
    expected = [rap(c).sum(1) for c in (1, 3)]
    within("rap", "loops over units", found, np.stack(expected, 1))
    assert (found < 0).any() and (found > 0).any()
    z = logits()[:, [1, 3]]
    np.testing.assert_allclose(found.sum((2, 3)), z, rtol=1e-4)
