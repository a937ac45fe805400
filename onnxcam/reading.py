"""Read a model: a file, its bytes or a proto that is already in memory, checked until it can be canonised.

What cannot be read is refused in one line that says what the file seems to be and what to do. The ONNX checker is
stricter than any runtime; where it objects, ONNX Runtime has the last word. Local functions are inlined, external
data is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper as external
import onnx.inliner

from onnxcam.errors import ModelError, UsageError
from onnxcam.runtime import onnxruntime

OLDEST_OPSET = 7
TRAINING_DOMAINS = frozenset(("ai.onnx.training", "ai.onnx.preview.training"))

# The first bytes of files that are taken for ONNX models: (offset, bytes, what it is, what to do).
SIGNATURES = (
    (4, b"ORTM", "an ONNX Runtime .ort file", "explain the .onnx file it was made from"),
    (4, b"TFL3", "a TensorFlow Lite file", "convert it: python -m tf2onnx.convert --tflite MODEL --output model.onnx"),
    (0, b"PK\x03\x04", "a zip archive (a PyTorch checkpoint or a .keras file?)", "export the model to ONNX"),
    (0, b"\x89HDF", "an HDF5 file (Keras weights?)", "export the model to ONNX"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the model itself", "fetch the model: git lfs pull"),
    (0, b"<!DOCTYPE", "an HTML page", "download the model itself"),
    (0, b"<html", "an HTML page", "download the model itself"),
)


@dataclass(frozen=True)
class ReadModel:
    """A model that has been read and found sound.

    Attributes:
        proto: the model with its weights in memory and its local functions inlined.
        path: where it was read from; None for bytes and protos.
        sha256: of the file's bytes (of the .onnx file only, where weights lie beside it), or of the serialised proto.
        metadata: the file's `metadata_props`.
        whole: True where `sha256` covers the weights.
    """

    proto: onnx.ModelProto
    path: Path | None
    sha256: str
    metadata: dict[str, str] = field(default_factory=dict)
    whole: bool = True


def read(source: str | Path | bytes | onnx.ModelProto) -> ReadModel:
    """Read and check a model; a proto that is passed in is not changed.

    Raises:
        UsageError: there is no such file, or it is no ONNX model.
        ModelError: it is one, but broken, for training, or of an opset that is not supported.
    """
    if isinstance(source, onnx.ModelProto):
        proto, path, sha256, name, data = source, None, hash_proto(source), "the model", None
    elif isinstance(source, bytes):
        proto, path, name, data = _parse(source, "the model"), None, "the model", source
        sha256 = hashlib.sha256(source).hexdigest()
    else:
        path = Path(source)
        name = str(path)
        data = _bytes_of(path)
        sha256 = hashlib.sha256(data).hexdigest()
        proto = _parse(data, name)
    _check_outline(proto, name)
    outside = any(external.uses_external_data(tensor) for tensor in _tensors(proto))
    if outside:
        _load_weights(proto, path, name)
    _check(proto, path if outside else None, data, name)
    del data
    if proto.functions:
        proto = _inlined(proto, name)
    return ReadModel(proto, path, sha256, {p.key: p.value for p in proto.metadata_props}, not outside)


def _bytes_of(path: Path) -> bytes:
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name the .onnx file in it")
    if path.suffix == ".ort":
        raise UsageError(f"{path} is an ONNX Runtime .ort file; explain the .onnx file it was made from")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _parse(data: bytes, name: str) -> onnx.ModelProto:
    if not data:
        raise UsageError(f"{name} is empty; download or export it again")
    for offset, signature, kind, advice in SIGNATURES:
        if data[offset : offset + len(signature)].lower() == signature.lower():
            raise UsageError(f"{name} is {kind}; {advice}")
    if _is_text(data[:512]):
        raise UsageError(f"{name} is a text file, not an ONNX model")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, or ValueError, by version and backend.
        raise ModelError(f"{name} is no ONNX model, or it is cut short; download or export it again") from error
    return proto


def _is_text(start: bytes) -> bool:
    return all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)


def hash_proto(proto: onnx.ModelProto) -> str:
    """SHA-256 of a model with its weights in memory."""
    try:
        return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    except Exception:  # protobuf's EncodeError, or ValueError: past 2 GB, so weights and nodes one by one.
        digest = hashlib.sha256()
        for tensor in proto.graph.initializer:
            digest.update(tensor.SerializeToString(deterministic=True))
        for node in proto.graph.node:
            digest.update(node.SerializeToString(deterministic=True))
        return digest.hexdigest()


def _check_outline(proto: onnx.ModelProto, name: str) -> None:
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if not proto.HasField("graph") or not opsets or not proto.graph.output:
        raise ModelError(f"{name} is no ONNX model, or it is cut short: it has no graph, no outputs or no opset")
    if not proto.graph.node:
        raise ModelError(f"{name} has no nodes; there is nothing to explain")
    for node in proto.graph.node:
        if node.domain in TRAINING_DOMAINS:
            raise ModelError(f"{name}: {node.op_type} {node.name!r} is for training; export the model for inference")
    opset = opsets.get("", opsets.get("ai.onnx"))
    newest = onnx.defs.onnx_opset_version()
    if opset is None:
        raise ModelError(f"{name} does not say which opset of ONNX it uses; export it again")
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"{name} uses opset {opset}; the oldest one supported is {OLDEST_OPSET}: convert it with "
            f"onnx.version_converter.convert_version(model, 13), or export it again"
        )
    if opset > newest:
        raise ModelError(
            f"{name} uses opset {opset}, and the onnx {onnx.__version__} installed here knows {newest} at most: "
            f"upgrade onnx, or export the model with opset {newest}"
        )


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    def of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
        yield from graph.initializer
        yield from within(graph.node)

    def within(nodes: object) -> Iterator[onnx.TensorProto]:
        for node in nodes:  # type: ignore[attr-defined]
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                for graph in (attribute.g, *attribute.graphs):
                    yield from of(graph)

    yield from of(proto.graph)
    for function in proto.functions:
        yield from within(function.node)


def _load_weights(proto: onnx.ModelProto, path: Path | None, name: str) -> None:
    """Load external data beside `path`.

    Raises:
        UsageError: the data cannot be found from here.
        ModelError: a data file is too short.
    """
    if path is None:
        raise UsageError(f"{name} keeps its weights in another file; pass the path of the .onnx file instead")
    base = str(path.parent)
    for tensor in _tensors(proto):
        if not external.uses_external_data(tensor):
            continue
        info = external.ExternalDataInfo(tensor)
        beside = path.parent / info.location
        if not beside.exists():
            raise UsageError(f"{name} keeps weights in {info.location!r}, which is missing; put it into {path.parent}")
        try:
            external.load_external_data_for_tensor(tensor, base)
        except Exception as error:  # onnx raises ValidationError, ValueError or OSError, by version.
            raise ModelError(
                f"{name}: the weights {tensor.name!r} cannot be read from {info.location!r}: {_line(error)}"
            ) from error
        expected = _bytes_in(tensor)
        if expected is not None and len(tensor.raw_data) != expected:
            raise ModelError(
                f"{name}: {info.location!r} holds {len(tensor.raw_data)} of the {expected} bytes of {tensor.name!r}; "
                "it is cut short or belongs to another model"
            )
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _bytes_in(tensor: onnx.TensorProto) -> int | None:
    try:
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):
        return None
    if tensor.data_type in PACKED:
        return None
    return size * int(np.prod(tensor.dims, dtype=np.int64))


# Types whose elements are smaller than a byte.
PACKED = frozenset(
    getattr(onnx.TensorProto, kind)
    for kind in ("UINT4", "INT4", "FLOAT4E2M1", "UINT2", "INT2")
    if hasattr(onnx.TensorProto, kind)
)


def _check(proto: onnx.ModelProto, path: Path | None, data: bytes | None, name: str) -> None:
    """Let the ONNX checker look at the model, and ONNX Runtime where the checker objects.

    `path` is given where weights lie beside the file, `data` where the proto was parsed from bytes.
    """
    try:
        onnx.checker.check_model(str(path) if path is not None else data or proto)
    except Exception as error:  # ValidationError, but also UnicodeDecodeError, DecodeError, RuntimeError, ...
        try:
            _load_with_runtime(proto, path)
        except UsageError:
            raise
        except Exception:  # ONNX Runtime's errors share no base.
            raise ModelError(f"{name} is no valid ONNX model: {_line(error)}") from error


def _load_with_runtime(proto: onnx.ModelProto, path: Path | None) -> None:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = proto.SerializeToString() if path is None else str(path)
    ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _inlined(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    try:
        return onnx.inliner.inline_local_functions(proto)
    except Exception as error:  # by version of onnx
        raise ModelError(f"{name}: its local functions cannot be inlined: {_line(error)}") from error


def _line(error: Exception) -> str:
    """The first telling line of an error's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
