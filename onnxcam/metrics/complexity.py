"""How much a map says at once: entropy and sparseness of its absolute values."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def entropy(heat: Array) -> float:
    """Shannon entropy, in bits, of the shares of all cells in the map (Bhatt et al. 2020); of N equal cells log2 N."""
    size = np.abs(np.asarray(heat, np.float64)).ravel()
    total = size.sum()
    if total == 0:
        return float(np.log2(max(size.size, 1)))
    p = size[size > 0] / total
    return float(-(p * np.log2(p)).sum())


def sparseness(heat: Array) -> float:
    """The Gini index of absolute values (Chalasani et al. 2020): 0 where all are equal, 1 - 1/N where one has all."""
    size = np.sort(np.abs(np.asarray(heat, np.float64)).ravel())
    total = size.sum()
    if total == 0:
        return 0.0
    ranks = np.arange(1, size.size + 1)
    return float(((2 * ranks - size.size - 1) * size).sum() / (size.size * total))
