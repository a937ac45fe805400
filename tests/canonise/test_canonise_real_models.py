"""Real files from six exporters survive canonisation. Oracle: ONNX Runtime on the file itself, without fusions.

The tolerance is relative to the largest output: 1e-5 in float32, where folding rounds each weight once; 5e-3 in
float16 (11 bits), where ONNX Runtime rounds at other places once a Dropout is gone. A file of integer operators is
compared in integers, with fusions, and is the same to the bit. Dynamic quantisation has a float sum before each
rounding, and one number that falls on the other side of a half moves those of the next layers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from onnxcam.canonise import canonise
from tests.canonise.building import distance, evaluate, ops

MODELS = (
    "cifar10-resnet20",
    "efficientnet-lite0-dynamic-u8",
    "efficientnet-lite0-fp16",
    "efficientnet-lite0-qdq-int8",
    "efficientnet-lite0-qoperator-u8s8",
    "efficientnet-lite0-torchscript-op13",
    "efficientnet-lite0",
    "mnist-cntk",
    "mobilenet-v2-float-nchw-logits",
    "mobilenet-v2-tflite-qdq-nhwc",
    "pplcnet-orientation-paddle",
    "squeezenet-fp16-opset7",
)
TOLERANCE = {"efficientnet-lite0-qoperator-u8s8": 0, "efficientnet-lite0-dynamic-u8": 0.05}
BATCHED = ("cifar10-resnet20", "efficientnet-lite0-torchscript-op13", "pplcnet-orientation-paddle")


def canonised(assets: Path, name: str, batch: int = 1) -> gs.Graph:
    path = assets / "models" / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    proto = onnx.load(path)
    graph = canonise(proto)
    (tensor,) = graph.inputs
    shape = [batch if isinstance(d, str) else d for d in tensor.shape]
    values = np.abs(np.random.default_rng(0).normal(size=shape)) * (100 if tensor.dtype == np.uint8 else 1)
    feeds = {tensor.name: values.astype(tensor.dtype)}
    run = fused if "qoperator" in name else evaluate
    for got, expected in zip(run(gs.export_onnx(graph), feeds), run(proto, feeds), strict=True):
        assert distance(got, expected) <= TOLERANCE.get(name, 5e-3 if "fp16" in name else 1e-5)
    return graph


def fused(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """By ONNX Runtime as it comes, which computes in integers what can be."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_computes_the_same_and_every_tensor_has_a_shape_and_a_type(assets, name):
    graph = canonised(assets, name)
    unknown = [t.name for t in graph.tensors().values() if t.shape is None or t.dtype is None]
    assert unknown == []
    assert all(node.name for node in graph.nodes)


@pytest.mark.parametrize("name", BATCHED)
def test_a_symbolic_batch_stays_symbolic(assets, name):
    graph = canonised(assets, name, batch=3)
    assert isinstance(graph.inputs[0].shape[0], str)
    assert graph.outputs[0].shape[0] == graph.inputs[0].shape[0]
    assert "Shape" not in ops(graph)


def test_the_pads_of_a_torchscript_export_are_constants(assets):
    graph = canonised(assets, "efficientnet-lite0-torchscript-op13")
    pads = [node for node in graph.nodes if node.op == "Pad"]
    assert len(pads) == 17
    assert all(isinstance(tensor, gs.Constant) for node in pads for tensor in node.inputs[1:] if not tensor.is_empty())
    assert set(ops(graph)) == {"Pad", "Conv", "Clip", "Add", "GlobalAveragePool", "Reshape", "Gemm"}


def test_all_batchnorms_and_separate_biases_of_a_paddle_export_are_folded(assets):
    found = ops(canonised(assets, "pplcnet-orientation-paddle"))
    assert "BatchNormalization" not in found
    assert "Add" not in found
    assert found["Gemm"] == 1


def test_separate_biases_of_a_cntk_export_are_folded(assets):
    graph = canonised(assets, "mnist-cntk")
    assert ops(graph) == {"Conv": 2, "Relu": 2, "MaxPool": 2, "Reshape": 1, "Gemm": 1}
    assert [node.name for node in graph.nodes if node.op == "Conv"] == ["Convolution28", "Convolution110"]


def test_weights_of_a_quantised_model_stay_integers(assets):
    graph = canonised(assets, "efficientnet-lite0-qdq-int8")
    for node in graph.nodes:
        if node.op in ("Conv", "Gemm"):
            for tensor in node.inputs[1:]:
                (maker,) = tensor.inputs
                assert maker.op == "DequantizeLinear"
                assert isinstance(maker.inputs[0], gs.Constant)
