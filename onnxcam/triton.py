"""A compiled explanation as a Triton model repository: NAME/config.pbtxt and NAME/1/model.onnx.

Triton serves such a folder as it is, and so does KServe's Triton runtime. Where the file leaves its batch open, Triton
counts the first axis as its own and may put requests together; where the batch is fixed, that axis is one of the dims.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from onnxcam.compile import Compiled
from onnxcam.errors import ModelError
from onnxcam.files import safe_name, writable_folder, write_atomically

MAX_BATCH = 8
TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.DOUBLE: "TYPE_FP64",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.INT8: "TYPE_INT8",
    onnx.TensorProto.INT32: "TYPE_INT32",
    onnx.TensorProto.INT64: "TYPE_INT64",
}


def save_triton(compiled: Compiled, repository: str | Path, name: str, max_batch: int = MAX_BATCH) -> list[Path]:
    """Write version 1 of the model `name` into a model repository; returns the files, the configuration last.

    Raises:
        UsageError: the repository cannot be written to.
        ModelError: an input or output has a type that Triton does not know.
    """
    name = safe_name(name)
    text = config(compiled.cut, name, max_batch)
    folder = Path(repository) / name
    model = compiled.save(writable_folder(folder / "1") / "model.onnx")
    return [model, write_atomically(folder / "config.pbtxt", lambda stream: stream.write(text.encode()))]


def config(proto: onnx.ModelProto, name: str, max_batch: int = MAX_BATCH) -> str:
    """The text of config.pbtxt."""
    values = [*proto.graph.input, *proto.graph.output]
    batched = all(v.type.tensor_type.shape.dim[0].dim_param for v in values)
    lines = [
        f"name: {json.dumps(name)}",
        'platform: "onnxruntime_onnx"',
        f"max_batch_size: {max_batch if batched else 0}",
    ]
    for side, members in (("input", proto.graph.input), ("output", proto.graph.output)):
        entries = ",\n".join(_tensor(v, batched) for v in members)
        lines.append(f"{side} [\n{entries}\n]")
    return "\n".join(lines) + "\n"


def _tensor(value: onnx.ValueInfoProto, batched: bool) -> str:
    kind = value.type.tensor_type
    if kind.elem_type not in TYPES:
        name = onnx.TensorProto.DataType.Name(kind.elem_type)
        raise ModelError(f"{value.name!r} is {name}, which Triton does not serve")
    dims = [str(d.dim_value if d.HasField("dim_value") else -1) for d in kind.shape.dim][int(batched) :]
    fields = f"name: {json.dumps(value.name)}\n    data_type: {TYPES[kind.elem_type]}\n    dims: [ {', '.join(dims)} ]"
    return f"  {{\n    {fields}\n  }}"
