"""Operators: what onnxcam knows about ONNX ops, one file per kind.

An operator is registered with its op types and a range of opsets, as a function from the node to its mathematics, one
of the kinds in `kinds.py`. Nothing here knows an engine: operators speak to `at.ops`.
"""

from onnxcam.operators import (  # noqa: F401  (importing registers)
    activations,
    additive,
    layout,
    linear,
    normalisation,
    pooling,
    products,
    quantisation,
    reductions,
    resize,
    sampling,
    selection,
    statistics,
)
from onnxcam.operators.registry import lookup, registered, why_not

__all__ = ["lookup", "registered", "why_not"]
