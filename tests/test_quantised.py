"""Quantised networks, from the file to the map: files as ONNX Runtime's own quantiser makes them.

Oracles: PyTorch's fake quantisation for gradients and relevance (`oracles/torch_quantised.py`), ONNX Runtime on the
file itself for what the compiled model computes.
"""

from __future__ import annotations

import csv
import logging

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from scipy.stats import spearmanr

import onnxcam
from onnxcam.composites import COMPOSITES
from onnxcam.errors import UsageError
from tests.oracles.torch_quantised import QDQ
from tests.walking import ENGINES, Walker, network, relative

FLOAT = """(float[1,3,16,16] x) => (float[1,5] y) {
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    a1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1], group=8>(a1, w2, b2)
    a2 = Relu(c2)
    c3 = Conv(a2, w3, b3)
    s = Add(c3, a1)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(s)
    c4 = Conv<pads=[1,1,1,1], strides=[2,2]>(p, w4, b4)
    a4 = Relu(c4)
    g = GlobalAveragePool(a4)
    f = Flatten(g)
    y = Gemm<transB=1>(f, w5, b5)
}"""
SHAPES = {"1": (8, 3, 3, 3), "2": (8, 1, 3, 3), "3": (8, 8, 1, 1), "4": (12, 8, 3, 3), "5": (5, 12)}
TYPES = {
    "u8s8": (QuantType.QUInt8, QuantType.QInt8),
    "s8s8": (QuantType.QInt8, QuantType.QInt8),
    "u8u8": (QuantType.QUInt8, QuantType.QUInt8),
}
WIDE = dict.fromkeys(("u16s8", "u16s8 before opset 21"), (QuantType.QUInt16, QuantType.QInt8))
CONTRIB = ("u16s8 before opset 21",)  # as operators of ONNX Runtime's own


def float_net():
    rng = np.random.default_rng(3)
    given = {}
    for i, shape in SHAPES.items():
        given[f"w{i}"] = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
        given[f"b{i}"] = rng.normal(0, 0.2, shape[0]).astype(np.float32)
    proto = network(FLOAT, **given)
    for node in proto.graph.node:
        node.name = f"node_{node.output[0]}"
    return proto


def picture(n=1, seed=5):
    return np.random.default_rng(seed).normal(size=(n, 3, 16, 16)).astype(np.float32)


class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": picture(seed=i)} for i in range(8)]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Quantised files by (format, types, per channel), made when asked for."""
    folder, made = tmp_path_factory.mktemp("quantised"), {}
    onnx.save(float_net(), folder / "float.onnx")
    logging.getLogger().setLevel(logging.ERROR)

    def make(form="qdq", types="u8s8", per_channel=True):
        key = (form, types, per_channel)
        if key not in made:
            out = folder / f"{form}-{types}-{per_channel}.onnx"
            if form == "dynamic":
                quantize_dynamic(folder / "float.onnx", out, weight_type=QuantType.QUInt8)
            else:
                # Weights of 7 bits: on processors without VNNI sums of uint8 times int8 saturate beyond.
                activation, weight = (TYPES | WIDE)[types]
                quantize_static(
                    folder / "float.onnx", out, Reader(), per_channel=per_channel, activation_type=activation,
                    weight_type=weight, reduce_range=True, extra_options={"UseQDQContribOps": types in CONTRIB},
                    quant_format=QuantFormat.QDQ if form == "qdq" else QuantFormat.QOperator,
                )  # fmt: skip
            made[key] = onnx.load(out)
        return made[key]

    return make


