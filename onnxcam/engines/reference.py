"""The reference session: the onnx package's own evaluator, in float64 throughout; slow and exact, for checks.

ONNX Runtime lacks many kernels for float64. Where the evaluator loops in Python or goes wrong, the array engine stands
in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


class ReferenceSession:
    """The onnx package's reference evaluator, in float64 throughout: slow and exact, for checks."""

    def __init__(self, model: onnx.ModelProto, taps: Sequence[str]):
        from onnx.reference import ReferenceEvaluator

        self._taps = tuple(taps)
        self._evaluator = ReferenceEvaluator(in_double(model), new_ops=_replacements())
        self.providers = ["onnx.reference"]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        doubled = {k: v.astype(np.float64) if v.dtype.kind == "f" else v for k, v in feeds.items()}
        return dict(zip(self._taps, self._evaluator.run(None, doubled), strict=True))


def in_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every float tensor, attribute and cast in float64."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}

    def widen(tensor: onnx.TensorProto) -> None:
        if tensor.data_type in floats:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    def visit(graph: onnx.GraphProto) -> None:
        del graph.value_info[:]
        for tensor in graph.initializer:
            widen(tensor)
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type in floats:
                value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    widen(attribute.t)
                elif attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g)
                elif node.op_type == "Cast" and attribute.name == "to" and attribute.i in floats:
                    attribute.i = onnx.TensorProto.DOUBLE

    visit(double.graph)
    return double


