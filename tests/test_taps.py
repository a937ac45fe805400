"""Taps: tensors inside a graph become outputs of a copy of it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from walking import canonised

from onnxcam.engines.session import RuntimeSession
from onnxcam.taps import expose
from small_nets import NETS, resnet

X = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)


def in_the_file(proto: onnx.ModelProto, tensors: list[str], x: np.ndarray) -> list[np.ndarray]:
    """The oracle: ONNX Runtime on the file itself, unoptimised, with the tensors listed as outputs."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {model.graph.input[0].name: x})


@pytest.mark.parametrize("net", NETS)
def test_taps_have_the_values_of_the_file(net):
    """Float32 summed in another order: 1e-5 of the largest value."""
    proto = NETS[net]()
    graph = canonised(proto)
    inside = [name for node in graph.nodes for name in node.outputs]
    names = [name for node in proto.graph.node for name in node.output if name in inside]
    values = RuntimeSession(expose(graph, names), names).run({"x": X})
    for name, expected in zip(names, in_the_file(proto, names, X), strict=True):
        np.testing.assert_allclose(values[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)


def test_outputs_come_in_the_order_asked_for_and_nothing_else_is_computed():
    graph = canonised(resnet())
    model = expose(graph, ["r1", "r0"])
    assert [o.name for o in model.graph.output] == ["r1", "r0"]
    assert not any("r2" in node.output for node in model.graph.node)


def test_an_input_can_be_tapped():
    graph = canonised(resnet())
    values = RuntimeSession(expose(graph, ["x", "r0"]), ["x", "r0"]).run({"x": X})
    np.testing.assert_array_equal(values["x"], X)


def test_the_graph_is_not_changed():
    graph = canonised(resnet())
    before = [t.name for t in graph.surgeon.outputs], len(graph.surgeon.nodes)
    expose(graph, ["x", "r1"])
    assert ([t.name for t in graph.surgeon.outputs], len(graph.surgeon.nodes)) == before
