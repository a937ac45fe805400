"""One ONNX node as a whole model: its values from ONNX Runtime or the reference evaluator, and a walk over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from onnxcam.composites import COMPOSITES
from onnxcam.engines.array import array_ops
from onnxcam.graph import Graph, Node
from onnxcam.operators import lookup
from onnxcam.operators.kinds import At
from onnxcam.propagate import TapValues, propagate

Values = dict[str, np.ndarray]


def build(
    op: str,
    inputs: Sequence[np.ndarray | None],
    constants: Sequence[int] = (),
    outputs: int = 1,
    opset: int = 21,
    **attributes: Any,
) -> tuple[onnx.ModelProto, Values]:
    """A model of one node and what to feed it; inputs are named i0, i1, ..., outputs o0, o1, ..."""
    names = ["" if a is None else f"i{i}" for i, a in enumerate(inputs)]
    given = [(name, np.asarray(a)) for name, a in zip(names, inputs, strict=True) if a is not None]
    fixed = {f"i{i}" for i in constants}
    node = helper.make_node(op, names, [f"o{i}" for i in range(outputs)], name=op.lower(), **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in given
            if n not in fixed
        ],
        [onnx.ValueInfoProto(name=name) for name in node.output],
        [numpy_helper.from_array(a, n) for n, a in given if n in fixed],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return model, {n: a for n, a in given if n not in fixed}


def runtime(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime computes, without its graph optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


class Single:
    """A node with its values, on the float64 array engine.

    Args:
        model: a model of one node.
        feeds: its inputs.
        outputs: the values of the node's outputs.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        feeds: Mapping[str, np.ndarray],
        outputs: Sequence[np.ndarray],
        ops: Any = None,
    ):
        self.graph = Graph(gs.import_onnx(model))
        self.node: Node = self.graph.nodes[0]
        self.ops = ops or array_ops("numpy", "float64")
        self.taps = {**feeds, **dict(zip((o for o in self.node.outputs if o), outputs, strict=False))}
        self.at = At(self.node, TapValues(self.graph, self.taps, self.ops, {}))
        self.operator: Any = lookup(self.node)
        self.operand: int = getattr(self.operator, "operand", 0)

    def back(self, starts: Mapping[str, np.ndarray], composite: str = "gradient") -> Values:
        """Relevance of the model's inputs, (T, *shape) each."""
        flow = propagate(self.graph, self.taps, starts, self.graph.inputs, COMPOSITES[composite], self.ops)
        return {name: self.ops.to_host(r) for name, r in flow.relevance.items()}


def agree(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Assert equal shapes and a largest difference of `tolerance` times the largest magnitude."""
    assert got.shape == expected.shape
    if expected.size:
        assert np.abs(got - expected).max() <= tolerance * max(float(np.abs(expected).max()), 1e-30)


def cotangents(shape: Sequence[int], targets: int = 2) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((targets, *shape))


def check_map(model: onnx.ModelProto, feeds: Values) -> Single:
    """A linear or averaging operator computes what ONNX Runtime computes, and its product is the adjoint of that.

    ONNX Runtime computes in float32, hence 1e-5; the adjoint identity is tested in float64, to 1e-10.
    """
    expected = runtime(model, feeds)
    single = Single(model, feeds, expected)
    linear = single.operator.bind(single.at)
    z = linear.apply(linear.x, linear.weight)
    agree(z if linear.bias is None else z + linear.bias, np.asarray(expected[0], np.float64), 1e-5)
    check_adjoint(single, {single.node.outputs[0]: z}, {single.node.inputs[single.operand]: linear.x})
    return single


def check_moves(model: onnx.ModelProto, feeds: Values, outputs: Sequence[int] = (0,)) -> Single:
    """An operator that only moves entries: <y, u> = <x, back(u)> with y as ONNX Runtime has it, exact but for sums."""
    expected = runtime(model, feeds)
    single = Single(model, feeds, expected)
    ys = {f"o{i}": np.asarray(expected[i], np.float64) for i in outputs}
    check_adjoint(single, ys, {name: x for name, x in feeds.items() if x.dtype.kind == "f"})
    return single


def check_adjoint(single: Single, ys: Mapping[str, np.ndarray], xs: Mapping[str, np.ndarray]) -> None:
    us = {name: cotangents(y.shape) for name, y in ys.items()}
    back = single.back(us)
    left = sum((y * us[name]).reshape(2, -1).sum(1) for name, y in ys.items())
    right, scale = np.zeros(2), 1e-30
    for name, x in xs.items():
        if name in back:
            assert back[name].shape == (2, *x.shape)
            right = right + (back[name] * x.astype(np.float64)).reshape(2, -1).sum(1)
            scale += float(np.linalg.norm(x) * np.linalg.norm(back[name]))
    assert np.abs(left - right).max() <= 1e-10 * scale
