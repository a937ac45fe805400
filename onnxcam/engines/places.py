"""Places: entries picked by index, and where relevance goes back to, whether the index is known or not.

An index is a NumPy array of integers where it is known, and a symbol where the model computes it while an explanation
is recorded. Operators write index arithmetic once, with the few methods here, and never ask which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

Array = Any
Index = Any  # np.ndarray of integers, or a symbol of int64

# More repetitions of one place than this are added up pair by pair instead of one after the other.
FEW = 4


def element_places(index: np.ndarray, shape: Sequence[int], axis: int) -> np.ndarray:
    """Flat places in `shape` that ONNX GatherElements reads with `index` along `axis`."""
    places: list[np.ndarray] = list(np.indices(index.shape))
    places[axis] = index.astype(np.int64) % shape[axis]
    return np.asarray(np.ravel_multi_index(tuple(places), tuple(shape)))


def folds(index: np.ndarray) -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray]:
    """How to add up the entries that share a place, in as many rounds as halvings leave one of each.

    A round is a pair of positions into the entries so far, which have an entry of zero behind them: what it makes are
    the sums of the two. With the rounds come the places of what is left. An index below zero drops its entry.
    """
    entries = np.argsort(index, kind="stable")
    entries = entries[index[entries] >= 0]
    places, zero = index[entries], index.size
    rounds = []
    while True:
        starts = np.flatnonzero(np.diff(places, prepend=-1))
        rank = np.arange(places.size) - np.repeat(starts, np.diff(starts, append=places.size))
        kept = np.flatnonzero(rank % 2 == 0)
        paired = np.append(rank, 0)[kept + 1] % 2 == 1
        behind = np.append(entries, zero)[kept + 1]
        rounds.append((entries[kept], np.where(paired, behind, zero)))
        places, entries, zero = places[kept], np.arange(kept.size), kept.size
        if starts.size == places.size:
            return rounds, places


class Places:
    """What both engines do with an index that is known, in terms of their `reshape`, `take` and `scatter_add`."""

    if TYPE_CHECKING:

        def reshape(self, r: Array, shape: Any) -> Array: ...
        def take(self, x: Array, index: np.ndarray, axis: int) -> Array: ...
        def scatter_add(self, r: Array, index: np.ndarray, axis: int, size: int) -> Array: ...
        def asarray(self, value: np.ndarray) -> Array: ...

    def index_shaped(self, index: Index, shape: Sequence[int | str]) -> Index:
        return np.reshape(index, tuple(int(n) for n in shape))

    def index_repeated(self, index: Index, shape: Sequence[int | str]) -> Index:
        """`index` broadcast to `shape`."""
        return np.broadcast_to(index, tuple(int(n) for n in shape))

    def index_within(self, index: Index, size: int) -> Index:
        """`index`, where negative numbers count from the end of an axis of `size`, as places of it."""
        return np.asarray(index, np.int64) % size

    def index_of_coordinates(self, index: Index, sizes: Sequence[int]) -> Index:
        """The last axis of `index` holds coordinates in a block of `sizes`: the flat places of it."""
        given = np.moveaxis(np.asarray(index, np.int64), -1, 0)
        coordinates = tuple(c % n for c, n in zip(given, sizes, strict=True))
        return np.asarray(np.ravel_multi_index(coordinates, tuple(sizes)))

    def get_elements(self, r: Array, index: Index, axis: int) -> Array:
        """ONNX GatherElements on `r` (T, *shape) along `axis`, counted from the end: (T, *index.shape)."""
        shape = r.shape[1:]
        flat = self.take(self.reshape(r, (prod(shape),)), np.ravel(element_places(index, shape, axis)), -1)
        return self.reshape(flat, index.shape)

    def put_elements(self, r: Array, index: Index, axis: int, x: Array) -> Array:
        """Adjoint of `get_elements` for an array shaped like `x`: (T, *index.shape) to (T, *x.shape)."""
        places = np.ravel(element_places(index, x.shape, axis))
        flat = self.scatter_add(self.reshape(r, (places.size,)), places, -1, prod(x.shape))
        return self.reshape(flat, x.shape)

    def untouched(self, index: Index, axis: int, x: Array) -> Array:
        """1 where `index` along `axis` points to no entry of an array like `x`, else 0."""
        kept = np.ones(prod(x.shape))
        kept[np.ravel(element_places(index, x.shape, axis))] = 0
        return self.asarray(kept.reshape(x.shape))
