"""Relevance-CAM (Lee et al., CVPR 2021): the spatial mean of a channel's relevance weighs its activation."""

from __future__ import annotations

from typing import Any

Array = Any


def combine(ops: Any, activation: Array, relevance: Array) -> Array:
    """sum over channels of mean(R_k) A_k, without a ReLU, as the authors' code has it (spec 1.2).

    Args:
        ops: the primitives of an engine.
        activation: A, (N, C, *spatial).
        relevance: R, (T, N, C, *spatial).

    Returns:
        (T, N, *spatial).
    """
    spatial = tuple(range(2 - activation.ndim, 0))
    weights = ops.mean(relevance, spatial, keepdims=True)
    return ops.sum(weights * activation, (1 - activation.ndim,))
