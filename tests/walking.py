"""Drives the walk by hand, below the public interface: a small network as text, a forward pass, one propagation.

Engine "numpy" walks over arrays. Engine "onnx" records the walk behind the graph and runs what was recorded: in float64
by the reference evaluator, so that a test can ask of both engines the same last digits, in float32 by ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from onnxcam.canonise import canonise
from onnxcam.compile import _Recorded
from onnxcam.composites import KINDS, Composite
from onnxcam.engines.array import ArrayOps
from onnxcam.engines.onnx import BATCH, RecorderOps, Symbol
from onnxcam.engines.reference import ReferenceSession
from onnxcam.engines.session import RuntimeSession
from onnxcam.graph import Graph
from onnxcam.operators.kinds import Array
from onnxcam.propagate import Balance, Flow, needed_taps, propagate, walk
from onnxcam.rules import Vjp
from onnxcam.taps import expose


def network(text: str, opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    """The model of a graph in ONNX's textual syntax, with `weights` as its initialisers.

    `text` is signature and body: "(float[1,3,8,8] x) => (float[?,?] y) { h = Conv<pads=[1,1,1,1]>(x, w) ... }"; an
    output without sizes, "float y", is of any shape.
    """
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}, "ai.foreign": 1]> network {text}')
    for output in model.graph.output:
        if not output.type.tensor_type.shape.dim:
            output.type.tensor_type.ClearField("shape")
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


ENGINES = ("numpy", "onnx")


class ExactOps(RecorderOps):
    """The recorder with its numbers unrounded, for a graph that the reference evaluator runs in float64."""

    def _lift(self, value: Any) -> Symbol:
        if isinstance(value, Symbol) or np.array_equal(np.asarray(value, np.float32), value):
            return super()._lift(value)
        array = np.asarray(value, np.float64)
        return Symbol(self, self.constant(array), array.shape, positive=bool((array >= 0).all()))

    def asarray(self, value: np.ndarray) -> Symbol:
        return self._lift(np.asarray(value, np.float64))


class RecordedWalk:
    """A walk recorded behind its graph as one ONNX model, its starts further inputs; runs as often as wanted.

    Args:
        starts: shapes of relevance at the tensors that the walk starts at, (T, *tensor.shape).
        dtype: "float64" for the reference evaluator, "float32" for ONNX Runtime.
        options: for `RuntimeSession`.
    """

    def __init__(
        self,
        graph: Graph,
        starts: Mapping[str, Sequence[int]],
        layers: Sequence[str],
        composite: Composite,
        dtype: str = "float64",
        **options: Any,
    ):
        surgeon = graph.surgeon.copy()
        ops = (ExactOps if dtype == "float64" else RecorderOps)(surgeon)
        values = _Recorded(graph, ops)
        held = {}
        for name, (targets, *_) in starts.items():
            shape = values.shape(name)
            sizes = ["N" if n == BATCH else n for n in shape]
            start = gs.Variable(f"start of {name}", np.float32, sizes if targets == 1 else [targets, *sizes])
            surgeon.inputs.append(start)
            held[name] = Symbol(ops, start, (targets, *shape), bare=targets == 1)
        flow = walk(graph, values, held, layers, composite)
        self.balances = flow.balances
        self.found = list(flow.relevance)
        results: dict[str, Symbol] = {f"relevance of {name}": r for name, r in flow.relevance.items()}
        for i, b in enumerate(flow.balances):
            results |= {f"{i} received": b.received, f"{i} handed": b.handed, f"{i} magnitude": b.magnitude}
        self.results = results
        # Tensors themselves where that can be: ONNX Runtime 1.32 breaks some graphs with an Identity before an output.
        self._outputs: dict[str, str] = {}
        surgeon.outputs = []
        for name, symbol in results.items():
            tensor = symbol.tensor
            if not tensor.inputs:
                tensor = gs.Variable(name, np.float32)
                surgeon.nodes.append(gs.Node("Identity", name, inputs=[symbol.tensor], outputs=[tensor]))
            self._outputs[name] = tensor.name
            if tensor not in surgeon.outputs:
                surgeon.outputs.append(tensor)
        surgeon.cleanup(remove_unused_graph_inputs=False).toposort()
        self.proto = gs.export_onnx(surgeon, do_type_check=False)
        self._inputs, self._dtype, self._options = graph.inputs, dtype, options

    @cached_property
    def _session(self) -> ReferenceSession | RuntimeSession:
        outputs = [o.name for o in self.proto.graph.output]
        if self._dtype == "float64":
            return ReferenceSession(self.proto, outputs)
        return RuntimeSession(self.proto, outputs, **self._options)

    def __call__(self, feeds: Mapping[str, np.ndarray], starts: Mapping[str, np.ndarray]) -> Flow:
        given = {name: feeds[name] for name in self._inputs}
        for name, r in starts.items():
            given[f"start of {name}"] = (r[0] if len(r) == 1 else r).astype(self._dtype)
        # A rule may divide by zero where it drops the quotient a line later.
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._unpacked(self._session.run(given))

    def _unpacked(self, out: Mapping[str, np.ndarray]) -> Flow:
        """Axes of targets that were left out put back."""
        arrays = {name: out[self._outputs[name]] for name in self.results}
        arrays = {name: a[None] if self.results[name].bare else a for name, a in arrays.items()}
        balances = [
            Balance(b.node, b.op_type, b.rule, *(arrays[f"{i} {what}"] for what in ("received", "handed", "magnitude")))
            for i, b in enumerate(self.balances)
        ]
        return Flow({name: arrays[f"relevance of {name}"] for name in self.found}, balances)


def carry(
    engine: str,
    graph: Graph,
    values: Mapping[str, np.ndarray],
    starts: Mapping[str, Array],
    layers: Sequence[str],
    composite: Composite,
    dtype: str = "float64",
) -> Flow:
    """`propagate` on the engine of that name; `values` holds the graph's inputs too."""
    if engine == "numpy":
        return propagate(graph, values, starts, layers, composite, ArrayOps(np, dtype))
    shapes = {name: r.shape for name, r in starts.items()}
    return RecordedWalk(graph, shapes, layers, composite, dtype)(values, starts)


class Walker:
    """A graph with the session that evaluates it: float64 by the reference evaluator, float32 by ONNX Runtime."""

    def __init__(
        self,
        graph: Graph | onnx.ModelProto,
        layers: Sequence[str],
        logits: str,
        dtype: str = "float64",
        engine: str = "numpy",
    ):
        self.graph = as_written(graph) if isinstance(graph, onnx.ModelProto) else graph
        self.layers, self.logits, self.dtype, self.engine = list(layers), logits, dtype, engine
        taps = needed_taps(self.graph, self.layers, logits)
        session = ReferenceSession if dtype == "float64" else RuntimeSession
        self._session = session(expose(self.graph, taps), taps)

    def forward(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Values of the tensors a walk needs, and of the graph's inputs."""
        return {**feeds, **self._session.run(feeds)}

    def back(self, values: dict[str, np.ndarray], start: np.ndarray, composite: Composite) -> Walk:
        starts = {self.logits: start}
        flow = carry(self.engine, self.graph, values, starts, self.layers, composite, self.dtype)
        return Walk(self.graph, values, flow)

    def __call__(self, feeds: Mapping[str, np.ndarray], start: np.ndarray, composite: Composite) -> Walk:
        return self.back(self.forward(feeds), start, composite)


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over largest reference value."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
