"""Weights beside the model: the large initialisers of a file as arrays, held once, and the rest as a small proto.

A proto that holds the weights is copied whole by whatever parses, edits or checks it. So they are cut out of the bytes
of the file before those are parsed (the wire format of protobuf: a field is a number, a type, and for what matters here
a length), and each leaves a tensor behind that keeps its name, type and shape and says that its data lies elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

LARGE = 4096  # bytes from which on a weight is worth keeping beside the model
ALIGNMENT = 64  # bytes
ELSEWHERE = "onnxcam"  # the external location that tensors without their data name

Buffer = bytes | memoryview

# Field numbers, from onnx.proto.
_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
_RAW_DATA = TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number
_BYTES = 2  # the wire type of what has a length: messages, strings, bytes

# Types that lie in a file as they lie in NumPy.
PLAIN = {
    getattr(TensorProto, name): np.dtype(kind).newbyteorder("<")
    for name, kind in {
        "FLOAT": "f4", "DOUBLE": "f8", "FLOAT16": "f2", "INT8": "i1", "INT16": "i2", "INT32": "i4", "INT64": "i8",
        "UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8", "BOOL": "?",
    }.items()
}  # fmt: skip


def cut(data: Buffer) -> tuple[bytes, dict[str, np.ndarray]]:
    """The model of a file without its large weights, and those by name.

    Raises:
        ValueError: the bytes are no protobuf message.
    """
    found: dict[str, np.ndarray] = {}
    rest = _without(memoryview(data), (_GRAPH, _INITIALIZER), found)
    return rest, _copied(found)


def _copied(views: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays over a file's bytes as arrays of their own, aligned as runtimes want it and safe from a file that changes.

    One block of memory holds them all: to ask the system for it at once takes a third of the time.
    """
    ends = np.cumsum([-(-view.nbytes // ALIGNMENT) * ALIGNMENT for view in views.values()], dtype=np.int64)
    block = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    copies = {}
    for (name, view), begin in zip(views.items(), [0, *ends], strict=False):
        part = block[begin : begin + view.nbytes]
        part[:] = view.reshape(-1).view(np.uint8)
        copies[name] = part.view(view.dtype).astype(view.dtype.newbyteorder("="), copy=False).reshape(view.shape)
    return copies


def pieces(data: Buffer, weights: Mapping[str, np.ndarray]) -> list[Buffer]:
    """The bytes of a cut model made whole again, in pieces, so that no weight is copied to write it."""
    out = _filled(memoryview(data), (_GRAPH, _INITIALIZER), weights)
    return [memoryview(data)] if out is None else out


def stub(name: str, values: np.ndarray) -> TensorProto:
    """A tensor of that name, type and shape whose data lies elsewhere."""
    kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor = TensorProto(name=name, dims=values.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", ELSEWHERE), ("offset", "0"), ("length", str(values.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def is_stub(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL and any(
        e.key == "location" and e.value == ELSEWHERE for e in tensor.external_data
    )


def attach(graph: gs.Graph, weights: Mapping[str, np.ndarray]) -> gs.Graph:
    """Give the constants of a graph that was made of a cut model their values; in place."""
    for part in (graph, *graph.subgraphs(recursive=True)):  # a branch may be all that reads a weight
        for name, tensor in part.tensors().items():
            if isinstance(tensor, gs.Constant) and name in weights:
                tensor.values = weights[name]
                tensor.data_location = None
    return graph


def _without(message: memoryview, path: tuple[int, ...], weights: dict[str, np.ndarray]) -> bytes:
    """The message with the large tensors along `path` (of fields) replaced by stubs."""
    parts: list[bytes | memoryview] = []
    kept = 0  # where what is copied as it is begins
    for field, wire, start, begin, end in _fields(message):
        if field != path[0] or wire != _BYTES or (len(path) == 1 and end - begin < LARGE):
            continue
        inner = message[begin:end]
        new = _without(inner, path[1:], weights) if len(path) > 1 else _taken(inner, weights)
        if new is not None:
            parts += [message[kept:start], _varint(field << 3 | _BYTES), _varint(len(new)), new]
            kept = end
    parts.append(message[kept:])
    return b"".join(parts)


def _taken(message: memoryview, weights: dict[str, np.ndarray]) -> bytes | None:
    """A tensor's stub, its values put into `weights`; None where it stays as it is."""
    rest: list[memoryview] = []
    raw: memoryview | None = None
    kept = 0
    for field, wire, start, begin, end in _fields(message):
        if field == _RAW_DATA and wire == _BYTES:
            rest.append(message[kept:start])
            kept, raw = end, message[begin:end]
    if raw is None or len(raw) < LARGE:
        return None
    tensor = TensorProto.FromString(b"".join([*rest, message[kept:]]))
    values = _view(tensor, raw)
    if values is None or tensor.name in weights:
        return None
    weights[tensor.name] = values
    return stub(tensor.name, values).SerializeToString()


def take(tensor: TensorProto) -> np.ndarray | None:
    """The values of a large tensor, which becomes a stub; None where it stays as it is."""
    view = _view(tensor, memoryview(tensor.raw_data)) if len(tensor.raw_data) >= LARGE else None
    if view is None:
        return None
    values = view.astype(view.dtype.newbyteorder("="))
    tensor.CopyFrom(stub(tensor.name, values))
    return values


def emptied(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which stubs are tensors of no elements: it passes for whole where nobody asks for shapes."""
    out = onnx.ModelProto()
    out.CopyFrom(proto)
    for tensor in filter(is_stub, out.graph.initializer):
        tensor.CopyFrom(TensorProto(name=tensor.name, dims=[0], data_type=tensor.data_type))
    return out


def _view(tensor: TensorProto, raw: memoryview) -> np.ndarray | None:
    dtype = PLAIN.get(tensor.data_type)
    if dtype is None or not tensor.name or min(tensor.dims, default=1) < 0:
        return None
    if int(np.prod(tensor.dims, dtype=np.int64)) * dtype.itemsize != len(raw):
        return None  # the checker says what is wrong with it
    return np.frombuffer(raw, dtype).reshape(tuple(tensor.dims))


def _filled(message: memoryview, path: tuple[int, ...], weights: Mapping[str, np.ndarray]) -> list[Buffer] | None:
    """The message with the stubs along `path` (of fields) given their data back; None if there is none."""
    parts: list[Buffer] = []
    kept = 0
    for field, wire, start, begin, end in _fields(message):
        if field != path[0] or wire != _BYTES:
            continue
        inner = message[begin:end]
        new = _filled(inner, path[1:], weights) if len(path) > 1 else _given_back(inner, weights)
        if new is not None:
            length = sum(len(part) for part in new)
            parts += [message[kept:start], _varint(field << 3 | _BYTES), _varint(length), *new]
            kept = end
    return [*parts, message[kept:]] if parts else None


def _given_back(message: memoryview, weights: Mapping[str, np.ndarray]) -> list[Buffer] | None:
    """The tensor of a stub, its data last."""
    if len(message) >= LARGE:
        return None
    tensor = TensorProto.FromString(bytes(message))
    if not is_stub(tensor) or tensor.name not in weights:
        return None
    values = weights[tensor.name]
    raw = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    head = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    return [head.SerializeToString(), _varint(_RAW_DATA << 3 | _BYTES), _varint(raw.nbytes), raw.data]


def _fields(message: memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """(field, wire type, where it starts, where its content begins, where it ends) of every field of a message."""
    at, size = 0, len(message)
    while at < size:
        start = at
        key, at = _read_varint(message, at)
        wire = key & 7
        if wire == _BYTES:
            length, begin = _read_varint(message, at)
            at = begin + length
        elif wire == 0:
            begin = at
            _, at = _read_varint(message, at)
        elif wire in (1, 5):
            begin, at = at, at + (8 if wire == 1 else 4)
        else:
            raise ValueError("a group, or no protobuf message")
        if at > size:
            raise ValueError("cut short")
        yield key >> 3, wire, start, begin, at


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("cut short")
        byte = message[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
