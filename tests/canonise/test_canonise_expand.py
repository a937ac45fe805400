"""Fused ops written out in standard ones compute what they computed.

The oracle is ONNX Runtime's own kernel of the fused op, run on the model as it was, and the reference implementation
of ONNX for ops of the standard. Both sides work in float32 and add in another order, hence 1e-5 relative; in half
precision the fused kernel rounds at other places than the nodes it expands to, which moves the last bits: 5e-3.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx.backend.test.case.base as case_base
import onnx_graphsurgeon as gs
import pytest
from onnx import helper, numpy_helper
from onnx.backend.test.case import node
from onnx.reference import ReferenceEvaluator

from onnxcam.canonise import canonise
from onnxcam.errors import ModelError
from onnxcam.graph import Graph
from onnxcam.operators import lookup, registry
from onnxcam.operators.kinds import Elementwise
from tests.canonise.building import evaluate, normal, rng

MS = "com.microsoft"


def one_node(
    op: str,
    operands: Sequence[np.ndarray | None],
    constants: Sequence[int] = (),
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    domain: str = MS,
    batch: Sequence[int] = (),
    **attrs: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one fused node called "fused", and its feeds; the first axis of the inputs in `batch` is symbolic."""
    names = ["" if x is None else f"i{i}" for i, x in enumerate(operands)]
    given = {i: x for i, x in enumerate(operands) if x is not None}
    node = helper.make_node(op, names, list(outputs), "fused", domain=domain, **attrs)
    infos = []
    for i, x in given.items():
        if i not in constants:
            shape = ["N" if i in batch else x.shape[0], *x.shape[1:]] if x.ndim else []
            infos.append(helper.make_tensor_value_info(names[i], helper.np_dtype_to_tensor_dtype(x.dtype), shape))
    graph = helper.make_graph(
        [node], "one", infos, [onnx.ValueInfoProto(name=o) for o in outputs if o],
        [numpy_helper.from_array(x, names[i]) for i, x in given.items() if i in constants],
    )  # fmt: skip
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return model, {names[i]: x for i, x in given.items() if i not in constants}