def run(proto, x, names=None):
    """The file as it is deployed: ONNX Runtime as it comes."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(names, {session.get_inputs()[0].name: x})


def last_step(proto):
    """The scale of the last rounding: of the logits."""
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    return float(constants[proto.graph.node[-1].input[1]])


STATIC = [(form, types, wide) for form in ("qdq", "qoperator") for types in TYPES for wide in (False, True)]


@pytest.mark.parametrize(("form", "types", "per_channel"), STATIC)
def test_the_logits_are_those_of_the_file(files, form, types, per_channel):
    """Oracle: ONNX Runtime on the file. A network rounds at every layer, so the last one may differ by one step."""
    proto = files(form, types, per_channel)
    x = picture(20)
    model = onnxcam.load(proto)
    ours = np.concatenate([model.explain(x[i : i + 1], engine="numpy").logits for i in range(20)])
    theirs = np.concatenate([run(proto, x[i : i + 1])[0] for i in range(20)])
    steps = np.abs(ours - theirs) / last_step(proto)
    assert steps.max() < 1.5
    assert (steps > 0.5).mean() < 0.1


@pytest.mark.parametrize("form", ["qdq", "qoperator", "dynamic"])
def test_the_compiled_model_computes_the_logits_of_the_deployed_file(files, form):
    """Oracle: ONNX Runtime on the file. What is static is fused into the same integer kernels, so the same bits."""
    proto, x = files(form), picture()
    layer = "node_c4" if form == "qdq" else "node_c4_quant"
    compiled = onnxcam.compile(onnxcam.load(proto), layer, "predicted").proto
    assert {node.domain for node in compiled.graph.node} <= {"", "ai.onnx"}
    assert {entry.domain for entry in compiled.opset_import} <= {"", "ai.onnx"}
    logits, heat = run(compiled, x, ["logits", compiled.graph.output[-1].name])
    expected = run(proto, x)[0]
    if form == "dynamic":
        np.testing.assert_allclose(logits, expected, rtol=0, atol=0.02 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(logits, expected)
    ours = onnxcam.load(proto).explain(x, layer, engine="numpy").maps[layer]
    assert heat.shape[-2:] == (4, 4)
    np.testing.assert_allclose(heat.reshape(ours.shape), ours, rtol=0, atol=0.05 * np.abs(ours).max())


def walk(model, x, layers, composite, engine):
    """Our relevance at `layers`, float64, from one-hot starts at every class."""
    found = model.canonical(keep=frozenset(layers))
    start = np.eye(5)[:, None]
    return Walker(found.graph, layers, found.logits, engine=engine)({"x": x}, start, COMPOSITES[composite])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("composite", ["gradient", "relevance_cam"])
@pytest.mark.parametrize(("types", "per_channel"), [("u8s8", True), ("s8s8", False), ("u8u8", True)])
def test_gradients_and_relevance_are_those_of_fake_quantisation(files, types, per_channel, composite, engine):
    """Oracle: the file in PyTorch, float64. Weights are dequantised in float32 here, in float64 there: 1e-5."""
    proto, x = files("qdq", types, per_channel), picture()
    layers = ["a1_DequantizeLinear_Output", "p_DequantizeLinear_Output", "a4_DequantizeLinear_Output", "x"]
    ours = walk(onnxcam.load(proto), x.astype(np.float64), layers, composite, engine)
    oracle = QDQ(proto, relevance=composite != "gradient")
    for target in range(5):
        values = oracle(x)
        values["y_DequantizeLinear_Output" if "y" not in values else "y"][0, target].backward()
        for layer in layers:
            if layer in values:
                assert relative(ours[layer][target], values[layer].grad.numpy()) <= 1e-5, (target, layer)


@pytest.mark.parametrize("types", TYPES)
def test_both_forms_of_one_network_have_the_same_relevance(files, types):
    """Oracle: the other form. The quantiser gives both the same integers, but for uint8 weights per channel."""
    x = picture()
    maps = [
        onnxcam.load(files(form, types, types != "u8u8")).explain(x, "suggested", ["top2"], engine="numpy").maps
        for form in ("qdq", "qoperator")
    ]
    assert len(maps[0]) == len(maps[1]) >= 2
    for a, b in zip(maps[0].values(), maps[1].values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("form", ["qdq", "qoperator", "dynamic"])
def test_both_engines_agree(files, form):
    model, x = onnxcam.load(files(form)), picture()
    a, b = (model.explain(x, "suggested", engine=engine).maps for engine in ("numpy", "onnx"))
    for layer in a:
        np.testing.assert_allclose(b[layer], a[layer], rtol=0, atol=1e-5 * np.abs(a[layer]).max())


@pytest.mark.parametrize("form", ["qdq", "qoperator", "dynamic"])
def test_float64_finds_the_same(files, form):
    """Oracle: the reference evaluator's forward pass. A number may fall on the other side of a half: 2 %."""
    model, x = onnxcam.load(files(form)), picture()
    a, b = (model.explain(x, "suggested", engine="numpy", dtype=dtype).maps for dtype in ("float32", "float64"))
    for layer in a:
        np.testing.assert_allclose(a[layer], b[layer], rtol=0, atol=0.02 * np.abs(b[layer]).max())


