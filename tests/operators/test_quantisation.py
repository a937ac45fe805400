"""Rounding to integers and back: gradients against PyTorch's fake quantisation, in float64."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnxcam.composites import COMPOSITES
from onnxcam.errors import ModelError
from onnxcam.graph import Graph
from onnxcam.operators import lookup
from tests.walking import ENGINES, Walker, network, relative

RNG = np.random.default_rng(0)
BODY = "q = QuantizeLinear<axis={axis}>(x, s, z) y = DequantizeLinear<axis={axis}>(q, s, z)"
TEXT = "(float[2,5,4,3] x) => (float[2,5,4,3] y) {{ {body} }}"


def pair(scale, zero, axis=1, opset=17):
    text = TEXT.format(body=BODY.format(axis=axis))
    return network(text, opset=opset, s=np.asarray(scale, np.float32), z=zero)


def walked(proto, x, start, composite, engine):
    return Walker(proto, ["x"], "y", engine=engine)({"x": x}, start, COMPOSITES[composite])["x"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
def test_the_gradient_is_that_of_fake_quantisation_per_tensor(dtype, engine):
    """Oracle: torch.fake_quantize_per_tensor_affine, which passes a gradient wherever the integers do not saturate."""
    info = np.iinfo(dtype)
    scale, zero = 7.3 / (int(info.max) - int(info.min)), int(info.min) + (int(info.max) - int(info.min)) // 3
    x = RNG.normal(0, 3, (2, 5, 4, 3))
    start = RNG.normal(size=(2, *x.shape))
    ours = walked(pair(scale, np.asarray(zero, dtype), opset=21), x, start, "gradient", engine)
    data = torch.tensor(x, requires_grad=True)
    out = torch.fake_quantize_per_tensor_affine(data, float(np.float32(scale)), zero, int(info.min), int(info.max))
    theirs = np.stack([torch.autograd.grad(out, data, torch.tensor(r), retain_graph=True)[0].numpy() for r in start])
    assert 0.1 < (theirs == 0).mean() < 0.9
    assert relative(ours, theirs) <= 1e-6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("axis", [1, -1])
def test_the_gradient_is_that_of_fake_quantisation_per_channel(axis, engine):
    x = RNG.normal(0, 3, (2, 5, 4, 3))
    n = x.shape[axis]
    scale, zero = RNG.uniform(0.01, 0.03, n).astype(np.float32), RNG.integers(50, 200, n).astype(np.uint8)
    start = RNG.normal(size=(1, *x.shape))
    ours = walked(pair(scale, zero, axis), x, start, "gradient", engine)
    data = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    out = torch.fake_quantize_per_channel_affine(
        data, torch.tensor(scale), torch.tensor(zero.astype(np.int32)), axis % 4, 0, 255
    )
    theirs = torch.autograd.grad(out, data, torch.tensor(start[0], dtype=torch.float32))[0].numpy()[None]
    assert 0.1 < (theirs == 0).mean() < 0.9
    assert relative(ours, theirs.astype(np.float64)) <= 1e-6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("zero", [True, False])
def test_relevance_passes_saturated_or_not(zero, engine):
    body = BODY.format(axis=1) if zero else "q = QuantizeLinear(x, s) y = DequantizeLinear(q, s)"
    given = {"z": np.uint8(90)} if zero else {}
    proto = network(TEXT.format(body=body), s=np.float32(0.02), **given)
    x, start = RNG.normal(0, 3, (2, 5, 4, 3)), RNG.normal(size=(1, 2, 5, 4, 3))
    np.testing.assert_array_equal(walked(proto, x, start, "relevance_cam", engine), start)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("composite", ["gradient", "relevance_cam"])
def test_dynamic_rounding_passes_straight_through(composite, engine):
    """Its range is that of the input, so nothing saturates; scale and zero point are statistics and take nothing."""
    body = "q, s, z = DynamicQuantizeLinear(x) d = DequantizeLinear(q, s, z) t = Mul(d, k) y = Mul(t, s)"
    proto = network(TEXT.format(body=body), k=np.float32(2))
    x, start = RNG.normal(0, 3, (2, 5, 4, 3)), RNG.normal(size=(1, 2, 5, 4, 3))
    scale = np.float32(np.float32(x.max()) - np.float32(x.min())) / np.float32(255)
    expected = start if composite == "relevance_cam" else start * 2 * scale
    assert relative(walked(proto, x, start, composite, engine), expected) <= 1e-6


def quantise_to(kind, **attributes):
    """A QuantizeLinear to a type that says so by its zero point, or by an attribute."""
    zero = [] if attributes else [helper.make_tensor("z", kind, [], [0])]
    scale = numpy_helper.from_array(np.float32(0.1), "s")
    node = helper.make_node("QuantizeLinear", ["x", "s", *(["z"] if zero else [])], ["q"], name="round", **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("q", kind, [1, 4])], [scale, *zero],
    )  # fmt: skip
    return Graph(gs.import_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))).nodes[0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (TensorProto.UINT8, (0, 255)), (TensorProto.INT8, (-128, 127)), (TensorProto.UINT16, (0, 65535)),
        (TensorProto.INT16, (-32768, 32767)), (TensorProto.UINT4, (0, 15)), (TensorProto.INT4, (-8, 7)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("by", ["zero point", "attribute"])
def test_the_range_of_every_integer_type(kind, expected, by):
    """Oracle: the ONNX specification's table of ranges."""
    from onnxcam.operators.quantisation import rounding_range

    assert rounding_range(quantise_to(kind, **({} if by == "zero point" else {"output_dtype": kind}))) == expected


def test_what_rounds_to_eight_bit_floats_is_refused():
    with pytest.raises(ModelError, match=r"'round': it rounds to float8_e4m3fn"):
        lookup(quantise_to(TensorProto.FLOAT8E4M3FN))


def test_a_scale_for_each_block_is_refused():
    body = "q = QuantizeLinear<axis=3, block_size=3>(x, s) y = DequantizeLinear<axis=3, block_size=3>(q, s)"
    proto = network(TEXT.format(body=body), opset=21, s=np.ones((2, 5, 4, 1), np.float32))
    graph = Graph(gs.import_onnx(proto))
    for node in graph.nodes:
        with pytest.raises(ModelError, match="has a scale for each block"):
            lookup(node)


def test_an_integer_operator_with_computed_scales_is_refused():
    text = "(uint8[1,3,8,8] x, float t) => (uint8[?,?,?,?] y) { y = QLinearConv(x, t, z, w, s, zw, s, z) }"
    proto = network(text, w=np.ones((2, 3, 3, 3), np.int8), s=np.float32(0.1), z=np.uint8(0), zw=np.int8(0))
    with pytest.raises(ModelError, match="QLinearConv can be followed only where scales"):
        lookup(Graph(gs.import_onnx(proto)).nodes[0])