def expanded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The canonised model, of standard ops alone, sound by the ONNX checker."""
    graph = canonise(model)
    assert not [n.op for n in graph.nodes if n.domain not in (None, "", "ai.onnx")]
    made = gs.export_onnx(graph, do_type_check=False)
    for output in made.graph.output:
        if not output.type.tensor_type.elem_type:
            del made.graph.output[:]
            made = onnx.shape_inference.infer_shapes(made)
            raise AssertionError(f"{output.name} has no type")
    return made


def agree(got: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = np.abs(b.astype(np.float64)).max()
        assert np.abs(a.astype(np.float64) - b.astype(np.float64)).max() <= tolerance * scale


def check(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], tolerance: float = 1e-5) -> onnx.ModelProto:
    made = expanded(model)
    assert "fused" in {node.name for node in made.graph.node}
    agree(evaluate(made, feeds), evaluate(model, feeds), tolerance)
    return made


def n(*shape: int, seed: int = 0) -> np.ndarray:
    return normal(*shape, seed=seed + sum(shape))


CONV = {"pads": [1, 1, 1, 1], "strides": [2, 1]}
IMAGE, KERNEL = n(2, 4, 6, 5), n(6, 4, 3, 3)
LINEAR = {
    "conv relu": ("FusedConv", [IMAGE, KERNEL, n(6)], {**CONV, "activation": "Relu"}),
    "conv leaky": ("FusedConv", [IMAGE, KERNEL], {**CONV, "activation": "LeakyRelu", "activation_params": [0.2]}),
    "conv clip": ("FusedConv", [IMAGE, KERNEL], {"activation": "Clip", "activation_params": [-0.5, 1.5]}),
    "conv hard": ("FusedConv", [IMAGE, KERNEL], {"activation": "HardSigmoid", "activation_params": [0.1, 0.6]}),
    "conv sigmoid": ("FusedConv", [IMAGE, n(4, 1, 3, 3)], {"group": 4, "activation": "Sigmoid"}),
    "conv tanh": ("FusedConv", [IMAGE, KERNEL], {"activation": "Tanh", "auto_pad": "SAME_UPPER"}),
    "conv sum": ("FusedConv", [IMAGE, KERNEL, n(6), n(2, 6, 3, 5)], {**CONV, "activation": "Relu"}),
    "conv plain": ("FusedConv", [IMAGE, KERNEL, None, n(2, 6, 3, 5)], CONV),
    "gemm": ("FusedGemm", [n(3, 5), n(4, 5), n(4)], {"transB": 1, "alpha": 0.5, "beta": 2.0, "activation": "Relu"}),
    "gemm elu": ("FusedGemm", [n(5, 3), n(5, 4)], {"transA": 1, "activation": "Elu", "activation_alpha": 0.5}),
    "gemm selu": (
        "FusedGemm",
        [n(3, 5), n(5, 4)],
        {"activation": "Selu", "activation_alpha": 1.5, "activation_gamma": 2.0},
    ),
    "gemm leaky": ("FusedGemm", [n(3, 5), n(5, 4)], {"activation": "LeakyRelu", "activation_alpha": 0.3}),
    "matmul": ("FusedMatMul", [n(2, 3, 5), n(2, 5, 4)], {"alpha": 0.25}),
    "matmul A": ("FusedMatMul", [n(2, 3, 5, 4), n(2, 3, 5, 6)], {"transA": 1}),
    "matmul B": ("FusedMatMul", [n(2, 3, 5), n(4, 5)], {"transB": 1}),
    "matmul AB": ("FusedMatMul", [n(5, 3), n(4, 5)], {"transA": 1, "transB": 1, "alpha": -2.0}),
    "batch A": ("FusedMatMul", [n(4, 2, 3, 5), n(2, 3, 5, 6)], {"transBatchA": 1}),
    "batch AA": ("FusedMatMul", [n(5, 2, 3, 4), n(2, 3, 5, 6)], {"transBatchA": 1, "transA": 1}),
    "batch B": ("FusedMatMul", [n(2, 3, 4, 5), n(5, 2, 3, 6)], {"transBatchB": 1}),
    "batch BB": ("FusedMatMul", [n(2, 4, 5), n(6, 2, 5)], {"transBatchB": 1, "transB": 1}),
    "vector": ("FusedMatMul", [n(3, 5), n(5)], {"alpha": 3.0}),
    "older": ("TransposeMatMul", [n(2, 5, 3), n(2, 4, 5)], {"transA": 1, "transB": 1, "alpha": 0.5}),
    "dynamic pads": (
        "ConvTransposeWithDynamicPads",
        [n(1, 3, 4, 4), n(3, 2, 3, 3), np.array([1, 0, 0, 1]), n(2)],
        {"strides": [2, 2]},
    ),
}


@pytest.mark.parametrize(("opset", "fixed"), [(11, ()), (17, (1, 2))])
@pytest.mark.parametrize("case", LINEAR)
def test_linear_maps_with_what_is_around_them(case, opset, fixed):
    op, operands, attrs = LINEAR[case]
    fixed = fixed or (2,) * (case == "dynamic pads")
    check(*one_node(op, operands, fixed, opset=opset, **attrs))


def test_a_weight_takes_in_the_factor_so_that_a_bias_stays_next_to_its_product():
    """The optimiser moves the 0.5 of GELU through the next MatMul, whose bias comes after it."""
    operands = [n(2, 3, 5), n(4, 5)]
    made = check(*one_node("FusedMatMul", operands, (1,), transB=1, alpha=0.5))
    assert [node.op_type for node in made.graph.node] == ["MatMul"]


def test_the_layer_before_the_activation_has_the_name_of_the_file():
    op, operands, attrs = LINEAR["conv relu"]
    names = {node.name: node.op_type for node in check(*one_node(op, operands, (1, 2), **attrs)).graph.node}
    assert names == {"fused": "Conv", "fused/Relu": "Relu"}
    op, operands, attrs = LINEAR["conv sum"]
    names = {node.name: node.op_type for node in check(*one_node(op, operands, (1, 2), **attrs)).graph.node}
    assert names == {"fused/Conv": "Conv", "fused": "Add", "fused/Relu": "Relu"}


ACTIVATIONS = {
    "Gelu": ([n(2, 3, 8)], {}),
    "BiasGelu": ([n(2, 3, 8), n(8)], {}),
    "FastGelu": ([n(2, 3, 8)], {}),
    "FastGelu bias": ([n(2, 3, 8), n(8)], {}),
    "QuickGelu": ([n(2, 3, 8)], {}),
    "QuickGelu alpha": ([n(2, 3, 8)], {"alpha": 1.0}),
    "ScaledSiLU": ([n(2, 3, 8)], {"alpha": 1.5}),
    "ScaledSiLU scale": ([n(2, 3, 8), np.array(0.5, np.float32)], {}),
}


@pytest.mark.parametrize("opset", [12, 17, 20, 24])
@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations(case, opset):
    operands, attrs = ACTIVATIONS[case]
    check(*one_node(case.split()[0], operands, opset=opset, batch=(0,), **attrs))


TOKENS, SKIP, WIDE = n(2, 5, 8), n(2, 5, 8, seed=1), n(8, seed=2)
NORMALISATIONS = {
    "SkipLayerNormalization": ([TOKENS, SKIP, n(8)], {"epsilon": 1e-5}),
    "SkipLayerNormalization beta": ([TOKENS, SKIP, n(8), WIDE], {}),
    "SkipLayerNormalization bias": ([TOKENS, SKIP, n(8), None, WIDE], {"epsilon": 1e-3}),
    "SkipLayerNormalization all": ([TOKENS, SKIP[:1], n(8), n(8, seed=5), WIDE], {"epsilon": 1e-3}),
    "SkipSimplifiedLayerNormalization": ([TOKENS, SKIP, n(8)], {"epsilon": 1e-5}),
    "SkipSimplifiedLayerNormalization bias": ([TOKENS, SKIP, n(8), WIDE], {"epsilon": 1e-3}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("opset", [12, 17, 23])
@pytest.mark.parametrize("case", NORMALISATIONS)
def test_normalisations_with_the_sum_before_them(case, opset, dtype):
    operands, attrs = NORMALISATIONS[case]
    operands = [None if x is None else x.astype(dtype) for x in operands]
    outputs = ("y", "", "", "sum")
    model, feeds = one_node(case.split()[0], operands, (2, 3, 4), outputs, opset, batch=(0,), **attrs)
    check(model, feeds, 1e-5 if dtype == np.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("opset", [12, 17, 23])
@pytest.mark.parametrize("axis", [-1, 1])
def test_normalisation_without_the_mean(axis, opset, dtype):
    scale = n(*TOKENS.shape[axis:]).astype(dtype)
    model, feeds = one_node(
        "SimplifiedLayerNormalization", [TOKENS.astype(dtype), scale], (1,), opset=opset, domain="", axis=axis,
        epsilon=1e-3,
    )  # fmt: skip
    made = check(model, feeds, 1e-5 if dtype == np.float32 else 5e-3)
    assert ("RMSNormalization" in {node.op_type for node in made.graph.node}) == (opset == 23)


def test_the_bias_in_a_skip_goes_back_to_the_product_it_was_fused_from():
    """The optimiser took it from the MatMul before: put back there, it is the bias of that linear map."""
    weight, other = n(8, 8), n(8, 8, seed=3)
    for side in (0, 1):
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["p"], "product"),
            helper.make_node("Relu", ["x"], ["r"], "relu"),
            helper.make_node(
                "SkipLayerNormalization", [*(["p", "r"] if side == 0 else ["r", "p"]), "g", "", "b"], ["y"], "fused",
                domain=MS,
            ),
        ]  # fmt: skip
        graph = helper.make_graph(
            nodes, "skip", [helper.make_tensor_value_info("x", 1, [2, 5, 8])], [onnx.ValueInfoProto(name="y")],
            [numpy_helper.from_array(v, k) for k, v in {"w": weight, "g": n(8), "b": other[0]}.items()],
        )  # fmt: skip
        imports = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
        made = check(helper.make_model(graph, opset_imports=imports, ir_version=8), {"x": TOKENS})
        add = next(node for node in made.graph.node if "b" in node.input)
        assert "p" in add.input


# -- attention ---------------------------------------------------------------------------------------------------

SEQUENCE = n(2, 5, 8)
PROJECTION, BIAS = n(8, 24) / 3, n(24)
LENGTHS = np.array([5, 3], np.int32)
SPANS = np.array([5, 4, 0, 1], np.int32)  # ends, then starts
KEYS = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]], np.int32)
PAIRS = rng(4).integers(0, 2, (2, 5, 5)).astype(np.int32) | np.eye(5, dtype=np.int32)
SCORES = n(1, 2, 5, 5)
PACKED = {
    "plain": ([SEQUENCE, PROJECTION, BIAS], {}),
    "no bias": ([SEQUENCE, PROJECTION], {}),
    "scale": ([SEQUENCE, PROJECTION, BIAS], {"scale": 0.3}),
    "causal": ([SEQUENCE, PROJECTION, BIAS], {"unidirectional": 1}),
    "lengths": ([SEQUENCE, PROJECTION, BIAS, LENGTHS], {}),
    "spans": ([SEQUENCE, PROJECTION, BIAS, SPANS], {}),
    "keys": ([SEQUENCE, PROJECTION, BIAS, KEYS], {"mask_filter_value": -5.0}),
    "pairs": ([SEQUENCE, PROJECTION, BIAS, PAIRS], {}),
    "causal keys": ([SEQUENCE, PROJECTION, BIAS, KEYS], {"unidirectional": 1}),
    "scores": ([SEQUENCE, PROJECTION, BIAS, None, None, SCORES], {}),
    "values": ([SEQUENCE, n(8, 28) / 3, n(28)], {"qkv_hidden_sizes": [8, 8, 12]}),
}


@pytest.mark.parametrize(("opset", "fixed"), [(11, False), (17, True)])
@pytest.mark.parametrize("case", PACKED)
def test_attention_behind_one_projection(case, opset, fixed):
    operands, attrs = PACKED[case]
    model, feeds = one_node("Attention", operands, (1, 2, 3, 5) if fixed else (1, 2), opset=opset, num_heads=2, **attrs)
    made = check(model, feeds)
    assert [node.op_type for node in made.graph.node].count("Softmax") == 1


Q, K, V = n(2, 5, 8, seed=1), n(2, 7, 8, seed=2), n(2, 7, 12, seed=3)
SIDE_BY_SIDE = {
    "plain": ([Q, K, V], {}),
    "bias": ([Q, K, V, n(28)], {}),
    "scale": ([Q, K, V], {"scale": 0.7}),
    "lengths": ([Q, K, V, None, np.array([7, 4], np.int32)], {}),
    "keys": ([Q, K, V, None, rng(3).integers(0, 2, (2, 7)).astype(np.int32)], {"mask_filter_value": -3.0}),
    "scores": ([Q, K, V, None, None, n(2, 1, 5, 7)], {}),
    "self": ([Q, Q, Q], {"unidirectional": 1}),
    "apart": ([Q, n(2, 2, 7, 4), n(2, 2, 7, 4)], {}),
    "apart bias": ([Q, n(2, 2, 7, 4), n(2, 2, 7, 4), n(24)], {}),
}


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("case", SIDE_BY_SIDE)
def test_attention_of_queries_keys_and_values(case, opset):
    operands, attrs = SIDE_BY_SIDE[case]
    check(*one_node("MultiHeadAttention", operands, (3,), opset=opset, num_heads=2, **attrs))


def test_attention_hands_out_keys_and_values():
    check(*one_node("MultiHeadAttention", [Q, K, V], outputs=("y", "k", "v"), num_heads=2))


PROMPT, GROUPED = n(2, 5, 64, seed=4), n(2, 5, 32, seed=5)
COS, SIN = np.cos(n(9, 8)), np.sin(n(9, 8))
WHOLE = [np.full(2, 4, np.int32), np.array(5, np.int32)]
GROUPS = {
    "plain": ([PROMPT, GROUPED, GROUPED, None, None, *WHOLE], {}),
    "packed": ([n(2, 5, 128), None, None, None, None, *WHOLE], {}),
    "turned": ([PROMPT, GROUPED, GROUPED, None, None, *WHOLE, COS, SIN], {"do_rotary": 1}),
    "neighbours": (
        [PROMPT, GROUPED, GROUPED, None, None, *WHOLE, COS, SIN],
        {"do_rotary": 1, "rotary_interleaved": 1},
    ),
    "window": ([PROMPT, GROUPED, GROUPED, None, None, *WHOLE], {"local_window_size": 2}),
    "softcap": ([PROMPT, GROUPED, GROUPED, None, None, *WHOLE], {"softcap": 2.0, "scale": 0.4}),
    "both ways": ([PROMPT, GROUPED, GROUPED, None, None, *WHOLE], {"causal": 0}),
}


@pytest.mark.parametrize("case", GROUPS)
def test_attention_of_grouped_queries(case):
    operands, attrs = GROUPS[case]
    past = [np.zeros((2, 2, 0, 16), np.float32)] * 2  # the kernel wants some, and takes none
    run = [*operands[:3], *past, *operands[5:]]
    names = ("y", "k", "v")
    model, feeds = one_node("GroupQueryAttention", operands, (5, 6, 7, 8), names, num_heads=4, kv_num_heads=2, **attrs)
    kernel, fed = one_node("GroupQueryAttention", run, (5, 6, 7, 8), names, num_heads=4, kv_num_heads=2, **attrs)
    agree(evaluate(expanded(model), feeds), evaluate(kernel, fed), 1e-5)


@pytest.mark.parametrize("columns", [1, 24])
@pytest.mark.parametrize("weight", [np.uint8, np.int8])
def test_attention_in_integers(weight, columns):
    r = rng(1)
    info = np.iinfo(weight)
    zero = r.integers(-3, 3, columns) + (info.max + info.min) // 2
    operands = [
        r.integers(0, 255, (2, 5, 8)).astype(np.uint8),
        r.integers(info.min // 2, info.max // 2, (8, 24)).astype(weight),  # half the range: older CPUs saturate
        n(24),
        np.array(0.02, np.float32),
        r.uniform(0.005, 0.01, columns).astype(np.float32),
        KEYS,
        np.array(120, np.uint8),
        zero.astype(weight),
    ]
    if columns == 1:
        operands[4], operands[7] = operands[4][0], operands[7][0]
    check(*one_node("QAttention", operands, (1, 2, 3, 4, 6, 7), num_heads=2))


POSITIONS = np.array([[0, 3, 1, 2, 8], [4, 4, 4, 0, 1]])
TURNS = {
    "offset": ([n(2, 5, 8), np.array([2]), n(9, 2), n(9, 2)], {}),
    "positions": ([n(2, 5, 8), POSITIONS, n(9, 2), n(9, 2)], {}),
    "heads": ([n(2, 3, 5, 4), POSITIONS, n(9, 2), n(9, 2)], {}),
    "neighbours": ([n(2, 3, 5, 4), POSITIONS, n(9, 2), n(9, 2)], {"interleaved": 1}),
    "part": ([n(2, 5, 16), POSITIONS, n(9, 2), n(9, 2)], {"num_heads": 2, "rotary_embedding_dim": 4}),
}


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("case", TURNS)
def test_rotary_embedding(case, opset):
    operands, attrs = TURNS[case]
    check(*one_node("RotaryEmbedding", operands, (1, 2, 3), opset=opset, **attrs))


OTHERS = {
    "Trilu": ([n(2, 4, 5), np.array(1)], {"upper": 0}),
    "ExpandDims": ([n(2, 4), np.array(-1, np.int32)], {}),
    "Pad": ([n(2, 4), np.array([0, 1, 2, 0]), np.array([0.5], np.float32)], {}),
    "GatherND": ([n(2, 4), np.array([[0, 1], [1, 3]])], {}),
    "GridSample": ([n(1, 2, 4, 4), n(1, 3, 3, 2) / 2], {"padding_mode": "border"}),
}


@pytest.mark.parametrize("opset", [16, 20])
@pytest.mark.parametrize("case", OTHERS)
def test_ops_that_onnx_has_too(case, opset):
    operands, attrs = OTHERS[case]
    check(*one_node(case, operands, (1, 2), opset=opset, **attrs))


DROPPED = {
    "Affine": ({"alpha": 0.5, "beta": 2.0}, lambda x: 0.5 * x + 2),
    "Scale": ({"scale": 3.0}, lambda x: 3 * x),
    "ScaledTanh": ({"alpha": 0.5, "beta": 2.0}, lambda x: 0.5 * np.tanh(2 * x)),
    "ParametricSoftplus": ({"alpha": 0.5, "beta": 2.0}, lambda x: 0.5 * np.log(np.exp(2 * x) + 1)),
    "ImageScaler": (
        {"scale": 2.0, "bias": [1.0, 2.0, 3.0]},
        lambda x: 2 * x + np.array([1, 2, 3], np.float32)[:, None, None],
    ),
    "Crop": ({"border": [1, 0, 2, 3]}, lambda x: x[:, :, 0:-3, 1:-2]),
    "Crop scale": ({"border": [1, 2, 0, 0], "scale": [3, 4]}, lambda x: x[:, :, 2:5, 1:5]),
}


@pytest.mark.parametrize("case", DROPPED)
def test_ops_that_onnx_dropped(case):
    attrs, formula = DROPPED[case]
    x = n(2, 3, 6, 8)
    model, feeds = one_node(case.split()[0], [x], opset=9, domain="", **attrs)
    agree(evaluate(expanded(model), feeds), [formula(x)], 1e-6)
    agree(evaluate(model, feeds), [formula(x)], 1e-6)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def erf_gelu(x: np.ndarray) -> np.ndarray:
    import torch

    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


def group_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, groups: int) -> np.ndarray:
    import torch

    first = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    y = torch.nn.functional.group_norm(first, groups, torch.from_numpy(gamma), torch.from_numpy(beta), 1e-3)
    return np.moveaxis(y.numpy(), 1, -1)


def conv(x: np.ndarray, w: np.ndarray, b: np.ndarray | None, stride: int, groups: int = 1) -> np.ndarray:
    import torch

    first = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    bias = None if b is None else torch.from_numpy(b)
    y = torch.nn.functional.conv2d(first, torch.from_numpy(w), bias, stride, 1, groups=groups)
    return np.moveaxis(y.numpy(), 1, -1)


LAST, FILTERS = n(2, 6, 5, 4), n(6, 4, 3, 3)
GEOMETRY = {"strides": [2, 2], "pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
NORM = {"groups": 2, "epsilon": 1e-3}
GAMMA, BETA = n(4), n(4, seed=1)
QKV = n(2, 5, 2, 3, 4)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Of (N, S, heads, D)."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    y = softmax(q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])) @ v
    return y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1)


# What ONNX Runtime's CPU provider has no kernel for; the oracles are PyTorch and NumPy.
GPU = {
    "BiasAdd": ([LAST, BETA, LAST], {}, lambda: 2 * LAST + BETA),
    "BiasSplitGelu": ([LAST, BETA], {}, lambda: (LAST + BETA)[..., :2] * erf_gelu((LAST + BETA)[..., 2:])),
    "BiasSoftmax": ([TOKENS, WIDE], {"axis": 2}, lambda: softmax(TOKENS + WIDE)),
    "GroupNorm": ([LAST, GAMMA, BETA], {**NORM, "activation": 0}, lambda: group_norm(LAST, GAMMA, BETA, 2)),
    "GroupNorm silu": ([LAST, GAMMA, BETA], {**NORM, "activation": 1}, lambda: silu(group_norm(LAST, GAMMA, BETA, 2))),
    "GroupNorm first": (
        [np.moveaxis(LAST, -1, 1).copy(), GAMMA, BETA],
        {**NORM, "activation": 0, "channels_last": 0},
        lambda: np.moveaxis(group_norm(LAST, GAMMA, BETA, 2), -1, 1),
    ),
    "SkipGroupNorm": (
        [LAST, GAMMA, BETA, LAST, BETA],
        {**NORM, "activation": 1},
        lambda: silu(group_norm(2 * LAST + BETA, GAMMA, BETA, 2)),
    ),
    "SkipGroupNorm row": (
        [LAST, GAMMA, BETA, n(2, 4)],
        {**NORM, "activation": 0},
        lambda: group_norm(LAST + n(2, 4)[:, None, None], GAMMA, BETA, 2),
    ),
    "NhwcConv": ([LAST, np.moveaxis(FILTERS, 1, -1).copy(), n(6)], GEOMETRY, lambda: conv(LAST, FILTERS, n(6), 2)),
    "NhwcConv groups": (
        [LAST, np.moveaxis(FILTERS[:, :2], 1, -1).copy()],
        {**GEOMETRY, "group": 2},
        lambda: conv(LAST, FILTERS[:, :2].copy(), None, 2, 2),
    ),
    "NhwcFusedConv": (
        [LAST, FILTERS, n(6), n(2, 3, 3, 6)],
        {**GEOMETRY, "activation": "Relu"},
        lambda: np.maximum(conv(LAST, FILTERS, n(6), 2) + n(2, 3, 3, 6), 0),
    ),
    "FusedMatMulActivation": (
        [n(3, 5), n(4, 5)],
        {"transB": 1, "alpha": 0.5, "activation": "Relu"},
        lambda: np.maximum(n(3, 5) @ n(4, 5).T / 2, 0),
    ),
    "BiasDropout": ([TOKENS, WIDE, SKIP], {}, lambda: TOKENS + WIDE + SKIP),
    "BitmaskDropout": ([TOKENS], {}, lambda: TOKENS),
    "SwiGLU": (
        [TOKENS, SKIP],
        {"activation_alpha": 1.5, "activation_beta": 1.0},
        lambda: TOKENS / (1 + np.exp(-1.5 * TOKENS)) * (SKIP + 1),
    ),
    "SwiGLU limit": (
        [TOKENS, SKIP],
        {"limit": 0.5},
        lambda: silu(np.minimum(TOKENS, 0.5)) * np.clip(SKIP, -0.5, 0.5),
    ),
    "MultiHeadAttention": ([QKV], {"num_heads": 2}, lambda: attention(*np.moveaxis(QKV, 3, 0))),
    "MultiHeadAttention two": (
        [n(2, 3, 8), n(2, 5, 2, 2, 4)],
        {"num_heads": 2},
        lambda: attention(n(2, 3, 8).reshape(2, 3, 2, 4), *np.moveaxis(n(2, 5, 2, 2, 4), 3, 0)),
    ),
}


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("case", GPU)
def test_ops_for_graphics_processors(case, opset):
    operands, attrs, formula = GPU[case]
    model, feeds = one_node(case.split()[0], operands, (1, 2) if "Norm" in case else (), opset=opset, **attrs)
    agree(evaluate(expanded(model), feeds), [formula().astype(np.float32)], 1e-5)


HALF = {
    **{case: (case.split()[0], *ACTIVATIONS[case]) for case in ("BiasGelu", "FastGelu bias", "QuickGelu")},
    **{f"heads {case}": ("MultiHeadAttention", *SIDE_BY_SIDE[case]) for case in ("bias", "scores", "self")},
    **{f"packed {case}": ("Attention", *PACKED[case]) for case in ("causal keys", "scores")},
    **{case: LINEAR[case] for case in ("matmul AB", "gemm elu", "conv sum")},
}


@pytest.mark.parametrize("case", HALF)
def test_half_precision(case):
    """ONNX Runtime's CPU kernels have none: theirs in float32 are the oracle."""
    op, operands, attrs = HALF[case]
    if op in ("MultiHeadAttention", "Attention"):
        attrs = {**attrs, "num_heads": 2}
    half = [x.astype(np.float16) if x is not None and x.dtype == np.float32 else x for x in operands]
    single = [x.astype(np.float32) if x is not None and x.dtype == np.float16 else x for x in half]
    model, feeds = one_node(op, half, **attrs)
    expected = evaluate(*one_node(op, single, **attrs))
    got = evaluate(expanded(model), feeds)
    assert got[0].dtype == np.float16
    agree([got[0].astype(np.float32)], expected, 5e-3)