@pytest.mark.parametrize("types", WIDE)
@pytest.mark.parametrize("engine", ENGINES)
def test_activations_of_16_bits_are_explained(files, engine, types):
    """Before opset 21 they take rounding operators of ONNX Runtime's own. Oracle: the float file."""
    proto = files("qdq", types)
    assert any(node.domain == "com.microsoft" for node in proto.graph.node) == (types in CONTRIB)
    x = picture()
    ours, floats = (onnxcam.load(p).explain(x, "suggested", [1], engine=engine) for p in (proto, float_net()))
    np.testing.assert_allclose(ours.logits, run(proto, x)[0], rtol=0, atol=1e-3)
    for a, b in zip(ours.maps.values(), floats.maps.values(), strict=True):
        assert spearmanr(a.ravel(), b.ravel())[0] > 0.98


@pytest.mark.parametrize("form", ["qdq", "qoperator", "dynamic"])
def test_the_listing_is_that_of_the_float_file(files, form):
    """Same layers, shapes, signs and suggestions as the network had before it was quantised."""
    rows = onnxcam.load(files(form)).layers()
    floats = onnxcam.load(float_net()).layers()
    key = [(r.node.removesuffix("_quant"), r.shape, r.stage, r.suggested) for r in rows]
    assert key == [(r.node, r.shape, r.stage, r.suggested) for r in floats]
    signs = {r.node: r.sign for r in floats}
    assert all(r.sign == signs[r.node.removesuffix("_quant")] for r in rows)


def test_a_tensor_of_integers_means_the_real_numbers_it_stands_for(files):
    model = onnxcam.load(files("qoperator"))
    layers = model.resolve(["c4_quantized", "node_c4_quant", "node_p", "p_quantized"])
    assert layers["c4_quantized"] == layers["node_c4_quant"]
    assert layers["p_quantized"] == layers["node_p"]
    graph = model.canonical().graph
    assert all(graph.dtype(layer.tensor) == np.float32 for layer in layers.values())
    model = onnxcam.load(files("qdq"))
    layers = model.resolve(["a4_QuantizeLinear_Output", "node_c4"])
    assert layers["a4_QuantizeLinear_Output"] == layers["node_c4"]


def test_check_finds_an_operator_for_every_node(files):
    for form in ("qdq", "qoperator", "dynamic"):
        found = onnxcam.load(files(form)).check()
        assert not found.problems
        assert {row.op_type for row in found.rows} >= {"Conv", "DequantizeLinear"}
        assert found.rows[-1].op_type in ("QuantizeLinear", "DynamicQuantizeLinear")


def test_weights_of_four_bits_in_blocks(tmp_path):
    """MatMulNBits as ONNX Runtime's quantiser makes it. Oracle: the float network of its dequantised weights."""
    rng = np.random.default_rng(0)
    text = (
        "(float[1,3,16,16] x) => (float[1,5] y) { c = Conv<strides=[2,2]>(x, w) a = Relu(c) g = GlobalAveragePool(a) "
    )
    text += "f = Flatten(g) m = MatMul(f, v) h = Relu(m) y = MatMul(h, u) }"
    given = {
        "w": rng.normal(size=(32, 3, 3, 3)), "v": rng.normal(size=(32, 64)), "u": rng.normal(size=(64, 5))
    }  # fmt: skip
    proto = network(text, opset=21, **{k: v.astype(np.float32) for k, v in given.items()})
    quantiser = MatMulNBitsQuantizer(proto, block_size=32, is_symmetric=False)
    quantiser.process()
    packed = quantiser.model.model
    assert sum(node.op_type == "MatMulNBits" for node in packed.graph.node) == 2
    model, x = onnxcam.load(packed), picture()
    explained = model.explain(x, "auto", engine="numpy")
    expected = run(packed, x)[0]
    np.testing.assert_allclose(explained.logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    reference = onnx.ModelProto()
    reference.CopyFrom(proto)
    for tensor in reference.graph.initializer:
        if tensor.name in "vu":
            node = next(
                n for n in packed.graph.node if n.op_type == "MatMulNBits" and n.input[1].startswith(tensor.name)
            )
            tensor.CopyFrom(numpy_helper.from_array(_by_runtime(packed, node), tensor.name))
    float_map = onnxcam.load(reference).explain(x, "auto", engine="numpy")
    np.testing.assert_allclose(explained.maps["auto"], float_map.maps["auto"], rtol=1e-4, atol=1e-6)


def _by_runtime(proto, node):
    """The weight of a MatMulNBits: what ONNX Runtime makes of the unit matrix."""
    k = next(a.i for a in node.attribute if a.name == "K")
    inner = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, [k, k])],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
        [t for t in proto.graph.initializer if t.name in node.input],
    )  # fmt: skip
    model = helper.make_model(inner, opset_imports=proto.opset_import, ir_version=9)
    return run(model, np.eye(k, dtype=np.float32))[0]


