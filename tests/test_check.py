"""`check` says before any picture whether a model can be explained, by which rules and at what cost."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from walking import network

import onnxcam
from onnxcam.check import unreached
from onnxcam.errors import ModelError, UsageError
from onnxcam.model import load
from small_nets import NETS, resnet

W, V = np.ones((4, 3, 3, 3), np.float32), np.ones((4, 5), np.float32)


def broken(body: str, out: str = "float[N,5]"):
    return load(network(f"(float[N,3,16,16] x) => ({out} y) {{ c = Conv(x, w) r = Relu(c) {body} }}", w=W, v=V))


@pytest.mark.parametrize("net", NETS)
def test_a_model_that_can_be_explained_has_no_problem(net):
    check = load(NETS[net]()).check()
    assert check.problems == []
    assert check.logits == "y"
    assert all(row.kind and row.rule for row in check.rows)


def test_rows_run_from_the_logits_to_the_input():
    rows = load(resnet()).check().rows
    assert [row.op_type for row in rows][:3] == ["Gemm", "Flatten", "GlobalAveragePool"]
    assert rows[-1].node == "C0"


@pytest.mark.parametrize("net", NETS)
def test_what_check_accepts_can_be_explained_at_every_layer(net):
    """Check promises what explain keeps, for each composite."""
    model = load(NETS[net]())
    x = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)
    for composite in ("relevance_cam", "epsilon_plus", "gradient"):
        assert model.check(composite).problems == []
        assert all(np.isfinite(heat).all() for heat in model.explain(x, "all", composite=composite).maps.values())


def test_a_node_without_an_operator_is_named():
    model = broken("d = Det(r) y = Gemm(d, v)")
    (row,) = model.check().problems
    assert (row.node, row.op_type, row.rule) == ("Det_0", "Det", None)
    assert "no operator for Det at opset 17" in row.reason
    with pytest.raises(ModelError, match="no operator for Det"):
        model.explain(np.ones((1, 3, 16, 16), np.float32))


@pytest.mark.parametrize(
    ("body", "out", "says"),
    [
        ("y = ArgMax<axis=1>(r)", "int64[N,1,14,14]", "are int64"),
        ("y = Exp(r)", "float[N,4,14,14]", "onnxcam explains classifiers"),
    ],
)
def test_an_output_that_is_no_logits_is_a_problem(body, out, says):
    """As explain refuses it."""
    model = broken(body, out)
    assert any(says in row.reason for row in model.check().problems)
    with pytest.raises(ModelError, match=says):
        model.explain(np.ones((1, 3, 16, 16), np.float32))


def test_multiply_adds_are_counted_by_hand():
    """3x3 kernel of 3 channels at 14x14 places for 4 channels, then 4 by 5."""
    check = broken("g = GlobalAveragePool(r) f = Flatten(g) y = Gemm(f, v)").check()
    assert check.macs == 3 * 3 * 3 * 4 * 14 * 14 + 4 * 5
    # z-plus: forward and adjoint of the positive part, and of the negative part where the input is signed.
    assert check.walk_macs == 4 * (3 * 3 * 3 * 4 * 14 * 14) + 2 * (4 * 5)
    assert broken("g = GlobalAveragePool(r) f = Flatten(g) y = Gemm(f, v)").check("gradient").walk_macs == check.macs


def test_an_unknown_composite_is_the_users_mistake():
    with pytest.raises(UsageError, match="no composite named 'epsilon'"):
        load(resnet()).check("epsilon")


def test_a_loop_that_relevance_does_not_pass_is_named():
    """Older Keras writes recurrent layers as Loops, which read what they need past their inputs."""
    graph = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> network (float[N,4,3] x) => (float[N,3] y)
        <int64 trips = {4}, bool go = {1}> {
            images = Shape<start=0, end=1>(x)
            state = Concat<axis=0>(images, three)
            begun = Expand(naught, state)
            last = Loop (trips, go, begun) <body = step (int64 i, bool c, float[N,3] h) => (bool d, float[N,3] g) {
                d = Identity(c)
                row = Gather<axis=1>(x, i)
                g = Add(h, row)
            }>
            r = Relu(last)
            y = MatMul(r, w)
        }"""
    )
    graph.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(np.int64([3]), "three"),
            onnx.numpy_helper.from_array(np.float32(0), "naught"),
            onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32), "w"),
        ]
    )
    x = np.ones((1, 4, 3), np.float32)
    model = onnxcam.load(graph, preprocess="none")
    with pytest.raises(ModelError, match=r"node 'Loop_0': no operator for Loop .* runs a graph again and again"):
        model.explain(x, "input", method="lrp", engine="numpy")
    # Where nothing but the number of images goes in by the Loop's inputs, relevance ends before it is asked for.
    said = unreached("input", onnxcam.COMPOSITES["relevance_cam"], model.canonical().graph)
    assert "node 'Loop_0' (Loop) lies between it and the logits" in said and "--black-box" in said