# -- what is left ------------------------------------------------------------------------------------------------

LEFT_OVER = {
    "past": ("Attention", [SEQUENCE, PROJECTION, BIAS, None, n(2, 2, 2, 3, 4)], {"num_heads": 2}, "of the past"),
    "activation": ("FusedConv", [IMAGE, KERNEL], {"activation": "Twirl"}, "activation 'Twirl'"),
    "mask": (
        "MultiHeadAttention",
        [Q, K, V, None, np.ones(8, np.int32)],
        {"num_heads": 2},
        r"a mask of shape \[8\]",
    ),
    "lengths": (
        "GroupQueryAttention",
        [PROMPT, GROUPED, GROUPED, None, None, *WHOLE],
        {"num_heads": 4, "kv_num_heads": 2},
        "whose lengths are computed in the graph",
    ),
    "smooth": (
        "GroupQueryAttention",
        [PROMPT, GROUPED, GROUPED, None, None, *WHOLE],
        {"num_heads": 4, "kv_num_heads": 2, "smooth_softmax": 1},
        "smooth softmax",
    ),
    "square": (
        "NhwcConv",
        [LAST, n(6, 4, 4, 4)],
        {"kernel_shape": [4, 4]},
        "channels first or last",
    ),
    "statistics": ("SkipLayerNormalization", [TOKENS, SKIP, n(8)], {}, "whose output 1"),
    "axes": ("BiasSoftmax", [TOKENS, TOKENS], {"axis": 1}, "over several axes"),
    "general": ("BeamSearch", [TOKENS], {}, "it generates text"),
}


