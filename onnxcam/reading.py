"""Read a model: a file, its bytes or a proto that is already in memory, checked until it can be canonised.

What cannot be read is refused in one line that says what the file seems to be and what to do. The ONNX checker is
stricter than any runtime; where it objects, ONNX Runtime has the last word. Local functions are inlined, external
data is loaded. Large weights are kept beside the proto, each once.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper as external
import onnx.inliner

from onnxcam.bfloat16 import widened
from onnxcam.errors import ModelError, UsageError
from onnxcam.runtime import onnxruntime
from onnxcam.unbatched import with_axis_of_images
from onnxcam.weights import Buffer, cut, emptied, is_stub, take

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
        proto: the model with its local functions inlined; large weights are stubs in it (see `weights`).
        path: where it was read from; None for bytes and protos.
        sha256: of the file's bytes (of the .onnx file only, where weights lie beside it), or of the serialised proto.
        metadata: the file's `metadata_props`.
        whole: True where `sha256` covers the weights.
        weights: the large weights by name.
        alone: inputs that take one picture in the file, and images along a first axis in `proto`.
    """

    proto: onnx.ModelProto
    path: Path | None
    sha256: str
    metadata: dict[str, str] = field(default_factory=dict)
    whole: bool = True
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    alone: frozenset[str] = frozenset()

    def content(self) -> str:
        """A hash of all that the model is, weights in other files included."""
        if self.whole:
            return self.sha256
        digest = hashlib.sha256(self.proto.SerializeToString(deterministic=True))
        for name, values in self.weights.items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()


def read(source: str | Path | bytes | onnx.ModelProto) -> ReadModel:
    """Read and check a model; a proto that is passed in is not changed.

    Raises:
        UsageError: there is no such file, or it is no ONNX model.
        ModelError: it is one, but broken, for training, or of an opset that is not supported.
    """
    path = None if isinstance(source, bytes | onnx.ModelProto) else Path(source)
    name = str(path) if path is not None else "the model"
    data: Buffer
    if isinstance(source, onnx.ModelProto):
        _check_outline(source, name)
        try:
            data = source.SerializeToString(deterministic=True)
        except Exception:  # protobuf's EncodeError, or ValueError: past 2 GB
            return _read_huge(source)
    else:
        data = source if isinstance(source, bytes) else _bytes_of(Path(source))
    with _Digest(data) as digest:
        proto, weights = _parse(data, name)
        _check_outline(proto, name)
        outside = any(_is_outside(tensor) for tensor in _tensors(proto))
        if outside:
            weights |= _load_weights(proto, path, name)
        _check(proto, path if path is not None else data, name)
    del data
    return _whole(ReadModel(proto, path, digest.hex, weights=weights, whole=not outside), name)


class _Digest:
    """The SHA-256 of some bytes, computed beside what is done meanwhile: a large file takes a while."""

    hex: str

    def __init__(self, data: Buffer):
        self._thread = threading.Thread(target=self._compute, args=(data,))

    def _compute(self, data: Buffer) -> None:
        self.hex = hashlib.sha256(data).hexdigest()

    def __enter__(self) -> _Digest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()


def _read_huge(proto: onnx.ModelProto) -> ReadModel:
    """A proto in memory that is larger than one message may be: weights are left where they are."""
    name = "the model"
    _check_outline(proto, name)
    if any(external.uses_external_data(tensor) for tensor in _tensors(proto)):
        _load_weights(proto, None, name)
    digest = hashlib.sha256()
    for part in (*proto.graph.initializer, *proto.graph.node):
        digest.update(part.SerializeToString(deterministic=True))
    return _whole(ReadModel(proto, None, digest.hexdigest()), name)


def _whole(model: ReadModel, name: str) -> ReadModel:
    proto = _inlined(model.proto, name) if model.proto.functions else model.proto
    proto, alone = with_axis_of_images(widened(proto))
    return replace(model, proto=proto, metadata={p.key: p.value for p in proto.metadata_props}, alone=alone)


