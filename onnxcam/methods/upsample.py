"""Bilinear interpolation of maps to another size, pixel centres aligned: what methods need, not what eyes want."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np


def upsampled(
    maps: np.ndarray, size: Sequence[int], corner: Sequence[int] | None = None, part: Sequence[int] | None = None
) -> np.ndarray:
    """(..., *spatial) as (..., *size), each axis interpolated linearly; of that the `part` that begins at `corner`."""
    for k, n in enumerate(size):
        axis = maps.ndim - len(size) + k
        rows = _weights(maps.shape[axis], n)
        if corner is not None and part is not None:
            rows = rows[corner[k] : corner[k] + part[k]]
        elif maps.shape[axis] == n:
            continue
        maps = np.moveaxis(np.moveaxis(maps, axis, -1) @ rows.T.astype(maps.dtype), -1, axis)
    return maps


@cache
def _weights(have: int, want: int) -> np.ndarray:
    """(want, have): where each new cell takes its value from."""
    centre = np.clip((np.arange(want) + 0.5) * have / want - 0.5, 0, have - 1)
    low = np.minimum(np.floor(centre).astype(int), have - 1)
    high = np.minimum(low + 1, have - 1)
    matrix = np.zeros((want, have))
    np.add.at(matrix, (np.arange(want), low), 1 - (centre - low))
    np.add.at(matrix, (np.arange(want), high), centre - low)
    return matrix