@pytest.mark.parametrize("case", LEFT_OVER)
def test_forms_without_an_expansion_stay_and_the_error_says_why(case):
    op, operands, attrs, said = LEFT_OVER[case]
    outputs = ("y", "mean") if case == "statistics" else ("y",)
    model, _ = one_node(op, operands, (6,) if case == "lengths" else (5, 6), outputs, **attrs)
    (left,) = Graph(canonise(model)).nodes
    with pytest.raises(ModelError, match=f"node 'fused': no operator for com.microsoft.{op} at opset 1: .*{said}"):
        lookup(left)


def test_an_operator_goes_before_an_expansion(monkeypatch):
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    registry.operator("QuickGelu", domain=MS)(lambda node: Elementwise(lambda at: at.input(0)))
    model, _ = one_node("QuickGelu", [TOKENS])
    assert [one.op for one in canonise(model).nodes] == ["QuickGelu"]


# -- ONNX --------------------------------------------------------------------------------------------------------

# The test cases of ONNX for what it defines by a function, and where onnxcam has an expansion or takes that function.
FUNCTIONS = (
    "attention rotaryembedding affinegrid blackmanwindow hammingwindow hannwindow  causal_conv_with_state "
    "negativeloglikelihoodloss softmax_cross_entropy_loss swiglu flexattention"
)
# Cases that no expansion is for, by part of the name, and what the error says of them.
LEFT = {
    "bf16": "computes in BFLOAT16",
    "qk_matmul_bias": "whose output 3",
    "causal_conv_with_state_with_past": "Type unknown",
    "causal_conv_with_state_silu_with_past": "Type unknown",
}


