"""Lowering of quantised operators: the integers that come out are those that ONNX Runtime computes from the file.

Oracle: ONNX Runtime on the model as it was written, by its own integer kernels. Weights are of 7 bits, as on processors
without VNNI sums of uint8 times int8 saturate beyond that. Float32 rounding may tip a number that lies right between
two integers, so a result may differ by one, in few places: FLIPS says how few. Scales are odd numbers, or ties would be
the rule.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from onnxcam.canonise import canonise
from onnxcam.canonise.quantised import LOWERED
from onnxcam.dequantised import INTEGER_OPS
from onnxcam.graph import Graph
from tests.canonise.building import ops
from tests.walking import network

FLIPS = 0.01
RNG = np.random.default_rng(0)
MS = "com.microsoft"


def q(shape, dtype):
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max + 1, shape).astype(dtype)


def weights(shape, dtype):
    """Integers of 7 bits around the middle of the range."""
    return (RNG.integers(-64, 64, shape) + (0 if dtype is np.int8 else 128)).astype(dtype)


def f(*values):
    return np.asarray(values[0] if len(values) == 1 else values, np.float32)


def z(value, dtype):
    return np.asarray(value, dtype)


def single(op, inputs, data, domain="", version=17, **attrs):
    """A model of one node; `inputs` are arrays or None, `data` the places of those that are inputs of the model."""
    names = ["" if a is None else f"i{i}" for i, a in enumerate(inputs)]
    infos, constants = [], []
    for i, (name, a) in enumerate(zip(names, inputs, strict=True)):
        if a is None:
            continue
        if i in data:
            infos.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape))
        else:
            constants.append(numpy_helper.from_array(a, name))
    node = helper.make_node(op, names, ["y"], domain=domain, name="it", **attrs)
    graph = helper.make_graph([node], "g", infos, [onnx.ValueInfoProto(name="y")], constants)
    imports = [helper.make_opsetid("", version), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9), {f"i{i}": inputs[i] for i in data}


def run(proto, feeds, fused=False):
    """The outputs, ONNX Runtime's optimisations off unless `fused`."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def lowered(proto, keep=()):
    return canonise(proto, keep=frozenset(keep))


def exported(graph):
    proto = gs.export_onnx(graph)
    onnx.checker.check_model(proto)
    return proto


def check_integers(proto, feeds, flips=FLIPS):
    """The lowered model gives the file's integers, or the file's floats to 1e-5; and it is of the standard alone."""
    graph = lowered(proto)
    assert all(node.domain in (None, "", "ai.onnx") for node in graph.nodes)
    (expected,), (got,) = run(proto, feeds), run(exported(graph), feeds)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    else:
        assert expected.std() > 3, "the test must not sit at the end of the range"
        difference = np.abs(got.astype(int) - expected.astype(int))
        assert difference.max() <= 1 and (difference > 0).mean() <= flips
    return graph


U8, S8 = np.uint8, np.int8
KINDS = [(U8, U8), (U8, S8), (S8, S8)]


