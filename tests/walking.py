"""Drives the walk by hand, below the public interface: a small network as text, a forward pass, one propagation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from onnxcam.canonise import canonise
from onnxcam.composites import KINDS, Composite
from onnxcam.engines.array import ArrayOps
from onnxcam.engines.reference import ReferenceSession
from onnxcam.engines.session import RuntimeSession
from onnxcam.graph import Graph
from onnxcam.propagate import Flow, needed_taps, propagate
from onnxcam.rules import Vjp
from onnxcam.taps import expose


def network(text: str, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    """The model of a graph in ONNX's textual syntax, with `weights` as its initialisers.

    `text` is signature and body: "(float[1,3,8,8] x) => (float[?,?] y) { h = Conv<pads=[1,1,1,1]>(x, w) ... }".
    """
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}, "ai.foreign": 1]> network {text}')
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return model


def as_written(model: onnx.ModelProto) -> Graph:
    """The graph node by node as the file has it: nothing folded, merged or removed; shapes inferred."""
    return Graph(gs.import_onnx(onnx.shape_inference.infer_shapes(model)))


def canonised(model: onnx.ModelProto, **options: Any) -> Graph:
    return Graph(canonise(model, **options))


def everywhere(rule: Any) -> Composite:
    """`rule` for linear and averaging operators; exact vector-Jacobian products for the rest."""
    return Composite("test", {kind: Vjp() for kind in KINDS} | {"linear": rule, "averaging": rule})


@dataclass(frozen=True)
class Walk:
    """One forward pass and one propagation."""

    graph: Graph
    values: dict[str, np.ndarray]
    flow: Flow

    def __getitem__(self, layer: str) -> np.ndarray:
        """Relevance of a layer, (T, *tensor.shape)."""
        return self.flow.relevance[layer]

    def __contains__(self, layer: str) -> bool:
        return layer in self.flow.relevance


class Walker:
    """A graph with the session that evaluates it: float64 by the reference evaluator, float32 by ONNX Runtime."""

    def __init__(self, graph: Graph | onnx.ModelProto, layers: Sequence[str], logits: str, dtype: str = "float64"):
        self.graph = as_written(graph) if isinstance(graph, onnx.ModelProto) else graph
        self.layers, self.logits, self.ops = list(layers), logits, ArrayOps(np, dtype)
        taps = needed_taps(self.graph, self.layers, logits)
        session = ReferenceSession if dtype == "float64" else RuntimeSession
        self._session = session(expose(self.graph, taps), taps)

    def forward(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._session.run(feeds)

    def back(self, values: dict[str, np.ndarray], start: np.ndarray, composite: Composite) -> Walk:
        flow = propagate(self.graph, values, {self.logits: start}, self.layers, composite, self.ops)
        return Walk(self.graph, values, flow)

    def __call__(self, feeds: Mapping[str, np.ndarray], start: np.ndarray, composite: Composite) -> Walk:
        return self.back(self.forward(feeds), start, composite)


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over largest reference value."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
