"""ONNX Runtime, imported where it is first needed: `import onnxcam` stays quick and does not fail without it."""

from __future__ import annotations

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