def _replacements() -> list[Any]:
    """Ops of the reference evaluator that loop in Python, round to float32 or go wrong, on the array engine instead."""
    from onnx.reference.op_run import OpRun
    from onnx.reference.ops.op_conv_transpose import ConvTranspose as ReferenceConvTranspose
    from onnx.reference.ops.op_max_pool import MaxPool as ReferenceMaxPool

    from onnxcam.engines.array import ArrayOps
    from onnxcam.engines.reference_rounding import rounding_ops
    from onnxcam.engines.window import Window, resolve_conv, resolve_pool

    ops = ArrayOps(np, "float64")
    erf = np.vectorize(math.erf, otypes=[np.float64])

    class Conv(OpRun):
        op_domain = ""

        def _run(  # type: ignore[no-untyped-def]
            self, X, W, B=None, auto_pad=None, dilations=None, group=None, kernel_shape=None, pads=None, strides=None
        ):
            window = resolve_conv(X.shape[2:], W.shape[2:], auto_pad or "NOTSET", dilations, pads, strides)
            y = ops.conv(X, W, window, group or 1)
            return (y if B is None else y + B.reshape(-1, *(1,) * window.rank),)

    class ConvTranspose(ReferenceConvTranspose):
        """The evaluator's own fails on groups (onnx 1.23)."""

        op_domain = ""

        def _run(  # type: ignore[no-untyped-def]
            self, X, W, B=None, auto_pad=None, dilations=None, group=None, kernel_shape=None, output_padding=None,
            output_shape=None, pads=None, strides=None,
        ):  # fmt: skip
            if output_shape or (auto_pad or "NOTSET") != "NOTSET":
                return super()._run(
                    X, W, B, auto_pad, dilations, group, kernel_shape, output_padding, output_shape, pads, strides
                )
            window = resolve_conv((), W.shape[2:], "NOTSET", dilations, pads, strides)
            edges = zip(
                X.shape[2:], window.strides, window.extent, window.begin, window.end,
                output_padding or (0,) * window.rank, strict=True,
            )  # fmt: skip
            size = [(n - 1) * s + x - b - e + extra for n, s, x, b, e, extra in edges]
            y = ops.conv_adjoint(X, W, window, size, group or 1)
            return (y if B is None else y + B.reshape(-1, *(1,) * window.rank),)

    class MaxPool(ReferenceMaxPool):
        op_domain = ""

        def _run(  # type: ignore[no-untyped-def, override]
            self, x, auto_pad=None, ceil_mode=None, dilations=None, kernel_shape=None, pads=None, storage_order=None,
            strides=None,
        ):  # fmt: skip
            if x.dtype.kind != "f":
                return super()._run(x, auto_pad, ceil_mode, dilations, kernel_shape, pads, storage_order, strides)
            window, _ = resolve_pool(
                x.shape[2:], kernel_shape, bool(ceil_mode), auto_pad or "NOTSET", dilations, pads, strides
            )
            y = ops.window_max(x, window)
            # The evaluator's own Indices are wrong where all strides are 1 (onnx 1.23).
            return (y,) if len(self.onnx_node.output) == 1 else (y, _places(x, window))

    def _places(x: Any, window: Window) -> np.ndarray:
        """The flat index into `x` of the first maximum of each window."""
        size = x.shape[2:]
        border = [(0, 0), (0, 0), *zip(window.begin, window.end, strict=True)]
        padded: Any = np.pad(x, border, constant_values=-np.inf)
        places: Any = np.pad(np.arange(x.size).reshape(x.shape), border)
        taps = list(window.taps(window.output(size)))
        won = np.argmax([padded[(..., *tap)] for tap in taps], axis=0)
        return np.take_along_axis(np.array([places[(..., *tap)] for tap in taps]), won[None], 0)[0]

    class BatchNormalization(OpRun):
        """Before opset 14 the evaluator's own mixes in the statistics of the batch, as for training (onnx 1.23)."""

        op_domain = ""

        def _run(  # type: ignore[no-untyped-def]
            self, x, scale, bias, mean, var, epsilon=None, momentum=None, spatial=None, training_mode=None
        ):  # fmt: skip
            wide = (-1, *(1,) * (x.ndim - 2)) if x.ndim > 1 else (-1,)
            scale, bias, mean, var = (v.reshape(wide) for v in (scale, bias, mean, var))
            return ((x - mean) * (scale / np.sqrt(var + (1e-5 if epsilon is None else epsilon))) + bias,)

    class Pad(OpRun):
        """The evaluator's own takes no negative pads, which cut off (onnx 1.23)."""

        op_domain = ""

        def _run(self, data, pads=None, constant_value=None, axes=None, mode=None, value=None):  # type: ignore[no-untyped-def]
            over = range(data.ndim) if axes is None else [int(a) % data.ndim for a in axes]
            edges = [(0, 0)] * data.ndim
            for i, axis in enumerate(over):
                edges[axis] = (int(pads[i]), int(pads[i + len(pads) // 2]))
            kept = data[tuple(slice(max(-b, 0), n - max(-e, 0)) for n, (b, e) in zip(data.shape, edges, strict=True))]
            grown = [(max(b, 0), max(e, 0)) for b, e in edges]
            if (mode or "constant") != "constant":
                return (np.pad(kept, grown, mode=mode),)
            fill = next((v for v in (constant_value, value) if v is not None), 0)
            return (np.pad(kept, grown, constant_values=np.asarray(fill).item()),)

    class LRN(OpRun):
        """The evaluator's own counts images where it means channels (onnx 1.23)."""

        op_domain = ""

        def _run(self, x, alpha=None, beta=None, bias=None, size=None):  # type: ignore[no-untyped-def]
            below = (size - 1) // 2
            distance = np.arange(x.shape[1])[None] - np.arange(x.shape[1])[:, None]
            window = ((distance >= -below) & (distance <= size - 1 - below)).astype(np.float64)
            return (x / (bias + alpha / size * ops.along(x * x, window, 1 - x.ndim)) ** beta,)

    class MeanVarianceNormalization(OpRun):
        """The specification defines it with constants in float32."""

        op_domain = ""

        def _run(self, x, axes=None):  # type: ignore[no-untyped-def]
            over = tuple(axes or (0, 2, 3))
            return ((x - x.mean(over, keepdims=True)) / (x.std(over, keepdims=True) + 1e-9),)

    class GatherElements(OpRun):
        """The evaluator's own takes no axis of more than 64 entries (onnx 1.23)."""

        op_domain = ""

        def _run(self, data, indices, axis=None):  # type: ignore[no-untyped-def]
            axis = (axis or 0) % data.ndim
            within = tuple(slice(None if i == axis else n) for i, n in enumerate(indices.shape))
            return (np.take_along_axis(data[within], indices, axis),)

    class Erf(OpRun):
        op_domain = ""

        def _run(self, x):  # type: ignore[no-untyped-def]
            return (erf(x),)

    class Gelu(OpRun):
        op_domain = ""

        def _run(self, x, approximate=None):  # type: ignore[no-untyped-def]
            if approximate == "tanh":
                return (0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
            return (0.5 * x * (1 + erf(x / math.sqrt(2))),)

    return [
        Conv,
        ConvTranspose,
        MaxPool,
        BatchNormalization,
        Pad,
        LRN,
        MeanVarianceNormalization,
        GatherElements,
        Erf,
        Gelu,
        *rounding_ops(),
    ]
