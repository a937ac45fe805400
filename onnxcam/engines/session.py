"""Sessions: ONNX Runtime evaluates the graph with its taps, in the precision of the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

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
