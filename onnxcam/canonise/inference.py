"""Shapes and dtypes of all tensors, from the inputs alone: ONNX shape inference, then ONNX Runtime for what is left.

Weights play no part in a shape, so inference runs on a skeleton in which large constants are inputs of their type: it
costs the same for a model of 4 MB and of 4 GB, and protobuf's limit of 2 GB is never met. Operators of other domains
(`com.microsoft`) have no ONNX schema; ONNX Runtime, which has to be able to run them anyway, is asked about those.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnxcam.canonise.evaluate import opsets, session

# Constants up to this many elements may be shapes, axes or indices, whose values shape inference needs.
SMALL = 4096

# Types without a NumPy counterpart, which graph-surgeon carries as the number of the ONNX type.
FOREIGN_TYPES = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
)

RUNTIME_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int16)": np.int16,
    "tensor(uint16)": np.uint16,
    "tensor(int32)": np.int32,
    "tensor(uint32)": np.uint32,
    "tensor(int64)": np.int64,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}


def infer(graph: gs.Graph) -> None:
    """Write the shape and dtype of every tensor that ONNX shape inference can tell; the others have shape None."""
    variables = {name: t for name, t in graph.tensors().items() if isinstance(t, gs.Variable)}
    for tensor in _inner(graph):
        tensor.shape = None
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton(graph), data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return
    inputs = {t.name for t in graph.inputs}
    for info in (*inferred.graph.value_info, *inferred.graph.output):
        tensor = variables.get(info.name)
        if tensor is None or info.name in inputs or not info.type.HasField("tensor_type"):
            continue
        kind = info.type.tensor_type
        if kind.elem_type:
            tensor.dtype = _numpy_type(kind.elem_type)
        if kind.HasField("shape"):
            tensor.shape = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in kind.shape.dim]


def ask_runtime(graph: gs.Graph) -> None:
    """Ask ONNX Runtime about the tensors whose shape or dtype `infer` could not tell."""
    unknown = {t.name: t for t in _inner(graph) if t.shape is None or t.dtype is None}
    if not unknown:
        return
    model = skeleton(graph)
    have = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in unknown if name not in have)
    try:
        described = session(model).get_outputs()
    except Exception:  # ONNX Runtime's errors share no base; a model it cannot load simply stays unknown here.
        return
    for output in described:
        tensor = unknown.get(output.name)
        if tensor is None or output.type not in RUNTIME_TYPES:
            continue
        tensor.dtype = np.dtype(RUNTIME_TYPES[output.type])
        # ONNX Runtime says [] for a scalar and for an unknown rank alike.
        if tensor.shape is None and output.shape:
            tensor.shape = list(output.shape)


def skeleton(graph: gs.Graph) -> onnx.ModelProto:
    """The model of `graph`, its inner shapes left out, with every large constant turned into an input of its type."""
    inputs: list[gs.Tensor] = list(graph.inputs)
    weights: list[gs.Constant] = []
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant):
            large = np.prod(tensor.shape, dtype=np.int64) > SMALL
            (inputs if large else weights).append(tensor)
    proto = onnx.helper.make_graph(
        [OnnxExporter.export_node(node) for node in graph.nodes],
        graph.name or "graph",
        [OnnxExporter.export_value_info_proto(tensor, do_type_check=False) for tensor in inputs],
        [OnnxExporter.export_value_info_proto(tensor, do_type_check=False) for tensor in graph.outputs],
        [OnnxExporter.export_tensor_proto(tensor) for tensor in weights],
    )
    return onnx.helper.make_model(proto, opset_imports=opsets(graph), ir_version=graph.ir_version)


def _inner(graph: gs.Graph) -> list[gs.Variable]:
    inputs = {id(t) for t in graph.inputs}
    return [t for t in graph.tensors().values() if isinstance(t, gs.Variable) and id(t) not in inputs]


def _numpy_type(elem_type: int) -> np.dtype | int:
    return elem_type if elem_type in FOREIGN_TYPES else onnx.helper.tensor_dtype_to_np_dtype(elem_type)


def spell_out_axes(graph: gs.Graph) -> None:
    """Write down the axes of MeanVarianceNormalization: without them no inference gives its output a shape."""
    for node in graph.nodes:
        if node.op == "MeanVarianceNormalization":
            node.attrs.setdefault("axes", [0, 2, 3])
