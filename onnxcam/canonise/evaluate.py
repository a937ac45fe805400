"""The values of nodes that depend on constants only, computed by ONNX Runtime.

All of them in one session; where that fails, because one operator is unknown to the runtime or the opset is too new,
node by node, and what ONNX Runtime cannot compute by the reference implementation that comes with onnx. A node that
nobody can compute stays a node.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcam.runtime import onnxruntime


def session(model: onnx.ModelProto) -> Any:
    """A quiet session on the CPU that runs `model` as it is written, without fusions."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def evaluate(graph: gs.Graph, nodes: Sequence[gs.Node], wanted: Sequence[gs.Tensor]) -> dict[str, np.ndarray]:
    """Values of `wanted`, by name, computed from `nodes`: all that lead to them, in topological order.

    Where the nodes cannot be computed together, every value that can be computed alone is returned, wanted or not.
    """
    try:
        return _run(_part(graph, nodes, wanted))
    except Exception:  # ONNX Runtime's and protobuf's errors share no base.
        return _one_by_one(graph, nodes)


def _one_by_one(graph: gs.Graph, nodes: Sequence[gs.Node]) -> dict[str, np.ndarray]:
    known: dict[str, np.ndarray] = {}
    for node in nodes:
        names = {t.name for t in node.inputs if not t.is_empty() and not isinstance(t, gs.Constant)}
        if not names <= known.keys():
            continue
        inputs = [gs.Constant(t.name, known[t.name]) if t.name in names else _twin(t) for t in node.inputs]
        outputs = [_twin(t) for t in node.outputs]
        alone = gs.Node(node.op, node.name, dict(node.attrs), inputs, outputs, domain=node.domain)
        part = _part(graph, [alone], [t for t in outputs if not t.is_empty()])
        for run in (_run, _reference):
            try:
                known.update(run(part))
                break
            except Exception:  # see above
                continue
    return known


def _twin(tensor: gs.Tensor) -> gs.Tensor:
    return gs.Constant(tensor.name, tensor._values) if isinstance(tensor, gs.Constant) else gs.Variable(tensor.name)


def opsets(graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    """The opsets `graph` imports, as a list of its own: graph surgeon's export appends to the one it is given."""
    return list(graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)])


def _part(graph: gs.Graph, nodes: Sequence[gs.Node], wanted: Sequence[gs.Tensor]) -> onnx.ModelProto:
    versions = {"opset": graph.opset, "import_domains": opsets(graph), "ir_version": graph.ir_version}
    model = gs.export_onnx(gs.Graph(list(nodes), [], list(wanted), **versions), do_type_check=False)
    del model.graph.value_info[:]
    return model


def _run(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    names = [output.name for output in model.graph.output]
    return _arrays(names, session(model).run(names, {}))


def _reference(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    from onnx.reference import ReferenceEvaluator  # slow to import, and seldom needed

    names = [output.name for output in model.graph.output]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _arrays(names, list(ReferenceEvaluator(model).run(names, {})))


def _arrays(names: list[str], values: Sequence[object]) -> dict[str, np.ndarray]:
    if not all(isinstance(value, (np.ndarray, np.generic)) for value in values):
        raise TypeError("a constant that is no tensor")
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
