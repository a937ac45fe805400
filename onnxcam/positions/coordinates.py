"""Coordinates: arrays that say where in the picture the entries of a tensor lie, and what is done to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Axes = tuple[int, ...]
Coordinate = np.ndarray
Field = tuple[Coordinate, ...]  # of the batch, then of each axis of the picture
Source = tuple[int, int]  # an input of a node, and a field of it

CLOSE = 1e-6  # cells


@dataclass(frozen=True, eq=False)
class Placed:
    """A tensor's shape, for the batch that is tracked, and its fields."""

    shape: tuple[int, ...]
    fields: tuple[Field, ...]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a node puts out, and for each field of it the fields of the node's inputs that have gone into it.

    A field that goes into none has been mixed over positions: each output sees many of them. `mixed` names inputs that
    are mixed although they go into a field as well.
    """

    placed: Placed
    sources: tuple[tuple[Source, ...], ...]
    mixed: frozenset[int] = frozenset()


def along(rank: int, axis: int, size: int = -1) -> tuple[int, ...]:
    return tuple(size if i == axis else 1 for i in range(rank))


def same(a: Coordinate, b: Coordinate) -> bool:
    return a is b or (a.shape == b.shape and bool(((a == b) | (np.isnan(a) & np.isnan(b))).all()))


def lean(a: Coordinate, axes: Sequence[int] | None = None) -> Coordinate:
    """`a` with length 1 along the axes that it does not vary along."""
    for axis in range(a.ndim) if axes is None else axes:
        if a.shape[axis] > 1:
            first = a.take([0], axis)
            if ((a == first) | (np.isnan(a) & np.isnan(first))).all():
                a = first
    return a


def blurred(field: Field) -> bool:
    """True where all entries have one and the same position: the positions have been averaged away."""
    return all(a.size == 1 and not np.isnan(a).any() for a in field[1:])


def nowhere(field: Field) -> bool:
    """True where no entry has a position."""
    return any(np.isnan(a).all() for a in field[1:])


def mean(a: Coordinate, axis: int) -> Coordinate:
    """The mean over an axis that is kept, of what has a position."""
    if a.shape[axis] == 1:
        return a
    there = ~np.isnan(a)
    mean: Coordinate = np.where(there, a, 0).sum(axis, keepdims=True) / there.sum(axis, keepdims=True)
    return mean


def regrouped(a: Coordinate, source: Sequence[int], target: Sequence[int]) -> Coordinate:
    """The coordinates of a tensor of shape `source` after it is reshaped to `target`.

    Axes fall into groups that are reshaped each by itself; those that the coordinate does not vary along stay 1.
    """
    wide: list[int] = []
    made: list[int] = []
    for before, after in _groups(source, target):
        varies = any(a.shape[i] > 1 for i in before)
        wide += [source[i] if varies else 1 for i in before]
        made += [target[i] if varies else 1 for i in after]
    return lean(np.broadcast_to(a, wide).reshape(made))


def _groups(source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest runs of axes of `source` and `target` that hold as many entries."""
    i = j = 0
    while i < len(source) or j < len(target):
        before: list[int] = []
        after: list[int] = []
        n = m = 1
        while True:
            if i < len(source) and (n < m or (n == m and not before)):
                n *= source[i]
                before.append(i)
                i += 1
            elif j < len(target) and (m < n or not after):
                m *= target[j]
                after.append(j)
                j += 1
            else:
                break
        yield before, after


def _ramp(a: Coordinate, axis: int) -> tuple[Coordinate, Coordinate] | None:
    """Where the coordinate begins along an axis and how far apart its entries are; None where not evenly spaced."""
    steps = np.diff(a, axis=axis)
    first = steps.take([0], axis)
    even = bool((np.abs(steps - first) < CLOSE).all())  # NaN is not
    return (a.take([0], axis), first) if even else None


def resampled(field: Field, axis: int, size: int, scale: float, offset: float) -> Field | None:
    """The coordinates along an axis of `size` whose cell o lies at `scale * o + offset` of the cells there were."""
    out = []
    for i, a in enumerate(field):
        if a.shape[axis] > 1:
            ramp = _ramp(a, axis) if i else None
            if ramp is None:
                return None
            cells = scale * np.arange(size, dtype=float) + offset
            a = lean(ramp[0] + ramp[1] * cells.reshape(along(a.ndim, axis)), [axis])
        out.append(a)
    return tuple(out)


def merged(fields: Sequence[Field]) -> Field:
    """Entries that several tensors have gone into: each coordinate from the tensor that tells most positions apart."""
    if all(f is fields[0] for f in fields):
        return fields[0]
    return tuple(_finest(list(arrays)) for arrays in zip(*fields, strict=True))


def _finest(arrays: list[Coordinate]) -> Coordinate:
    varying = [a for a in arrays if a.size > 1]
    if not varying or all(same(a, varying[0]) for a in varying):
        return varying[0] if varying else next((a for a in arrays if not np.isnan(a).any()), arrays[0])
    counts = [len(np.unique(a[~np.isnan(a)])) for a in varying]
    finest = [a for a, n in zip(varying, counts, strict=True) if n == max(counts)]
    if all(same(a, finest[0]) for a in finest):
        return finest[0]
    return lean(np.asarray(sum(finest[1:], finest[0]) / len(finest)))


def raised(field: Field, rank: int) -> Field:
    if field[0].ndim == rank:
        return field
    return tuple(a.reshape((1,) * (rank - a.ndim) + a.shape) for a in field)


def replaced(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])