def _bytes_of(path: Path) -> Buffer:
    """The bytes of a file, as long as they are needed: mapped, so that they are not held twice."""
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name the .onnx file in it")
    if path.suffix == ".ort":
        raise UsageError(f"{path} is an ONNX Runtime .ort file; explain the .onnx file it was made from")
    try:
        with path.open("rb") as stream:
            if not path.stat().st_size:
                return b""
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def _parse(data: Buffer, name: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The model and, apart from it, its large weights."""
    if not data:
        raise UsageError(f"{name} is empty; download or export it again")
    begun = bytes(data[:512])
    for offset, signature, kind, advice in SIGNATURES:
        if begun[offset : offset + len(signature)].lower() == signature.lower():
            raise UsageError(f"{name} is {kind}; {advice}")
    if _is_text(begun):
        raise UsageError(f"{name} is a text file, not an ONNX model")
    proto = onnx.ModelProto()
    try:
        rest, weights = cut(data)
        proto.ParseFromString(rest)
    except Exception as error:  # ValueError, or protobuf's DecodeError, by version and backend.
        raise ModelError(f"{name} is no ONNX model, or it is cut short; download or export it again") from error
    return proto, weights


def _is_text(start: bytes) -> bool:
    return all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)


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


def _is_outside(tensor: onnx.TensorProto) -> bool:
    return external.uses_external_data(tensor) and not is_stub(tensor)


def _load_weights(proto: onnx.ModelProto, path: Path | None, name: str) -> dict[str, np.ndarray]:
    """Load external data beside `path`; the large weights of the graph itself are returned, by name.

    Raises:
        UsageError: the data cannot be found from here.
        ModelError: a data file is too short.
    """
    if path is None:
        raise UsageError(f"{name} keeps its weights in another file; pass the path of the .onnx file instead")
    weights: dict[str, np.ndarray] = {}
    for tensor in filter(_is_outside, proto.graph.initializer):
        loaded = _loaded(tensor, path, name)
        if tensor.name not in weights and (values := take(loaded)) is not None:
            weights[tensor.name] = values
        tensor.CopyFrom(loaded)
    for tensor in filter(_is_outside, _tensors(proto)):
        tensor.CopyFrom(_loaded(tensor, path, name))
    return weights


def _loaded(tensor: onnx.TensorProto, path: Path, name: str) -> onnx.TensorProto:
    """The tensor with its data, which lies beside `path`."""
    info = external.ExternalDataInfo(tensor)
    if not (path.parent / info.location).exists():
        raise UsageError(f"{name} keeps weights in {info.location!r}, which is missing; put it into {path.parent}")
    loaded = onnx.TensorProto()
    loaded.CopyFrom(tensor)
    try:
        external.load_external_data_for_tensor(loaded, str(path.parent))
    except Exception as error:  # onnx raises ValidationError, ValueError or OSError, by version.
        raise ModelError(
            f"{name}: the weights {tensor.name!r} cannot be read from {info.location!r}: {_line(error)}"
        ) from error
    expected = _bytes_in(loaded)
    if expected is not None and len(loaded.raw_data) != expected:
        raise ModelError(
            f"{name}: {info.location!r} holds {len(loaded.raw_data)} of the {expected} bytes of {tensor.name!r}; "
            "it is cut short or belongs to another model"
        )
    loaded.data_location = onnx.TensorProto.DEFAULT
    del loaded.external_data[:]
    return loaded


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


def _check(proto: onnx.ModelProto, source: Path | Buffer, name: str) -> None:
    """Let the ONNX checker look at a model, and ONNX Runtime at its file or bytes where the checker objects.

    Large weights, whose sizes were found right, are spared it: it would copy them.
    """
    try:
        onnx.checker.check_model(emptied(proto))
    except Exception as error:  # ValidationError, but also UnicodeDecodeError, DecodeError, RuntimeError, ...
        try:
            _load_with_runtime(str(source) if isinstance(source, Path) else bytes(source))
        except UsageError:
            raise
        except Exception:  # ONNX Runtime's errors share no base.
            raise ModelError(f"{name} is no valid ONNX model: {_line(error)}") from error


def _load_with_runtime(source: str | bytes) -> None:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
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