@pytest.mark.parametrize("io", [TensorProto.FLOAT, TensorProto.BFLOAT16])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_in_bfloat16_is_computed_in_float32(io, engine):
    """Oracle: the float network of the same numbers. Casts at the ends, or inputs and outputs in bfloat16."""
    import ml_dtypes

    proto = float_net()
    for tensor in proto.graph.initializer:
        rounded = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    floats = onnx.ModelProto()
    floats.CopyFrom(proto)
    for tensor in floats.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    if io == TensorProto.FLOAT:
        first, last = proto.graph.node[0], proto.graph.node[-1]
        first.input[0], last.output[0] = "half", "logits"
        proto.graph.node.insert(0, helper.make_node("Cast", ["x"], ["half"], name="in", to=TensorProto.BFLOAT16))
        proto.graph.node.append(helper.make_node("Cast", ["logits"], ["y"], name="out", to=TensorProto.FLOAT))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = io
    before = proto.SerializeToString()
    x = picture()
    ours, theirs = (onnxcam.load(p).explain(x, "suggested", engine=engine) for p in (proto, floats))
    assert proto.SerializeToString() == before
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-5)
    for layer, heat in theirs.maps.items():
        np.testing.assert_allclose(ours.maps[layer], heat, rtol=0, atol=1e-5 * np.abs(heat).max())


def test_an_integer_that_leads_nowhere_is_refused_by_name(files):
    with pytest.raises(UsageError, match="does not lead to the logits"):
        onnxcam.load(files("dynamic")).resolve(["c1_output_quantized"])


# -- files from the field ----------------------------------------------------------------------------------------

LITE = ["efficientnet-lite0-qdq-int8", "efficientnet-lite0-qoperator-u8s8", "efficientnet-lite0-fp16"]


def images(assets, n):
    with open(assets / "labels.csv", newline="") as file:
        rows = [row["file"] for row in csv.DictReader(file)]
    return [assets / "images" / name for name in rows[:: len(rows) // n][:n]]


@pytest.mark.parametrize("name", LITE)
def test_maps_of_a_quantised_file_are_like_those_of_the_float_file(name, assets):
    """Mean rank correlation at the last stage, as docs/quantised-agreement.md has it for 100 images."""
    load = lambda stem: onnxcam.load(assets / "models" / f"{stem}.onnx", preprocess="efficientnet-lite")  # noqa: E731
    ours, floats = load(name), load("efficientnet-lite0")
    correlations = []
    for image in images(assets, 8):
        e = floats.explain(image)
        mine = ours.explain(image, targets=[int(e.targets[0, 0])])
        correlations.append(spearmanr(e.maps["auto"].ravel(), mine.maps["auto"].ravel())[0])
    assert np.mean(correlations) >= 0.95


@pytest.mark.parametrize("name", [*LITE, "efficientnet-lite0-dynamic-u8"])
def test_the_suggested_layers_are_those_of_the_float_file(name, assets):
    def suggested(stem):
        return [r for r in onnxcam.load(assets / "models" / f"{stem}.onnx").layers() if r.suggested]

    ours, floats = suggested(name), suggested("efficientnet-lite0")
    assert [(r.node.removesuffix("_quant"), r.shape, r.sign) for r in ours] == [
        (r.node, r.shape, r.sign) for r in floats
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_at_the_end_of_their_range_have_a_gradient_nevertheless(engine):
    """Calibration puts the end of the range at the largest logit. Oracle: the same weights without the rounding."""
    text = """(float[N,3,6,6] x) => (float[?,?] y) {
        c = Conv(x, w) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p) z = MatMul(f, d)"""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((5, 3, 3, 3)).astype("f"), "d": rng.standard_normal((5, 4)).astype("f")}
    rounding = {"s": np.float32(0.001), "q": np.int8(0)}
    x = np.abs(rng.standard_normal((2, 3, 6, 6))).astype("f")
    plain = onnxcam.load(network(f"{text} y = Identity(z) }}", **weights))
    rounded = onnxcam.load(
        network(f"{text} i = QuantizeLinear(z, s, q) y = DequantizeLinear(i, s, q) }}", **weights, **rounding)
    )
    for composite, start in (("gradient", "one-hot"), ("relevance_cam", "contrast")):
        options = {"method": "lrp", "composite": composite, "start": start, "engine": engine}
        expected, got = (m.explain(x, "input", [1, 2], **options).maps["input"] for m in (plain, rounded))
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
