"""Heads: whatever a file does with its logits at the end, it is explained from the logits.

Oracle for the logits: ONNX Runtime on the part of the file before its head, and for the maps the file that ends there.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from walking import as_written, network

from onnxcam.compile import compile
from onnxcam.errors import ModelError, UsageError
from onnxcam.explanation import Explanation
from onnxcam.heads import count_classes, locate_logits, one_row_each
from onnxcam.model import load
from onnxcam.starts import STARTS

RNG = np.random.default_rng(11)
X = RNG.normal(size=(3, 3, 9, 9)).astype(np.float32)
WEIGHTS = {
    "w": RNG.normal(size=(4, 3, 3, 3)).astype(np.float32),
    "v": RNG.normal(size=(4, 5)).astype(np.float32),
    "u": RNG.normal(size=(4, 1)).astype(np.float32),
    "b": RNG.normal(size=(4,)).astype(np.float32),
}
FEATURES = "c = Conv(x, w) r = Relu(c) g = GlobalAveragePool(r) f = Flatten<axis=1>(g)"


def model(tail: str, out: str = "float", batch: str = "N", opset: int = 17, **constants: np.ndarray) -> onnx.ModelProto:
    outputs = ", ".join(f"{kind} {name}" for kind, name in zip(out.split(), "yz", strict=False))
    body = f"(float[{batch},3,9,9] x) => ({outputs}) {{ {FEATURES} {tail} }}"
    return network(body, opset, **WEIGHTS, **constants)


def close(ours: np.ndarray, reference: np.ndarray, tolerance: float = 1e-5) -> None:
    assert ours.shape == reference.shape
    np.testing.assert_allclose(ours, reference, rtol=0, atol=tolerance * np.abs(reference).max())


PLAIN = model("y = Gemm(f, v)")


@cache
def plain(tail: str = "y = Gemm(f, v)", targets: tuple[int, ...] = (1, 3)) -> Explanation:
    """The explanation of the file that ends in its logits."""
    return load(model(tail)).explain(X, targets=targets)


Z = "z0 = Gemm(f, v)"
MANY = [
    ("y = ArgMax<axis=1>(z0)", "int64", {}),
    ("y = ArgMax<axis=-1, keepdims=0>(z0)", "int64", {}),
    ("p = Softmax(z0) a = ArgMax<axis=1, keepdims=0>(p) y = Cast<to=6>(a)", "int32", {}),
    ("y, z = TopK<axis=1>(z0, two)", "float int64", {"two": np.array([2])}),
    ("y, z = TopK<axis=1>(z0, two)", "float int64 z", {"two": np.array([2])}),
    ("p = Softmax(z0) y = ReduceMax<axes=[1]>(p)", "float", {}),
    ("p = Softmax(z0) y = ReduceMax<axes=[1], keepdims=0>(p)", "float", {}),
    ("y = Softmax(z0)", "float", {}),
    ("p = Softmax(z0) y = Cast<to=10>(p)", "float16", {}),
    ("p = Softmax(z0) y = QuantizeLinear(p, s, o)", "uint8", {"s": np.float32(1 / 255), "o": np.uint8(0)}),
    (
        "p = Softmax(z0) q = QuantizeLinear(p, s, o) y = DequantizeLinear(q, s, o)",
        "float",
        {"s": np.float32(1 / 255), "o": np.uint8(0)},
    ),
    ("p = Softmax(z0) k = Mul(p, s) y = Cast<to=2>(k)", "uint8", {"s": np.float32(255)}),
    ("y = Cast<to=6>(z0)", "int32", {}),
    ("y = LogSoftmax(z0)", "float", {}),
    ("p = Softmax(z0) y = Log(p)", "float", {}),
    ("y = Sigmoid(z0)", "float", {}),
    ("p = Sigmoid(z0) y = Clip(p, s, o)", "float", {"s": np.float32(1e-6), "o": np.float32(1)}),
    ("y = Clip(z0, s, o)", "float", {"s": np.float32(-100), "o": np.float32(100)}),
    ("y = Hardmax<axis=1>(z0)", "float", {}),
    ("a = ArgMax<axis=1, keepdims=0>(z0) y = Gather(names, a)", "int64", {"names": np.arange(10, 15)}),
    ("a = ArgMax<axis=1, keepdims=0>(z0) y = OneHot(a, s, o)", "float", {"s": np.array(5), "o": np.float32([0, 1])}),
    ("n = Unsqueeze(z0, s) y = Softmax(n)", "float", {"s": np.array([1])}),
    ("y = Unsqueeze(z0, s)", "float", {"s": np.array([1])}),
    ("n = Unsqueeze(z0, s) y = Identity(n)", "float", {"s": np.array([2, 3])}),
]


@pytest.mark.parametrize(("tail", "out", "constants"), MANY, ids=[t for t, _, _ in MANY])
def test_a_head_is_explained_from_its_logits(tail: str, out: str, constants: dict) -> None:
    kinds, _, output = out.partition(" z") if out.endswith(" z") else (out, "", None)
    proto = model(f"{Z} {tail}", kinds or out, **constants)
    ours = load(proto, output="z" if out.endswith(" z") else output).explain(X, targets=[1, 3])
    close(ours.logits, plain().logits)
    close(ours.maps["auto"], plain().maps["auto"])


def test_the_softmax_of_old_opsets_flattens_and_its_classes_are_counted() -> None:
    """Before opset 13 axis 1 means all axes from there on."""
    kernel = WEIGHTS["v"].T.reshape(5, 4, 1, 1).copy()
    proto = model("k = Conv(g, kernel) y = Softmax<axis=1>(k)", opset=11, kernel=kernel)
    e = load(proto).explain(X, targets=[1, 3])
    close(e.logits, plain().logits)
    close(e.probabilities, plain().probabilities)
    close(e.maps["auto"], plain().maps["auto"])


ONE = [
    ("n = Gemm(f, u) y = Squeeze(n, one)", None),
    ("n = Gemm(f, u) y = Reshape(n, all)", None),
    ("n = Gemm(f, u) s = Squeeze(n, one) y = Sigmoid(s)", "Sigmoid"),
    ("n = Gemm(f, u) y = Sigmoid(n)", "Sigmoid"),
    ("n = Gemm(f, u) p = Sigmoid(n) q = Sub(unit, p) y = Concat<axis=1>(q, p)", "Sigmoid"),
    ("n = Gemm(f, u) p = Sigmoid(n) k = Greater(p, half) y = Cast<to=1>(k)", "Sigmoid"),
    ("y = MatMul(f, column)", None),
]


@pytest.mark.parametrize(("batch", "engine"), [("N", "numpy"), ("N", "onnx"), ("1", "numpy"), ("3", "onnx")])
@pytest.mark.parametrize(("tail", "squash"), ONE, ids=[t for t, _ in ONE])
def test_a_single_logit_may_lose_its_axis(tail: str, squash: str | None, batch: str, engine: str) -> None:
    constants = {
        "one": np.array([1]), "all": np.array([-1]), "unit": np.float32(1), "half": np.float32(0.5),
        "column": WEIGHTS["u"][:, 0],
    }  # fmt: skip
    found = load(model(tail, "float", batch, **constants))
    assert found.canonical().squash == squash
    e = found.explain(X, targets=[0, 1], engine=engine)
    reference = plain("y = Gemm(f, u)", (0, 1))
    close(e.logits, reference.logits)
    close(e.maps["auto"], reference.maps["auto"])
    if batch == "N":
        compiled = compile(found, ["auto"], [0, 1])
        maps = ort.InferenceSession(compiled.proto.SerializeToString()).run([compiled.maps["auto"]], {"x": X})[0]
        close(maps, reference.maps["auto"])


def test_the_maximum_over_places_is_no_head() -> None:
    """A global max pool makes logits; it does not choose among them."""
    kernel = WEIGHTS["v"].T.reshape(5, 4, 1, 1).copy()
    proto = network(
        "(float[N,3,9,9] x) => (float y) { c = Conv(x, w) r = Relu(c) k = Conv(r, u) y = ReduceMax<axes=[2,3]>(k) }",
        w=WEIGHTS["w"],
        u=kernel,
    )
    found = load(proto)
    assert found.canonical().logits == "y"
    expected = ort.InferenceSession(proto.SerializeToString()).run(["y"], {"x": X})[0]
    close(found.explain(X).logits, expected.reshape(3, 5))


# -- scikit-learn's converters ----------------------------------------------------------------------------------------


def sklearn() -> onnx.ModelProto:
    """As skl2onnx writes an MLPClassifier: labels by ArrayFeatureExtractor first, then a sequence of maps by ZipMap."""
    ml = {"domain": "ai.onnx.ml"}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["p"], axis=-1),
        helper.make_node("ArgMax", ["p"], ["best"], axis=1),
        helper.make_node("ArrayFeatureExtractor", ["classes", "best"], ["picked"], **ml),
        helper.make_node("Reshape", ["picked", "flat"], ["output_label"]),
        helper.make_node("ZipMap", ["p"], ["output_probability"], classlabels_int64s=[7, 8, 9], **ml),
    ]
    weights = {"w": RNG.normal(size=(6, 8)), "v": RNG.normal(size=(8, 3))}
    tensors = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in weights.items()]
    tensors += [
        numpy_helper.from_array(np.array([7, 8, 9]), "classes"),
        numpy_helper.from_array(np.array([-1]), "flat"),
    ]
    maps = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    sequence = helper.make_value_info("output_probability", helper.make_sequence_type_proto(maps))
    graph = helper.make_graph(
        nodes,
        "sklearn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 6])],
        [helper.make_tensor_value_info("output_label", TensorProto.INT64, [None]), sequence],
        tensors,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("output", [None, "output_probability", "p", "logits"])
@pytest.mark.parametrize("engine", ["numpy", "onnx"])
def test_labels_and_zipped_probabilities_are_explained_from_the_logits(output: str | None, engine: str) -> None:
    proto = sklearn()
    x = RNG.normal(size=(4, 6)).astype(np.float32)
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    e = load(proto, output=output).explain(
        x, "x", 1, method="lrp", composite="gradient", start="one-hot", engine=engine
    )
    hidden = x @ weights["w"]
    close(e.logits, np.maximum(hidden, 0) @ weights["v"])
    close(e.maps["x"][:, 0], ((hidden > 0) * weights["v"][:, 1]) @ weights["w"].T)
    assert load(proto, output=output).check().problems == []


def test_trees_are_refused_by_name() -> None:
    tree = helper.make_node(
        "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=1, nodes_treeids=[0] * 3,
        nodes_nodeids=[0, 1, 2], nodes_featureids=[0] * 3, nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_values=[0.5, 0.0, 0.0], nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 0, 0], target_treeids=[0, 0],
        target_nodeids=[1, 2], target_ids=[0, 0], target_weights=[1.0, 2.0],
    )  # fmt: skip
    graph = helper.make_graph(
        [tree],
        "tree",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    found = load(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    with pytest.raises(ModelError, match=r"no operator for ai\.onnx\.ml\.TreeEnsembleRegressor.*trees"):
        found.explain(np.zeros((1, 2), np.float32), "x", method="lrp")


# -- which output -----------------------------------------------------------------------------------------------------


def test_an_inner_tensor_can_be_explained_as_logits() -> None:
    """The other half of the network is left out; a Softmax there is walked back from as at the end."""
    proto = model("k = Gemm(f, v) p = Softmax(k) q = Gemm(p, t) y = Softmax(q)", t=np.eye(5, 2, dtype=np.float32))
    for output in ("k", "p"):
        e = load(proto, output=output).explain(X, targets=3)
        close(e.logits, plain().logits)
        close(e.maps["auto"][:, 0], plain().maps["auto"][:, 1])
    kernel = WEIGHTS["v"].T.reshape(5, 4, 1, 1).copy()
    proto = model("k = Conv(g, kernel) q = Flatten(k) y = Gemm(q, t)", t=np.eye(5, 2, dtype=np.float32), kernel=kernel)
    close(load(proto, output="k").explain(X).logits, plain().logits)
    with pytest.raises(UsageError, match="no output is called 'kk': there are y, and an inner tensor k"):
        load(proto, output="kk")


def test_of_several_heads_the_first_is_explained_and_the_others_by_name() -> None:
    proto = model("y = Gemm(f, v) k = Gemm(f, u) z = Sigmoid(k)", "float float")
    assert load(proto).outputs == ("y", "z")
    close(load(proto).explain(X).logits, plain().logits)
    assert load(proto, output="z").explain(X).logits.shape == (3, 1)


@pytest.mark.parametrize(
    ("tail", "out", "says"),
    [
        (
            "q = Reshape(r, boxes) s = Reshape(r, scores) i = NonMaxSuppression(q, s, few) z = Gemm(f, v) "
            "y = Gather<axis=2>(s, i)",
            "float[a,b,c,d] float[N,5]",
            r"node '\w+' \(NonMaxSuppression\): the model detects objects.*--output \(there is z\)",
        ),
        ("y = Reshape(r, boxes) z = Gemm(f, v)", "float float", r"\(1, 49, 4\): onnxcam explains .*\(there is z\)"),
        ("y = ArgMax<axis=1>(r)", "int64", r"are int64, not floats \(ArgMax of \(1, 4, 7, 7\)\)"),
    ],
)
def test_what_is_no_classifier_is_refused_by_name(tail: str, out: str, says: str) -> None:
    constants = {"boxes": np.array([1, 49, 4]), "scores": np.array([1, 4, 49]), "few": np.array([3])}
    found = load(model(tail, out, "1", **constants))
    with pytest.raises(ModelError, match=says) as caught:
        found.explain(X)
    assert "\n" not in str(caught.value)
    assert any(row.reason for row in found.check().rows)


# -- starts behind a Sigmoid ------------------------------------------------------------------------------------------


def test_the_gradient_of_the_probability_behind_a_sigmoid_is_the_sigmoids() -> None:
    """Each class has a probability of its own: p (1 - p) at the class, nothing at the others."""
    logits, targets = np.array([[2.0, -1.0, 0.5]]), np.array([[1, 2]])
    got = STARTS["softmax-gradient"](logits, targets, "Sigmoid")
    p = 1 / (1 + np.exp(-logits[0]))
    expected = np.zeros((2, 1, 3))
    expected[0, 0, 1], expected[1, 0, 2] = p[1] * (1 - p[1]), p[2] * (1 - p[2])
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    for name in ("one-hot", "logit", "contrast", "centred"):
        np.testing.assert_array_equal(STARTS[name](logits, targets, "Sigmoid"), STARTS[name](logits, targets))


@pytest.mark.parametrize("engine", ["numpy", "onnx"])
def test_several_labels_at_once_start_apart(engine: str) -> None:
    """Class 1 alone: the map is what the gradient of its own probability gives, by the chain rule."""
    options = {"method": "lrp", "composite": "gradient", "engine": engine}
    ours = load(model(f"{Z} y = Sigmoid(z0)")).explain(X, "input", 1, start="softmax-gradient", **options)
    plain = load(PLAIN).explain(X, "input", 1, start="one-hot", **options)
    p = 1 / (1 + np.exp(-plain.logits[:, 1].astype(np.float64)))
    close(ours.maps["input"], plain.maps["input"] * (p * (1 - p))[:, None, None, None])


# -- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "batch", "count"),
    [(("N", 5), None, 5), (("N", 5, 1, 1), None, 5), ((1, 1, 5), 1, 5), (("N",), None, 1), ((3,), 3, 1), ((5,), 1, 5)],
)
def test_classes_are_counted_by_shape(shape, batch, count) -> None:
    assert count_classes(shape, batch) == count
    assert one_row_each(shape)


@pytest.mark.parametrize(
    "tail", ["y = Mul(z, k)", "y = Exp(z)", "y = Concat<axis=1>(z, z)", "y = Gather<axis=1>(z, i)"]
)
def test_what_is_computed_with_logits_is_no_head(tail: str) -> None:
    graph = as_written(
        network(
            f"(float[1,3] x) => (float y) {{ z = MatMul(x, w) {tail} }}",
            w=np.eye(3, dtype=np.float32),
            k=np.float32(2),
            i=np.array([0, 1]),
        )
    )
    assert locate_logits(graph, "y") == ("y", None)
