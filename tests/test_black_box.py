"""Methods of forward passes on inputs that are no NCHW float pictures of an open batch.

Oracle: the same network with the input as PyTorch has it, whose maps are checked elsewhere.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from walking import network, relative

import onnxcam
from onnxcam.errors import UsageError

RNG = np.random.default_rng(7)
W = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
D = RNG.standard_normal((4, 5)).astype(np.float32)
X = RNG.integers(0, 256, (2, 3, 12, 14)).astype(np.float32)
BODY = "c = Conv(p, w) r = Relu(c) g = GlobalAveragePool(r) f = Flatten(g) h = MatMul(f, d) y = Mul(h, small)"
OPTIONS = {
    "occlusion": {"window": 0.3, "stride": 0.2, "fill": 12},
    "rise": {"samples": 12, "cells": 3},
    "score-cam": {},
}


def model(signature: str, before: str = "p = Identity(x)", d: np.ndarray = D) -> onnx.ModelProto:
    return network(f"{signature} {{ {before} {BODY} }}", w=W, d=d, small=np.float32(0.01), nchw=np.int64([0, 3, 1, 2]))


def explained(proto: onnx.ModelProto, x: np.ndarray, method: str, layer: str = "auto", **how: object) -> np.ndarray:
    loaded = onnxcam.load(proto, preprocess="none")
    options = {**OPTIONS.get(method, {}), "batch_size": 5, **how}
    chosen = {k: options.pop(k) for k in ("window", "stride", "fill", "samples", "cells") if k in options}
    e = loaded.explain(x, layer, [0, 3], method=method, options=chosen, **options)
    return next(iter(e.maps.values()))


PLAIN = model("(float[N,3,12,14] x) => (float[N,5] y)")
OTHERS = {
    "channels last": (model("(float[N,12,14,3] x) => (float[N,5] y)", "p = Transpose<perm=[0,3,1,2]>(x)"), "last"),
    "bytes": (model("(uint8[N,3,12,14] x) => (float[N,5] y)", "p = Cast<to=1>(x)"), "bytes"),
    "bytes, channels last": (
        model("(uint8[N,12,14,3] x) => (float[N,5] y)", "q = Cast<to=1>(x) p = Transpose<perm=[0,3,1,2]>(q)"),
        "bytes last",
    ),
    "a batch of one": (model("(float[1,3,12,14] x) => (float[1,5] y)"), "one"),
    "a batch of two": (model("(float[2,3,12,14] x) => (float[2,5] y)"), ""),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("method", OPTIONS)
def test_the_input_may_be_of_any_layout_type_and_batch(method: str, what: str) -> None:
    proto, kind = OTHERS[what]
    x = X.transpose(0, 2, 3, 1) if "last" in kind else X
    x = x.astype(np.uint8) if "bytes" in kind else x
    expected = explained(PLAIN, X, method)
    found = explained(proto, x, method)
    # Masked bytes are rounded to whole numbers, which moves a pixel by half a step of 255.
    assert relative(found, expected) <= (0.05 if "bytes" in kind else 1e-5)


@pytest.mark.parametrize("method", ["ablation-cam", "recipro-cam", "eigen-cam"])
@pytest.mark.parametrize("what", ["a batch of one", "a batch of two", "channels last"])
def test_layers_are_changed_in_any_batch(method: str, what: str) -> None:
    proto, kind = OTHERS[what]
    x = X.transpose(0, 2, 3, 1) if "last" in kind else X
    assert relative(explained(proto, x, method, "r"), explained(PLAIN, X, method, "r")) <= 1e-5


@pytest.mark.parametrize("method", ["rise", "occlusion", "score-cam", "ablation-cam", "recipro-cam"])
def test_a_single_logit_speaks_for_two_classes(method: str) -> None:
    """Against a network of two logits whose difference it is."""
    one, two = D[:, :1], np.concatenate([np.zeros_like(D[:, :1]), D[:, :1]], 1)
    loaded = [
        onnxcam.load(model(f"(float[N,3,12,14] x) => (float[N,{d.shape[1]}] y)", d=d), preprocess="none")
        for d in (one, two)
    ]
    options = dict(OPTIONS.get(method, {}))
    layer = "auto" if method in ("rise", "occlusion") else "r"
    single, double = (
        next(iter(m.explain(X, layer, [1], method=method, options=options).maps.values())) for m in loaded
    )
    assert relative(single, double) <= 1e-5


@pytest.mark.parametrize("method", ["occlusion", "rise"])
def test_signals_are_masked_along_their_axis(method: str) -> None:
    w = W[:, :, 0]
    proto = network(
        "(float[N,3,40] x) => (float[N,5] y) { c = Conv(x, w) r = Relu(c) g = GlobalAveragePool(r) f = Flatten(g) "
        "y = MatMul(f, d) }",
        w=w, d=D,
    )  # fmt: skip
    x = RNG.standard_normal((2, 3, 40)).astype(np.float32)
    x[:, :, 20:] *= 0.01  # nothing to see there
    options = {"occlusion": {"fill": 0.0}, "rise": {"samples": 60}}[method]
    found = np.abs(explained(proto, x, method, **options))
    assert found.shape == (2, 2, 40) and np.isfinite(found).all()
    if method == "occlusion":
        assert found[..., :18].mean() > 20 * found[..., 33:].mean()  # what no box covers with the other half


def test_a_layer_of_tokens_is_not_ablated() -> None:
    proto = network(
        "(float[N,3,8,8] x) => (float[N,5] y) { c = Conv(x, w) t = Reshape(c, tokens) p = Transpose<perm=[0,2,1]>(t) "
        "k = MatMul(p, e) r = Relu(k) m = ReduceMean<axes=[1], keepdims=0>(r) y = MatMul(m, d) }",
        w=W, e=RNG.standard_normal((4, 4)).astype(np.float32), d=D, tokens=np.int64([0, 4, 36]),
    )  # fmt: skip
    x = RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)
    with pytest.raises(UsageError, match=r"ablation-cam changes layers \(N, C, \*spatial\)"):
        onnxcam.load(proto, preprocess="none").explain(x, "r", method="ablation-cam")


@pytest.mark.parametrize("method", ["occlusion", "rise", "smoothgrad", "fullgrad", "saliency"])
def test_of_several_inputs_the_one_that_pictures_go_to_is_varied(method: str) -> None:
    body = BODY.replace("h = MatMul(f, d)", "j = Add(f, facts) h = MatMul(j, d)")
    proto = network(
        f"(float[N,3,12,14] x, float[N,4] facts) => (float[N,5] y) {{ p = Identity(x) {body} }}",
        w=W,
        d=D,
        small=np.float32(0.01),
    )
    loaded = onnxcam.load(proto, preprocess="none")
    facts = RNG.standard_normal((2, 4)).astype(np.float32)
    options = {"occlusion": {"stride": 0.3}, "rise": {"samples": 5}, "smoothgrad": {"samples": 2}}.get(method, {})
    e = loaded.explain({"x": X, "facts": facts}, targets=[1], method=method, options=options)
    assert "x" in e.maps and e.maps["x"].shape == (2, 1, 12, 14)