@pytest.mark.parametrize(("activation", "weight"), KINDS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("domain", ["", MS])
def test_qlinear_conv(activation, weight, per_channel, domain):
    channels = 6
    scale = RNG.uniform(0.01, 0.02, channels).astype(np.float32) if per_channel else f(0.015)
    zero = np.zeros(channels if per_channel else (), weight) if weight is S8 else z(125, U8)
    if per_channel and weight is U8:
        zero = np.full(channels, 125, U8)
    mid = 3 if activation is S8 else 126
    x, w = q((2, 4, 9, 8), activation), weights((channels, 2, 3, 3), weight)
    proto, feeds = single(
        "QLinearConv",
        [x, f(0.0213), z(mid, activation), w, scale, zero, f(0.0571), z(mid + 5, activation),
         RNG.integers(-9, 9, 6).astype(np.int32)],
        [0], domain, group=2, pads=[1, 0, 1, 2], strides=[2, 1],
    )  # fmt: skip
    graph = check_integers(proto, feeds)
    assert ops(graph) == {"DequantizeLinear": 3, "Conv": 1, "QuantizeLinear": 1}
    assert {n.name for n in graph.nodes if n.op == "Conv"} == {"it"}


def test_qlinear_conv_with_channels_last():
    x, w = q((2, 9, 8, 4), U8), weights((6, 4, 3, 3), S8)
    proto, feeds = single(
        "QLinearConv",
        [x, f(0.02), z(128, U8), w, f(0.015), z(0, S8), f(0.1), z(128, U8), RNG.integers(-99, 99, 6).astype(np.int32)],
        [0], MS, channels_last=1, pads=[1, 1, 1, 1], kernel_shape=[3, 3],
    )  # fmt: skip
    check_integers(proto, feeds)


@pytest.mark.parametrize(("activation", "weight"), KINDS)
@pytest.mark.parametrize("per_column", [False, True])
def test_qlinear_matmul(activation, weight, per_column):
    scale = RNG.uniform(0.01, 0.02, 7).astype(np.float32) if per_column else f(0.015)
    middle = 2 if weight is S8 else 130
    zero = np.full(7, middle, weight) if per_column else z(middle, weight)
    mid = 3 if activation is S8 else 126
    a, b = q((3, 5, 16), activation), weights((16, 7), weight)
    proto, feeds = single(
        "QLinearMatMul", [a, f(0.0213), z(mid, activation), b, scale, zero, f(0.0971), z(mid + 5, activation)], [0]
    )
    check_integers(proto, feeds)


def test_qlinear_matmul_of_two_activations():
    a, b = q((2, 5, 16), U8), q((2, 16, 7), U8)
    proto, feeds = single(
        "QLinearMatMul", [a, f(0.02), z(100, U8), b, f(0.01), z(130, U8), f(0.12), z(120, U8)], [0, 3]
    )
    assert ops(check_integers(proto, feeds))["DequantizeLinear"] == 2


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("trans", [0, 1])
def test_qgemm(per_column, floats, trans):
    scale = RNG.uniform(0.01, 0.02, 7).astype(np.float32) if per_column else f(0.015)
    zero = np.full(7, 2, S8) if per_column else z(2, S8)
    a, b = q((5, 16), U8), weights((7, 16) if trans else (16, 7), S8)
    bias = RNG.integers(-20000, 20000, 7).astype(np.int32)
    tail = [] if floats else [f(0.1), z(128, U8)]
    proto, feeds = single(
        "QGemm", [a, f(0.02), z(120, U8), b, scale, zero, bias, *tail], [0], MS, transB=trans, alpha=0.75
    )
    check_integers(proto, feeds)


@pytest.mark.parametrize("dtype", [U8, S8])
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("constant", [False, True])
def test_sums_and_products(op, dtype, constant):
    a, b = q((2, 3, 5, 5), dtype), q((3, 1, 1), dtype)
    out = f(0.0417) if op == "QLinearAdd" else f(0.0531)
    proto, feeds = single(
        op, [a, f(0.0213), z(7, dtype), b, f(0.0311), z(3, dtype), out, z(5, dtype)], [0] if constant else [0, 3], MS
    )
    check_integers(proto, feeds)


@pytest.mark.parametrize("dtype", [U8, S8])
@pytest.mark.parametrize(
    ("op", "step", "attrs"),
    [
        ("QLinearSigmoid", 0.00391, {}),
        ("QLinearLeakyRelu", 0.0291, {"alpha": 0.3}),
        ("QLinearAveragePool", 0.0191, {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "strides": [2, 1]}),
        ("QLinearAveragePool", 0.0191, {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        ("QLinearAveragePool", 0.0191, {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        ("QLinearAveragePool", 0.0191, {"kernel_shape": [2, 3], "channels_last": 1}),
        ("QLinearGlobalAveragePool", 0.00513, {}),
        ("QLinearGlobalAveragePool", 0.00513, {"channels_last": 1}),
        ("QLinearSoftmax", 1 / 256, {"axis": -1, "opset": 13}),
    ],
)
def test_one_operand(op, step, attrs, dtype):
    x = q((2, 6, 7, 8), dtype)
    low = np.iinfo(dtype).min
    zero = low if op in ("QLinearSigmoid", "QLinearSoftmax") else low + 125
    proto, feeds = single(op, [x, f(0.0213), z(low + 128, dtype), f(step), z(zero, dtype)], [0], MS, **attrs)
    graph = check_integers(proto, feeds)
    assert ops(graph)[op.removeprefix("QLinear")] == 1


def test_where():
    condition = RNG.random((2, 3, 4)) > 0.5
    proto, feeds = single(
        "QLinearWhere",
        [condition, q((2, 3, 4), U8), f(0.02), z(10, U8), q((3, 4), U8), f(0.03), z(90, U8), f(0.04), z(100, U8)],
        [0, 1, 4], MS,
    )  # fmt: skip
    check_integers(proto, feeds)


def test_concat():
    proto, feeds = single(
        "QLinearConcat",
        [f(0.04), z(100, U8), q((2, 3, 4), U8), f(0.02), z(10, U8), q((2, 2, 4), U8), f(0.04), z(100, U8)],
        [2, 5], MS, axis=1,
    )  # fmt: skip
    check_integers(proto, feeds)


def test_nhwc_max_pool_moves_the_very_integers():
    proto, feeds = single(
        "NhwcMaxPool", [q((2, 9, 8, 4), U8)], [0], MS, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 0]
    )
    check_integers(proto, feeds, flips=0)


@pytest.mark.parametrize("per_column", [False, True])
def test_matmul_integer_to_float(per_column):
    scale = RNG.uniform(0.01, 0.02, 7).astype(np.float32) if per_column else f(0.015)
    zero = np.zeros(7, S8) if per_column else z(3, S8)
    proto, feeds = single(
        "MatMulIntegerToFloat",
        [q((3, 5, 16), U8), weights((16, 7), S8), f(0.02), scale, z(99, U8), zero,
         RNG.normal(size=7).astype(np.float32)],
        [0], MS,
    )  # fmt: skip
    check_integers(proto, feeds)


@pytest.mark.parametrize("bias", [False, True])
def test_dynamic_quantize_matmul(bias):
    a = RNG.normal(size=(3, 5, 16)).astype(np.float32)
    extra = [RNG.normal(size=7).astype(np.float32)] if bias else []
    proto, feeds = single("DynamicQuantizeMatMul", [a, weights((16, 7), S8), f(0.015), z(3, S8), *extra], [0], MS)
    graph = check_integers(proto, feeds)
    assert {"DynamicQuantizeLinear", "DequantizeLinear", "MatMul"} <= set(ops(graph))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", ["none", "packed", "floats"])
@pytest.mark.parametrize("k", [64, 80])
def test_matmul_nbits(bits, zero, k):
    n, block = 5, 32
    blocks = -(-k // block)
    b = RNG.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8)
    scales = RNG.uniform(0.01, 0.02, (n, blocks)).astype(np.float32)
    zeros = {
        "none": None,
        "packed": RNG.integers(0, 256, (n, -(-blocks * bits // 8))).astype(np.uint8),
        "floats": RNG.uniform(0, 2**bits, (n, blocks)).astype(np.float32),
    }[zero]
    if zero == "floats" and bits != 4:
        pytest.skip("ONNX Runtime has no kernel for it")
    a = RNG.normal(size=(3, k)).astype(np.float32)
    proto, feeds = single("MatMulNBits", [a, b, scales, zeros], [0], MS, K=k, N=n, bits=bits, block_size=block)
    assert ops(check_integers(proto, feeds)) == {"MatMul": 1}


def test_every_operator_that_is_lowered_is_known_as_one_that_computes_in_integers():
    rounding = {(MS, "QuantizeLinear"), (MS, "DequantizeLinear")}
    assert LOWERED - rounding == {(domain, op) for domain, ops in INTEGER_OPS.items() for op in ops}


# -- dynamic quantisation ----------------------------------------------------------------------------------------


def dynamic(body, version=17, **constants):
    """A network whose float input is (2, 4, 6, 6), or (2, 3, 16) for products of matrices."""
    shape = "2,4,6,6" if "Conv" in body else "2,3,16"
    proto = network(f"(float[{shape}] x) => (float y) {{ {body} }}", opset=version, **constants)
    return proto, {"x": RNG.normal(size=[int(n) for n in shape.split(",")]).astype(np.float32)}


HEAD = "q, s, z = DynamicQuantizeLinear(x) "
CONV = HEAD + "i = ConvInteger(q, w, z, zw) f = Cast<to=1>(i) "
MATMUL = HEAD + "i = MatMulInteger(q, w, z, zw) f = Cast<to=1>(i) "
KERNEL = {"w": weights((5, 4, 3, 3), U8), "zw": np.uint8(131), "c": np.float32(0.013)}
MATRIX = {"w": weights((16, 5), U8), "zw": np.uint8(131)}


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        (CONV + "m = Mul(s, c) y = Mul(f, m)", KERNEL),
        (CONV + "m = Mul(c, s) y = Mul(m, f)", KERNEL),
        (
            CONV + "m = Mul(s, c) k = Mul(m, d) y = Mul(f, k)",
            KERNEL | {"d": np.linspace(1, 2, 5, dtype=np.float32).reshape(1, 5, 1, 1)},
        ),
        (MATMUL + "m = Mul(s, c) y = Mul(f, m)", MATRIX | {"c": RNG.uniform(0.01, 0.02, 5).astype(np.float32)}),
        (
            HEAD + "i = MatMulInteger(w, q, zw, z) f = Cast<to=1>(i) m = Mul(s, c) y = Mul(f, m)",
            {"w": weights((4, 3), U8), "zw": np.uint8(131), "c": np.float32(0.013)},
        ),
        (
            HEAD + "qt = Transpose<perm=[0,2,1]>(q) i = MatMulInteger(q, qt, z, z) f = Cast<to=1>(i) m = Mul(s, s) "
            "y = Mul(f, m)", {},
        ),
    ],
)  # fmt: skip
def test_dynamic_quantisation_becomes_a_linear_map_of_real_values(body, constants):
    """Oracle: ONNX Runtime's integer kernels; sums of float32 differ from theirs by rounding alone, 1e-5."""
    proto, feeds = dynamic(body, **constants)
    found = ops(check_integers(proto, feeds))
    assert found.get("Conv", 0) + found.get("MatMul", 0) == 1
    assert "Mul" not in found
    assert "Cast" not in found


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        (CONV + "y = Mul(f, t)", KERNEL | {"t": RNG.uniform(1, 2, (5, 4, 4)).astype(np.float32)}),
        (CONV + "r = Relu(f) m = Mul(s, c) y = Mul(r, m)", KERNEL),
        (CONV + "m = Mul(s, c) g = Mul(f, m) y = Add(g, f)", KERNEL),
    ],
)
def test_what_is_not_scaled_right_away_stays_a_linear_map_of_integers(body, constants):
    proto, feeds = dynamic(body, **constants)
    found = ops(check_integers(proto, feeds))
    assert found["Conv"] == 1
    assert "Cast" not in found


def test_a_kept_tensor_of_sums_of_integers_stays():
    proto, feeds = dynamic(CONV + "m = Mul(s, c) y = Mul(f, m)", **KERNEL)
    graph = exported(lowered(proto, ["i"]))
    for model in (proto, graph):
        model.graph.output.append(onnx.ValueInfoProto(name="i"))
    (_, ours), (_, theirs) = run(graph, feeds), run(proto, feeds)
    np.testing.assert_array_equal(ours, theirs)


# -- layout of integers ------------------------------------------------------------------------------------------

Q, DQ = "q = QuantizeLinear(x, s, z) ", "y = DequantizeLinear(m, s, z)"
PARAMETERS = {"s": np.float32(0.0173), "z": np.uint8(119)}
MOVES = {
    "Reshape": ("m = Reshape(q, to)", {"to": np.array([2, -1])}),
    "Transpose": ("m = Transpose<perm=[0,2,3,1]>(q)", {}),
    "MaxPool": ("m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(q)", {}),
    "Slice": ("m = Slice(q, a, b)", {"a": np.array([0, 1]), "b": np.array([2, 3])}),
    "Concat": ("o = Transpose<perm=[0,1,3,2]>(q) m = Concat<axis=1>(q, o)", {}),
    "Max": ("o = Transpose<perm=[0,1,3,2]>(q) m = Max(q, o)", {}),
    "Pad": ("m = Pad(q, p, v)", {"p": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "v": np.uint8(7)}),
    "Pad without a value": ("m = Pad(q, p)", {"p": np.array([0, 0, 1, 0, 0, 0, 0, 2])}),
    "Resize": ("m = Resize<mode=\"nearest\">(q, , k)", {"k": np.array([1, 1, 2, 2], np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVES)
def test_real_values_are_moved_instead_of_integers(move):
    """Oracle: ONNX Runtime on the file. Moved and rounded again, the numbers are the very same."""
    body, constants = MOVES[move]
    text = f"(float[2,4,6,6] x) => (float y) {{ {Q} {body} {DQ} }}"
    proto = network(text, **PARAMETERS, **constants)
    feeds = {"x": RNG.normal(size=(2, 4, 6, 6)).astype(np.float32)}
    graph = lowered(proto)
    for node in graph.nodes:
        if node.op not in ("QuantizeLinear", "DequantizeLinear"):
            assert all(t.dtype == np.float32 for t in node.outputs), node.op
    np.testing.assert_array_equal(run(exported(graph), feeds)[0], run(proto, feeds)[0])


def test_split_integers_are_split_as_real_values():
    text = f"(float[2,4,6,6] x) => (float a, float b) {{ {Q} m, n = Split<axis=1>(q, sizes)"
    text += " a = DequantizeLinear(m, s, z) b = DequantizeLinear(n, s, z) }"
    proto = network(text, **PARAMETERS, sizes=np.array([1, 3]))
    feeds = {"x": RNG.normal(size=(2, 4, 6, 6)).astype(np.float32)}
    graph = lowered(proto)
    assert ops(graph) == {"QuantizeLinear": 3, "DequantizeLinear": 3, "Split": 1}
    for ours, theirs in zip(run(exported(graph), feeds), run(proto, feeds), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_tensor_is_rounded_and_dequantised_once():
    """ONNX Runtime's quantiser can give every reader a rounding of its own."""
    text = """(float[1,4] x) => (float[1,4] y) {
        q1 = QuantizeLinear(x, s, z) d1 = DequantizeLinear(q1, s, z) r1 = Relu(d1)
        q2 = QuantizeLinear(x, s2, z) d2 = DequantizeLinear(q2, s2, z) r2 = Neg(d2)
        d3 = DequantizeLinear(q1, s, z) e = Add(r1, r2) y = Add(e, d3) }"""
    graph = lowered(network(text, **PARAMETERS, s2=PARAMETERS["s"].reshape(())))
    assert ops(graph) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Relu": 1, "Neg": 1, "Add": 2}
    assert "d3" in {
        t.name for n in lowered(network(text, **PARAMETERS, s2=PARAMETERS["s"]), ["d3"]).nodes for t in n.outputs
    }


# -- weights -----------------------------------------------------------------------------------------------------

BETWEEN = """(float[2,16] x) => (float y) {{
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
    {weight}
    g = Gemm<transB={trans}>(d, v, b) k = QuantizeLinear(g, s2, z) y = DequantizeLinear(k, s2, z) }}"""
WEIGHTS = {
    "integers": ("v = DequantizeLinear<axis=1>(w, sw, zw)", 0, {"w": weights((16, 5), S8)}),
    "rounded in the file": (
        "qw = QuantizeLinear<axis=0>(w, sw, zw) v = DequantizeLinear<axis=0>(qw, sw, zw)", 1,
        {"w": RNG.normal(0, 0.12, (5, 16)).astype(np.float32)},
    ),
    "transposed": ("u = DequantizeLinear<axis=0>(w, sw, zw) v = Transpose(u)", 0, {"w": weights((5, 16), S8)}),
    "rounded and transposed": (
        "qw = QuantizeLinear<axis=0>(w, sw, zw) u = DequantizeLinear<axis=0>(qw, sw, zw) v = Transpose(u)", 0,
        {"w": RNG.normal(0, 0.12, (5, 16)).astype(np.float32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_between_quantised_activations_stay_the_integers_of_the_file(kind):
    """Oracle: ONNX Runtime with its optimisations, which rounds float weights in this place to integers of its own."""
    weight, trans, constants = WEIGHTS[kind]
    given = PARAMETERS | {
        "sw": RNG.uniform(0.01, 0.03, 5).astype(np.float32), "zw": np.zeros(5, np.int8),
        "s2": np.float32(0.0271), "b": RNG.normal(size=5).astype(np.float32), **constants,
    }  # fmt: skip
    proto = network(BETWEEN.format(weight=weight, trans=trans), **given)
    feeds = {"x": RNG.normal(size=(2, 16)).astype(np.float32)}
    graph = lowered(proto)
    (gemm,) = [n for n in graph.nodes if n.op == "Gemm"]
    assert gemm.inputs[1].inputs[0].op == "DequantizeLinear"
    ours = run(exported(graph), feeds, fused=True)[0]
    assert np.abs(ours - run(proto, feeds)[0]).max() < 1.01 * 0.0271
    described = Graph(graph)
    assert described.constants[gemm.inputs[1].name].shape == ((5, 16) if trans else (16, 5))


def test_before_opset_13_scales_per_channel_are_folded_into_weights():
    x, w = q((1, 4, 6, 6), U8), weights((6, 4, 3, 3), S8)
    scale = RNG.uniform(0.01, 0.02, 6).astype(np.float32)
    proto, feeds = single(
        "QLinearConv", [x, f(0.0213), z(126, U8), w, scale, np.zeros(6, S8), f(0.0571), z(131, U8)], [0], version=11
    )
    assert ops(check_integers(proto, feeds))["DequantizeLinear"] == 1


def test_what_has_computed_scales_stays_as_it_is():
    x, w = q((1, 4, 6, 6), U8), weights((6, 4, 3, 3), S8)
    proto, _ = single("QLinearConv", [x, f(0.0213), z(126, U8), w, f(0.01), z(0, S8), f(0.0571), z(131, U8)], [0, 6])
    assert ops(lowered(proto)) == {"QLinearConv": 1}
