"""Small models for the canonisation tests, and the oracle they share: ONNX Runtime on the model as it was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from onnx import TensorProto, helper

from onnxcam.canonise import canonise

Shape = Sequence[int | str | None]
node = helper.make_node


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return rng(seed).normal(size=shape).astype(np.float32)


def batchnorm(channels: int, prefix: str = "bn", seed: int = 1) -> dict[str, np.ndarray]:
    """The four parameters of a BatchNormalization under their usual names."""
    r = rng(seed)
    return {
        f"{prefix}.gamma": r.normal(size=channels).astype(np.float32),
        f"{prefix}.beta": r.normal(size=channels).astype(np.float32),
        f"{prefix}.mean": r.normal(size=channels).astype(np.float32),
        f"{prefix}.var": r.uniform(0.5, 2, size=channels).astype(np.float32),
    }


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Iterable[str],
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 17,
    ir_version: int = 8,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """A float32 model; the outputs' shapes are left to shape inference."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def evaluate(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray], names: Sequence[str] = ()) -> list[np.ndarray]:
    """The values of `names`, or of the outputs, by ONNX Runtime without fusions."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(proto)
    have = {output.name for output in tapped.graph.output}
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in have)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(tapped.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(list(names) or [output.name for output in proto.graph.output], dict(feeds))


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest expected value."""
    assert actual.shape == expected.shape
    scale = np.abs(expected.astype(np.float64)).max(initial=1e-30)
    return float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max(initial=0) / scale)


def canonised(
    proto: onnx.ModelProto,
    keep: Iterable[str] = (),
    sizes: Mapping[str, int] | None = None,
    tolerance: float = 1e-5,
    **options: object,
) -> gs.Graph:
    """Canonise `proto`, and check that outputs and kept tensors are what ONNX Runtime computes from `proto` itself.

    `sizes` says what a symbolic axis is when the models run. The tolerance is relative: folding rounds each weight
    once, in float32, which moves a sum of some hundred products by a few 1e-7.
    """
    keep = list(keep)
    graph = canonise(proto, keep=frozenset(keep), **options)  # type: ignore[arg-type]
    rewritten = gs.export_onnx(graph)
    rewritten.ir_version = max(rewritten.ir_version, 4)
    onnx.checker.check_model(rewritten)
    constants = {tensor.name for tensor in proto.graph.initializer}
    feeds = {}
    for i, info in enumerate(proto.graph.input):
        if info.name not in constants:
            dims = [d.dim_value or (sizes or {})[d.dim_param] for d in info.type.tensor_type.shape.dim]
            feeds[info.name] = normal(*dims, seed=7 + i)
    names = [output.name for output in proto.graph.output] + keep
    expected = evaluate(proto, feeds, names)
    for name, wanted, got in zip(names, expected, evaluate(rewritten, feeds, names), strict=True):
        assert distance(got, wanted) <= tolerance, name
    return graph


def ops(graph: gs.Graph) -> dict[str, int]:
    """How many nodes of each op type `graph` has."""
    return dict(Counter(node.op for node in graph.nodes))
