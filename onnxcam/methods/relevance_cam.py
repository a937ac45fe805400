"""Relevance-CAM (Lee et al., CVPR 2021): the spatial mean of a channel's relevance weighs its activation."""

from __future__ import annotations

from math import prod
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
    n, c, *spatial = activation.shape
    weights = ops.mean(relevance, tuple(range(-len(spatial), 0)))
    # The sum over channels is a product of a row of weights with a matrix of cells.
    cells = ops.matmul(ops.reshape(weights, (n, 1, c)), ops.shaped(activation, (n, c, prod(spatial))))
    return ops.reshape(cells, (n, *spatial))
