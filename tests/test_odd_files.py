"""Files as exporters and users really write them, each of which has gone wrong once.

The oracles: ONNX Runtime runs the file, or PyTorch's autograd differentiates the same network in float64.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch.nn import functional as F

import onnxcam
from onnxcam.errors import ModelError
from onnxcam.methods import Method

RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 3, 3, 3)).astype(np.float32)
HEAD = RNG.standard_normal((4, 5)).astype(np.float32)
X = RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)
TAIL = " p = GlobalAveragePool(b) q = Flatten(p) y = MatMul(q, f)"
ENTRIES = Method("entries", lambda ops, activation, relevance: relevance, "gradient", "one-hot", False, "entries")


def model(body: str, head: str = "float[N,3,8,8] x) => (float[N,5] y", **constants: object) -> onnx.ModelProto:
    known = {
        "w": W,
        "f": HEAD,
        **{f"i{n}": np.array([n], np.int64) for n in range(3)},
        "last": np.array([-1], np.int64),
    }
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g ({head}) {{{body}}}')
    known |= {name: np.asarray(value) for name, value in constants.items()}
    made.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in known.items() if k in body)
    return made


def runs(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, {session.get_inputs()[0].name: x})[0]


FOLDED_SQUEEZE = """c = Conv(x, w) s = Shape(c) c1 = Slice(s, i1, i2, i0) n = Squeeze(c1, i0) n2 = Unsqueeze(n, i0)
    n0 = Slice(s, i0, i1, i0) t = Concat<axis=0>(n0, n2, last) r = Reshape(c, t) p = ReduceMean<axes=[2],keepdims=0>(r)
    y = MatMul(p, f)"""


@pytest.mark.parametrize("engine", ["onnx", "numpy"])
@pytest.mark.parametrize(
    "proto",
    [
        model(FOLDED_SQUEEZE),
        model("s = Shape(w) s0 = Slice(s, i0, i1) z = ConstantOfShape<value=float[1]{0.5}>(s0) c = Conv(x, w, z) "
              "b = Relu(c)" + TAIL),
        model("s = Shape(w) s0 = Slice(s, i0, i1) z = Expand(one, s0) c = Conv(x, w, z) b = Relu(c)" + TAIL,
              one=np.ones(1, np.float32)),
        model("c = Conv(x, w) d = MeanVarianceNormalization(c) b = Relu(d)" + TAIL),
    ],
    ids=["squeeze-of-a-shape", "constant-of-a-weight's-shape", "expand-to-a-weight's-shape", "mvn-of-default-axes"],
)  # fmt: skip
def test_it_is_explained_by_both_engines(proto: onnx.ModelProto, engine: str) -> None:
    e = onnxcam.load(proto).explain(X, "Conv_0", engine=engine)
    np.testing.assert_allclose(e.logits, runs(proto, X), rtol=1e-5, atol=1e-6)
    assert np.ptp(e.maps["Conv_0"]) > 0


def test_what_depends_on_the_number_of_images_is_explained_one_by_one() -> None:
    proto = model(
        'c = Conv(x, w) d = Resize<mode="linear">(c,,,sizes) b = Relu(d)' + TAIL, sizes=np.array([1, 4, 12, 12])
    )
    loaded = onnxcam.load(proto)
    e = loaded.explain(X, ["Conv_0", "x"])
    for i in range(2):
        alone = loaded.explain(X[i : i + 1], ["Conv_0", "x"], engine="numpy")
        np.testing.assert_allclose(e.logits[i], runs(proto, X[i : i + 1])[0], rtol=1e-5, atol=1e-6)
        for name, heat in alone.maps.items():
            np.testing.assert_allclose(e.maps[name][i], heat[0], atol=1e-5 * np.abs(heat).max())


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("c = Conv(x, w) b = Loop<body = inner (int64 k, bool on, float[N,4,6,6] u) => (bool still, float[N,4,6,6] v) "
         "{ still = Identity(on) v = Relu(u) }>(trips, , c)" + TAIL, "no operator for Loop at opset 17"),
        ("c = Conv(x, w) a = Relu(c) n = Neg(a) s = SequenceConstruct(a, n) j = ConcatFromSequence<axis=1>(s) "
         "b, rest = Split<axis=1>(j, halves)" + TAIL, "no operator for SequenceConstruct at opset 17"),
    ],
    ids=["loop", "sequence"],
)  # fmt: skip
def test_what_no_shape_is_known_behind_is_refused_by_its_own_name(body: str, what: str) -> None:
    proto = model(body, trips=np.int64(3), halves=np.array([4, 4]))
    with pytest.raises(ModelError, match=what):
        onnxcam.load(proto).explain(X[:1], "auto")


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("shifted", [True, False])
def test_a_softmax_that_is_written_out_is_a_head(shifted: bool, keep: int) -> None:
    lead = "c = Conv(x, w) b = Relu(c)" + TAIL.replace("y =", "l =")
    spread = "" if keep else "t2 = Unsqueeze(t, i1) "
    total = "t" if keep else "t2"
    shift = "m = ReduceMax<axes=[1]>(l) d = Sub(l, m) e = Exp(d)" if shifted else "e = Exp(l)"
    written = model(f"{lead} {shift} t = ReduceSum<keepdims={keep}>(e, i1) {spread}y = Div(e, {total})")
    plain = model(f"{lead} y = Softmax<axis=1>(l)")
    one, other = (onnxcam.load(proto).explain(X, ["Conv_0", "x"]) for proto in (written, plain))
    np.testing.assert_allclose(one.probabilities, runs(written, X), rtol=1e-5)
    np.testing.assert_allclose(one.logits, other.logits, rtol=1e-6)
    assert one.options["composite"] == other.options["composite"]
    for name, heat in other.maps.items():
        np.testing.assert_allclose(one.maps[name], heat, atol=1e-6 * np.abs(heat).max())


@pytest.mark.parametrize(
    "squash", ["z = Softmax<axis=1>(l)", "e = Exp(l) t = ReduceSum<keepdims=1>(e, i1) z = Div(e, t)"]
)
@pytest.mark.parametrize(
    "written",
    ["s = Mul(z, many) r = Round(s) y = Div(r, many)", "k = Greater(z, low) y = Where(k, z, zero)"],
    ids=["rounded", "small-ones-blotted-out"],
)
def test_logits_are_found_behind_what_is_done_to_probabilities(squash: str, written: str) -> None:
    lead = "c = Conv(x, w) b = Relu(c)" + TAIL.replace("y =", "l =")
    found = {name: np.float32(v) for name, v in (("many", 1e4), ("low", 0.05), ("zero", 0))}
    proto = model(f"{lead} {squash} {written}", **found)
    plain = model(f"{lead} y = Softmax<axis=1>(l)")
    one, other = (onnxcam.load(p).explain(X, "Conv_0") for p in (proto, plain))
    np.testing.assert_allclose(one.logits, other.logits, rtol=1e-6)
    np.testing.assert_allclose(one.maps["Conv_0"], other.maps["Conv_0"], atol=1e-6 * np.abs(other.maps["Conv_0"]).max())


def test_a_softmax_over_groups_of_classes_is_no_softmax_over_classes() -> None:
    proto = model(
        "c = Conv(x, w) b = Relu(c) p = GlobalAveragePool(b) q = Flatten(p) l = MatMul(q, f) e = Exp(l) "
        "g = Reshape(e, groups) t = ReduceSum(g, i2) s = Expand(t, wide) r = Reshape(s, flat) y = Div(e, r)",
        "float[1,3,8,8] x) => (float[1,6] y", f=RNG.standard_normal((4, 6)).astype(np.float32),
        groups=np.array([1, 2, 3]), wide=np.array([1, 2, 3]), flat=np.array([1, 6]),
    )  # fmt: skip
    e = onnxcam.load(proto).explain(X[:1], "Conv_0")
    np.testing.assert_allclose(e.logits, runs(proto, X[:1]), rtol=1e-5)


def test_shares_of_a_sum_that_is_no_softmax_are_the_output() -> None:
    lead = "c = Conv(x, w) b = Relu(c)" + TAIL.replace("y =", "l =")
    proto = model(f"{lead} a = Sigmoid(l) e = Exp(a) t = ReduceSum(e, i0) y = Div(e, t)")  # over images
    np.testing.assert_allclose(onnxcam.load(proto).explain(X, "Conv_0").logits, runs(proto, X), rtol=1e-5)


# -- inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_a_picture_without_an_axis_of_images_is_one_image(layout: str, tmp_path) -> None:
    move = "t = Transpose<perm=[2,0,1]>(a)" if layout == "hwc" else "t = Identity(a)"
    sides = "8,8,3" if layout == "hwc" else "3,8,8"
    body = f"k = Cast<to=1>(im) a = Div(k, most) {move} u = Unsqueeze(t, i0) c = Conv(u, w) b = Relu(c)" + TAIL
    proto = model(body, f"uint8[{sides}] im) => (float[1,5] y", most=np.float32(255))
    picture = np.random.default_rng(1).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    array = picture if layout == "hwc" else picture.transpose(2, 0, 1)
    loaded = onnxcam.load(proto, preprocess="raw")
    e = loaded.explain(array, ["Conv_0", "im"])
    np.testing.assert_allclose(e.logits, runs(proto, np.ascontiguousarray(array)), rtol=1e-5)
    assert e.maps["Conv_0"].shape == (1, 1, 6, 6) and e.maps["im"].shape == (1, 1, 8, 8)
    same = loaded.explain(array[None], ["Conv_0"])
    np.testing.assert_array_equal(e.maps["Conv_0"], same.maps["Conv_0"])
    from PIL import Image

    changed = loaded.with_weights({"w": W})
    np.testing.assert_array_equal(changed.explain(array, ["Conv_0"]).maps["Conv_0"], e.maps["Conv_0"])
    drawn = loaded.explain(Image.fromarray(picture), ["Conv_0"])
    np.testing.assert_allclose(drawn.maps["Conv_0"], e.maps["Conv_0"], rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "shape", "channels"),
    [
        ("t = Transpose<perm=[0,2,1]>(x) u = Unsqueeze(t, i0) v = Transpose<perm=[1,2,0,3]>(u)", ("N", 16, 3), 3),
        ("g = Gather<axis=1>(x, first) u = Unsqueeze(g, i0) m = Transpose<perm=[0,2,1]>(x) v = Unsqueeze(m, i2)",
         ("N", 16, 3), 3),
        ("u = Unsqueeze(x, i0) v = Transpose<perm=[1,0,2,3]>(u)", (3, 16, 16), 1),
    ],
    ids=["turned-behind", "scalar-gather", "images-first"],
)  # fmt: skip
def test_a_first_axis_that_counts_images_stays_one(body: str, shape: tuple, channels: int) -> None:
    head = f"float[{','.join(map(str, shape))}] x) => (float[{shape[0]},5] y"
    weight = RNG.standard_normal((4, channels, 1, 1)).astype(np.float32)
    proto = model(f"{body} c = Conv(v, w) b = Relu(c)" + TAIL, head, first=np.int64(0), w=weight)
    assert onnxcam.load(proto).spec.shape == shape


def test_a_picture_that_a_branch_reads_stays_as_it_is() -> None:
    proto = model("""u = Unsqueeze(im, i0) z = If<then_branch = one () => (float[3,8,8] s) { s = Identity(im) },
        else_branch = two () => (float[3,8,8] s2) { s2 = Neg(im) }>(yes) e = Unsqueeze(z, i0) a = Add(u, e)
        c = Conv(a, w) b = Relu(c)""" + TAIL, "float[3,8,8] im) => (float[1,5] y", yes=np.bool_(True))  # fmt: skip
    assert onnxcam.load(proto).spec.shape == (3, 8, 8)


def test_three_axes_that_are_no_picture_stay_as_they_are() -> None:
    proto = model("u = Unsqueeze(x, i2) c = Conv(u, w) b = Relu(c)" + TAIL, "float[2,3,8] x) => (float[2,5] y",
                  w=W[:, :, :1, :])  # fmt: skip
    assert onnxcam.load(proto).spec.shape == (2, 3, 8)


def test_an_input_without_a_shape_takes_what_its_convolution_takes() -> None:
    proto = model("c = Conv(x, w) b = Relu(c)" + TAIL)
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    loaded = onnxcam.load(proto)
    assert loaded.spec.shape == (None, 3, None, None) and loaded.spec.layout == "NCHW"
    e = loaded.explain(X, "Conv_0")
    np.testing.assert_allclose(e.logits, runs(proto, X), rtol=1e-5, atol=1e-6)


# -- gradients ---------------------------------------------------------------------------------------------------


def gradient(proto: onnx.ModelProto, engine: str) -> np.ndarray:
    e = onnxcam.load(proto).explain(X, "x", [1], method=ENTRIES, composite="gradient", start="one-hot", engine=engine)
    return next(iter(e.maps.values()))[:, 0]


def autograd(network) -> np.ndarray:
    x = torch.tensor(X, dtype=torch.float64, requires_grad=True)
    c = F.conv2d(x, torch.tensor(W, dtype=torch.float64))
    y = network(c).mean((2, 3)) @ torch.tensor(HEAD, dtype=torch.float64)
    return torch.autograd.grad(y[:, 1].sum(), x)[0].numpy()


@pytest.mark.parametrize("engine", ["onnx", "numpy"])
def test_a_root_of_nothing_lets_nothing_through(engine: str) -> None:
    found = gradient(model("c = Conv(x, w) a = Relu(c) b = Sqrt(a)" + TAIL), engine)
    expected = autograd(lambda c: c.relu().sqrt())
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("engine", ["onnx", "numpy"])
def test_a_normalisation_whose_deviation_is_read_passes_that_on(engine: str) -> None:
    proto = model(
        "c = Conv(x, w) t = Transpose<perm=[0,2,3,1]>(c) l, m, d = LayerNormalization<axis=-1>(t, ones) u = Mul(l, d) "
        "b = Transpose<perm=[0,3,1,2]>(u)" + TAIL, ones=np.ones(4, np.float32),
    )  # fmt: skip

    def network(c):
        return (c - c.mean(1, keepdim=True)) / (c.var(1, keepdim=True, unbiased=False) + 1e-5)

    expected = autograd(network)
    np.testing.assert_allclose(gradient(proto, engine), expected, atol=1e-4 * np.abs(expected).max())
