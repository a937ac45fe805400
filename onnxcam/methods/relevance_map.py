"""Maps of the relevance of a layer itself, without the detour over weights of channels."""

from __future__ import annotations

from typing import Any

Array = Any


def positive(ops: Any, activation: Array, relevance: Array) -> Array:
    """relu(sum over channels of R_k)."""
    return ops.positive(ops.sum(relevance, (1 - activation.ndim,)))


def times_activation(ops: Any, activation: Array, relevance: Array) -> Array:
    """sum over channels of R+ A: the LayerCAM of relevance."""
    return ops.positive(ops.sum(ops.positive(relevance) * activation, (1 - activation.ndim,)))