def node_cases() -> list[Any]:
    """ONNX's cases of these ops; collecting all of ONNX's would take half a minute."""
    no_text = mock.patch.object(case_base, "process_snippet", lambda op, name, export: ("", ""))
    with warnings.catch_warnings(), no_text:
        warnings.simplefilter("ignore")
        for name in FUNCTIONS.split():
            importlib.import_module(f"onnx.backend.test.case.node.{name}")
        found = {case.name: case for case in node._NodeTestCases}
    ops = {op.replace("_", "") for op in FUNCTIONS.split()}
    return [
        case
        for case in found.values()
        if len(case.model.graph.node) == 1 and case.model.graph.node[0].op_type.lower() in ops
    ]


@pytest.mark.parametrize("case", node_cases(), ids=lambda case: case.name.removeprefix("test_"))
def test_functions_of_the_specification(case):
    """The case's own result is the oracle; the reference evaluator computes what we make of it."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    op = model.graph.node[0].op_type
    if op == "AffineGrid":  # its second input is a shape, known in advance as the first one's is
        sizes = numpy_helper.from_array(np.asarray(case.data_sets[0][0][1]), model.graph.input[1].name)
        model.graph.initializer.append(sizes)
        del model.graph.input[1]
    graph = canonise(model)
    left = [one for one in Graph(graph).nodes if one.op_type == op]
    if left:
        said = next(said for part, said in LEFT.items() if part in case.name)
        with pytest.raises(ModelError, match=f"no operator for {op} at opset .*{said}"):
            lookup(left[0])
        return
    made = gs.export_onnx(graph, do_type_check=False)
    names = {value.name for value in made.graph.input}
    for inputs, outputs in case.data_sets:
        feeds = {v.name: x for v, x in zip(case.model.graph.input, inputs, strict=True) if v.name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = ReferenceEvaluator(made).run(None, feeds)
        tolerance = 5e-3 if any(np.asarray(x).dtype == np.float16 for x in inputs) else 1e-5
        for a, b in zip(got, outputs, strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert a.shape == b.shape
            assert np.isclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(initial=0), 1e-30)).all()
