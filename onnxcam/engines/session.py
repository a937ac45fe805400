"""Sessions: who evaluates the graph with its taps.

ONNX Runtime does, in the precision of the file. For float64, where ONNX Runtime lacks many kernels, the reference
evaluator of the onnx package does, with the array engine's convolutions put in for speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcam.errors import ModelError, UsageError
from onnxcam.runtime import onnxruntime

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
    "rocm": "ROCMExecutionProvider",
}


class RuntimeSession:
    """ONNX Runtime on a model whose outputs are the taps.

    Args:
        model: a model as `taps.expose` makes it.
        taps: names for its outputs, in order.
        providers: short names (`cpu`, `cuda`, ...) or full ones, in order of preference.
        threads: threads within one op; None leaves it to ONNX Runtime.

    Raises:
        UsageError: onnxruntime is not installed, or a provider is not available in it.
        ModelError: ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        taps: Sequence[str],
        providers: Sequence[str] = ("cpu",),
        threads: int | None = None,
    ):
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._taps = tuple(taps)
        try:
            self._session = ort.InferenceSession(
                model.SerializeToString(), options, providers=_providers(ort, providers)
            )
        except UsageError:
            raise
        except Exception as error:  # onnxruntime raises a different class for each status
            raise ModelError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error
        self.providers: list[str] = self._session.get_providers()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Values of the taps by name.

        Raises:
            ModelError: ONNX Runtime fails on this input; the message is its first line.
        """
        try:
            return dict(zip(self._taps, self._session.run(None, dict(feeds)), strict=True))
        except Exception as error:
            raise ModelError(f"ONNX Runtime cannot run the model on this input: {first_line(error)}") from error


class ReferenceSession:
    """The onnx package's reference evaluator, in float64 throughout: slow and exact, for checks."""

    def __init__(self, model: onnx.ModelProto, taps: Sequence[str]):
        from onnx.reference import ReferenceEvaluator

        self._taps = tuple(taps)
        self._evaluator = ReferenceEvaluator(in_double(model), new_ops=[_conv_op()])
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


def _conv_op() -> Any:
    from onnx.reference.op_run import OpRun

    from onnxcam.engines.array import ArrayOps
    from onnxcam.engines.window import resolve_conv

    ops = ArrayOps(np, "float64")

    class Conv(OpRun):
        """The reference evaluator's Conv loops in Python; this one is the array engine's."""

        op_domain = ""

        def _run(  # type: ignore[no-untyped-def]
            self, X, W, B=None, auto_pad=None, dilations=None, group=None, kernel_shape=None, pads=None, strides=None
        ):
            window = resolve_conv(X.shape[2:], W.shape[2:], auto_pad or "NOTSET", dilations, pads, strides)
            y = ops.conv(X, W, window, group or 1)
            return (y if B is None else y + B.reshape(-1, *(1,) * window.rank),)

    return Conv


def first_line(error: BaseException) -> str:
    """The first line of an error's text, which is what a user can use of it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _providers(ort: Any, names: Sequence[str]) -> list[str]:
    available = ort.get_available_providers()
    full = [PROVIDERS.get(name.lower(), name) for name in names]
    missing = [name for name in full if name not in available]
    if missing:
        raise UsageError(f"execution provider {missing[0]} is not available here: there are {', '.join(available)}")
    return full
