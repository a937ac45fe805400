"""Does a model scale its pixels itself? What the graph does to its input first says which range of pixels it wants.

Keras puts Rescaling and Normalization layers in front, and preprocessing is often exported along with a model: Sub,
Div, Mul or BatchNormalization by constants stand before the first convolution then, perhaps behind a Cast, a Resize or
a Transpose. Together they are one affine map for each channel. Of the ranges that pixels usually come in, the one meant
is that which the map centres best and brings nearest to the size that networks are trained on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx

_MOVES = {"Cast", "Identity", "Transpose", "Resize", "Upsample", "Unsqueeze", "Squeeze", "Reshape", "Slice", "Dropout"}
_RANGES = {255: (0.0, 255.0), 1: (0.0, 1.0), None: (-2.1, 2.6)}  # None: normalised already, by the usual mean and std
_SPANS = (0.5, 300.0)  # from the dark to the bright end of a pixel, as networks see it
_USUAL = 4.0


def pixels_wanted(graph: onnx.GraphProto, name: str) -> int | None:
    """255 or 1 where the graph begins by scaling pixels of 0..255 or 0..1 in its input `name`; None where it does not.

    Large weights may be stubs: only the few numbers of a scaling are looked at.
    """
    found = _affine(graph, name)
    if found is None:
        return None
    scale, shift = found
    fits = {}
    for pixels, (low, high) in _RANGES.items():
        ends = np.array([scale * low + shift, scale * high + shift])
        span = float(np.abs(ends[1] - ends[0]).mean())
        if _SPANS[0] <= span <= _SPANS[1]:
            fits[pixels] = float(np.abs(ends.mean(0)).mean()) / span + abs(np.log(span / _USUAL))
    return min(fits, key=lambda pixels: fits[pixels]) if fits else None


def _affine(graph: onnx.GraphProto, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and shift of each channel before anything else happens; None where there is no such thing."""
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for tensor in dict.fromkeys(node.input):
            readers[tensor].append(node)
    constants = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    scale, shift, scaled = np.ones(1), np.zeros(1), False
    while len(readers[name]) == 1:
        node = readers[name][0]
        values = [_value(constants.get(other)) for other in node.input]
        if node.op_type in _MOVES and node.input[0] == name:
            pass
        elif node.op_type in ("Sub", "Add", "Mul", "Div") and len(values) == 2:
            i = list(node.input).index(name)
            value = values[1 - i]
            if value is None or (i == 1 and node.op_type == "Div"):
                break
            if node.op_type in ("Mul", "Div"):
                factor = value if node.op_type == "Mul" else 1 / value
                scale, shift = scale * factor, shift * factor
            elif node.op_type == "Add" or i == 0:
                shift = shift + (value if node.op_type == "Add" else -value)
            else:
                scale, shift = -scale, value - shift
            scaled = True
        elif node.op_type == "BatchNormalization" and all(v is not None for v in values[1:]):
            gain, bias, mean, var = (np.asarray(v) for v in values[1:5])
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            factor = gain / np.sqrt(var + epsilon)
            scale, shift, scaled = scale * factor, (shift - mean) * factor + bias, True
        else:
            break
        name = node.output[0]
    scale, shift = np.broadcast_arrays(scale, shift)
    return (scale, shift) if scaled and np.isfinite([scale, shift]).all() else None


def _value(tensor: onnx.TensorProto | None) -> np.ndarray | None:
    """One number for each channel, or one for all; None for what is no constant of that kind."""
    if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL or not _few(tensor.dims):
        return None
    try:
        array = np.asarray(onnx.numpy_helper.to_array(tensor), np.float64).ravel()
    except (TypeError, ValueError):
        return None
    return array if array.size else None


def _few(dims: Sequence[int]) -> bool:
    return int(np.prod(dims, dtype=np.int64)) in (1, 3) and sum(n != 1 for n in dims) <= 1
