"""ONNX Runtime, imported where it is first needed: `import onnxcam` stays quick and does not fail without it."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from onnxcam.errors import UsageError


def onnxruntime() -> Any:
    """The module.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            "onnxcam needs ONNX Runtime to run models: pip install 'onnxcam[cpu]' or 'onnxcam[gpu]'"
        ) from error
    return onnxruntime


def give_back_memory() -> None:
    """Hand what is free in the heap back to the system, where the C library can.

    Loading a model leaves glibc with free blocks several times as large as its weights, which it keeps by itself.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
