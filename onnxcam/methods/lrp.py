"""LRP: the relevance of a layer itself, its channels summed where it is a map."""

from __future__ import annotations

from typing import Any

Array = Any


def combine(ops: Any, activation: Array, relevance: Array) -> Array:
    """sum over channels of R_k: (T, N, C, *spatial) -> (T, N, *spatial); features (T, N, F) as they are."""
    if activation.ndim == 2:
        return relevance
    return ops.sum(relevance, (1 - activation.ndim,))


def by_channel(ops: Any, activation: Array, relevance: Array) -> Array:
    """sum over cells of R_k: (T, N, C, *spatial) -> (T, N, C); features (T, N, F) as they are."""
    if activation.ndim == 2:
        return relevance
    return ops.sum(relevance, tuple(range(2 - activation.ndim, 0)))
