"""Relevance through attention: CP-LRP and AttnLRP against LXT and explicit sums, the gradient against autograd.

LXT computes in float64 on the model that was exported, so the two differ by the rounding of what a file stores: 1e-5 is
what issue 4 asks for, and dynamo's files, which spell no GELU out in rounded constants, come to 1e-7.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch

pytest.importorskip("lxt.explicit.functional", reason="pip install --no-deps lxt==2.1")
from oracles.lxt_vit import AttnLrp, CpLrp, Plain, Transformer, relevance
from oracles.torch_models import export
from walking import ENGINES, Walker, canonised, network, relative

import onnxcam
from onnxcam.cli import main
from onnxcam.composites import COMPOSITES, KINDS, Composite
from onnxcam.errors import UsageError
from onnxcam.rules import Epsilon, Pass, Proportional, SignalTakesAll, Vjp
from small_nets import classifier

TINY = 1e-12
EPSILON = Composite(
    "epsilon",
    {kind: Vjp() for kind in KINDS}
    | dict.fromkeys(("activation", "normalisation", "softmax"), Pass())
    | dict.fromkeys(("linear", "averaging"), Epsilon(TINY))
    | {"additive": Proportional(TINY), "product": SignalTakesAll(Epsilon(TINY))},
)
START = np.array([[0.0, 1.0, -0.5, 0.0]])
WAYS: dict[str, Plain] = {"cp": CpLrp(), "attnlrp": AttnLrp()}


def tokens(images: int = 2) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((images, 5, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def files() -> dict[str, onnx.ModelProto]:
    return {exporter: export(Transformer().eval(), tokens(), exporter) for exporter in ("torchscript", "dynamo")}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("exporter", "tolerance"), [("torchscript", 1e-5), ("dynamo", 1e-7)])
def test_relevance_is_that_of_lxt(
    files: dict[str, onnx.ModelProto], exporter: str, tolerance: float, how: str, engine: str
) -> None:
    start = np.repeat(START, 2, 0)
    expected = relevance(Transformer().eval(), WAYS[how], tokens(), start)
    walker = Walker(canonised(files[exporter]), ["input"], "logits", engine=engine)
    got = walker({"input": tokens().astype(np.float64)}, start[None], EPSILON.with_attention(how))
    assert relative(got["input"][0], expected) <= tolerance


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_the_gradient_is_that_of_autograd(files: dict[str, onnx.ModelProto], exporter: str) -> None:
    model = Transformer().eval().double()
    leaf = torch.from_numpy(tokens()).double().requires_grad_()
    start = np.repeat(START, 2, 0)
    (expected,) = torch.autograd.grad(model(leaf), leaf, torch.from_numpy(start))
    walker = Walker(canonised(files[exporter]), ["input"], "logits")
    got = walker({"input": tokens().astype(np.float64)}, start[None], COMPOSITES["gradient"])
    assert relative(got["input"][0], expected.numpy()) <= 1e-6


# -- one attention, by explicit sums -----------------------------------------------------------------------------

BODY = """(float[2,5,4] x) => (float[2,5,4] y) {
    q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
    kt = Transpose<perm=[0,2,1]>(k) s0 = MatMul(q, kt) s = Add(s0, mask)
    p = Softmax<axis=-1>(s) y = MatMul(p, v)
}"""


def one_attention() -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    mask = np.zeros((5, 5), np.float32)
    mask[1, 3:] = -np.inf
    weights = {w: rng.standard_normal((4, 4)).astype(np.float32) for w in ("wq", "wk", "wv")}
    return network(BODY, mask=mask, **weights)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["relevance_cam", "epsilon_plus"])
def test_by_cp_the_values_share_and_nothing_else_gets_any(name: str, engine: str) -> None:
    rng = np.random.default_rng(2)
    x, r = rng.standard_normal((2, 5, 4)), rng.standard_normal((3, 2, 5, 4))
    walk = Walker(one_attention(), ["v", "q", "k", "s"], "y", engine=engine)({"x": x}, r, COMPOSITES[name])
    assert set(walk.flow.relevance) == {"v"}
    (p, v) = (walk.values[t] for t in "pv")
    contributions = np.einsum("nij,njc->nijc", p, v)
    total = contributions.sum(2)
    if name == "relevance_cam":  # by the contributions that have the sign of their sum
        contributions = np.where(np.sign(contributions) == np.sign(total)[:, :, None], contributions, 0)
        shares = contributions / contributions.sum(2, keepdims=True)
    else:
        shares = contributions / (total + 1e-6 * np.where(total < 0, -1, 1))[:, :, None]
    np.testing.assert_allclose(walk["v"], np.einsum("tnic,nijc->tnjc", r, shares), rtol=1e-9, atol=1e-12)
    if name == "relevance_cam":
        np.testing.assert_allclose(walk["v"].sum((2, 3)), r.sum((2, 3)), rtol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_by_attnlrp_scores_get_the_taylor_share_and_what_is_masked_gets_none(engine: str) -> None:
    """Explicit: the half that reaches the weights, then x J^T (R / y) with the Jacobian of softmax as a matrix."""
    rng = np.random.default_rng(2)
    x, r = rng.standard_normal((2, 5, 4)), rng.standard_normal((1, 2, 5, 4))
    composite = COMPOSITES["relevance_cam"].with_attention("attnlrp")
    walk = Walker(one_attention(), ["v", "q", "k", "s", "p"], "y", engine=engine)({"x": x}, r, composite)
    s, p, v, y, q, k = (walk.values[t] for t in ("s", "p", "v", "y", "q", "k"))
    half = 0.5 * r[0] / y
    weights = p * np.einsum("nic,njc->nij", half, v)
    np.testing.assert_allclose(walk["p"][0], weights, rtol=1e-6)
    np.testing.assert_allclose(walk["v"][0], v * np.einsum("nij,nic->njc", p, half), rtol=1e-6)
    jacobian = np.einsum("nij,jk->nijk", p, np.eye(5)) - np.einsum("nij,nik->nijk", p, p)
    alive = p > 0
    ratio = np.where(alive, weights / np.where(alive, p, 1), 0)
    scores = np.where(alive, np.where(alive, s, 0) * np.einsum("nijk,nij->nik", jacobian, ratio), 0)
    np.testing.assert_allclose(walk["s"][0], scores, rtol=1e-5, atol=1e-9)
    assert (walk["s"][0][:, 1, 3:] == 0).all() and np.isfinite(walk["s"]).all()
    unmasked = np.einsum("nic,njc->nij", q, k)
    per_score = 0.5 * scores / unmasked
    np.testing.assert_allclose(walk["q"][0], q * np.einsum("nij,njc->nic", per_score, k), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(walk["k"][0], k * np.einsum("nij,nic->njc", per_score, q), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_linear_attention_gives_all_to_the_value_and_none_to_its_normaliser(engine: str) -> None:
    """As EfficientViT has it: ReLU kernels, the value padded by a column of ones that becomes the normaliser."""
    body = """(float[1,5,4] x) => (float[1,5,4] y) {
        q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv) q = Relu(q0) k = Relu(k0)
        v = Pad(v0, pads, one) kt = Transpose<perm=[0,2,1]>(k) kv = MatMul(kt, v) o = MatMul(q, kv)
        top = Slice(o, zero, four, last) sum = Slice(o, four, five, last) e = Add(sum, eps) y = Div(top, e)
    }"""
    rng = np.random.default_rng(1)
    numbers = {"zero": 0, "four": 4, "five": 5, "last": -1}
    model = network(
        body,
        **{w: rng.standard_normal((4, 4)).astype(np.float32) for w in ("wq", "wk", "wv")},
        **{name: np.array([n], np.int64) for name, n in numbers.items()},
        pads=np.array([0, 0, 0, 0, 0, 1], np.int64),
        one=np.array(1, np.float32),
        eps=np.array(1e-6, np.float32),
    )
    x, r = rng.standard_normal((1, 5, 4)), rng.standard_normal((1, 1, 5, 4))
    for name in ("relevance_cam", "relevance_cam_signed"):
        walk = Walker(model, ["v0", "q0", "k0"], "y", engine=engine)({"x": x}, r, COMPOSITES[name])
        assert set(walk.flow.relevance) == {"v0"}
        np.testing.assert_allclose(walk["v0"].sum(), r.sum(), rtol=1e-9)


# -- signed sums -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_sums_of_signed_summands_share_by_the_sign_of_the_sum(engine: str) -> None:
    """Explicit; where the summands cancel to a millionth, the shares stay between nothing and all."""
    rng = np.random.default_rng(3)
    a = rng.standard_normal((2, 3, 4))
    b = rng.standard_normal((2, 3, 4))
    b[0, 0] = -a[0, 0] * (1 - 1e-6)
    r = rng.standard_normal((2, 2, 3, 4))
    model = network("(float[2,3,4] a, float[2,3,4] b) => (float[2,3,4] y) { y = Sub(a, b) }")
    walk = Walker(model, ["a", "b"], "y", engine=engine)({"a": a, "b": -b}, r, COMPOSITES["relevance_cam_signed"])
    sign = np.where(a + b > 0, 1, -1)
    pa, pb = np.maximum(sign * a, 0), np.maximum(sign * b, 0)
    np.testing.assert_allclose(walk["a"], r * pa / (pa + pb), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(walk["a"] + walk["b"], r, rtol=1e-12)
    assert (np.abs(walk["a"]) <= np.abs(r) * (1 + 1e-12)).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_relevance_for_signed_features_is_neither_lost_nor_blown_up(
    files: dict[str, onnx.ModelProto], engine: str
) -> None:
    """Only dense layers drop any, in units that none of their few inputs contributes positively to."""
    walker = Walker(canonised(files["dynamo"]), ["input"], "logits", engine=engine)
    start = np.repeat([[0.0, 1.0, 0.0, 0.0]], 2, 0)[None]
    got = walker({"input": tokens().astype(np.float64)}, start, COMPOSITES["relevance_cam_signed"])
    assert (got["input"] >= 0).all()
    assert {b.op_type for b in got.flow.balances if b.residual > 1e-9} <= {"MatMul", "Gemm"}
    assert (np.abs(got["input"].sum((2, 3)) - 1) < 0.05).all()


# -- the option --------------------------------------------------------------------------------------------------


def model_of(file: onnx.ModelProto) -> onnxcam.Model:
    return onnxcam.load(file)


def test_the_option_reaches_map_manifest_and_check(files: dict[str, onnx.ModelProto]) -> None:
    model = model_of(files["dynamo"])
    maps = {}
    for engine in ENGINES:
        for how in (None, "cp", "attnlrp"):
            e = model.explain(tokens(), ["input"], method="lrp", engine=engine, attention=how)
            assert e.options["attention"] == (how or "cp")
            maps[engine, how] = e.maps["input"]
        np.testing.assert_array_equal(maps[engine, None], maps[engine, "cp"])
        assert relative(maps[engine, "attnlrp"], maps[engine, "cp"]) > 1e-2
    assert relative(maps["onnx", "attnlrp"], maps["numpy", "attnlrp"]) <= 1e-4
    compiled = onnxcam.compile(model, ["input"], [1], method="lrp", attention="attnlrp")
    metadata = {p.key: p.value for p in compiled.proto.metadata_props}
    assert metadata["onnxcam.attention"] == "attnlrp"
    passed = {how: {row.op_type for row in model.check("relevance_cam", how).rows} for how in ("cp", "attnlrp")}
    assert "Softmax" in passed["attnlrp"] and "Softmax" not in passed["cp"]


def test_what_is_no_way_through_attention_is_refused(files: dict[str, onnx.ModelProto]) -> None:
    model = model_of(files["dynamo"])
    with pytest.raises(UsageError, match="cp, attnlrp"):
        model.check("relevance_cam", "chefer")
    with pytest.raises(UsageError, match="gradient has one way"):
        model.explain(tokens(), ["input"], composite="gradient", attention="attnlrp")


def test_the_command_line_takes_the_option(files: dict[str, onnx.ModelProto], tmp_path, capsys) -> None:
    path = tmp_path / "vit.onnx"
    path.write_bytes(files["dynamo"].SerializeToString())
    assert main(["check", str(path), "--attention", "attnlrp", "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert {n["rule"] for n in nodes if n["op_type"] == "Softmax"} == {"Taylor(eps=1e-09)"}


def test_transformers_get_the_composite_for_signed_features_and_convolutions_the_papers(
    files: dict[str, onnx.ModelProto],
) -> None:
    x = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)
    for model, expected in (
        (model_of(files["torchscript"]), "relevance_cam_signed"),
        (model_of(files["dynamo"]), "relevance_cam_signed"),
        (onnxcam.load(classifier("c = Conv(x, w8x3x3_0) r = Relu(c)", "r#8")), "relevance_cam"),
    ):
        image = x if model.spec.layout else tokens(1)
        layer = "auto" if model.spec.layout else "input"
        assert model.check().composite == expected
        assert model.explain(image, layer, method="lrp").options["composite"] == expected
        asked = model.explain(image, layer, method="lrp", composite="epsilon_plus")
        assert asked.options["composite"] == "epsilon_plus"
