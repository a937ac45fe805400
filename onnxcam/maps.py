"""The form of a tensor: how it is a map, whatever its layout.

(N, C, H, W) is a map as it is. Tokens (N, L, C), with class tokens among them, channels last (N, H, W, C), windows
(N*windows, L, C) and heads (N, heads, L, d) become one when their axes are put in order and the tokens that lie nowhere
are left out. What goes where follows from positions that were carried through the graph, not from names or shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from onnxcam.graph import Graph
from onnxcam.positions import Axes, Coordinate, Field, Positions

__all__ = ["Axes", "Form", "Maps"]

Array = Any
# What tokens must be like to be a map: cover this much of each axis of the picture, at distances that differ by no more
# than this, with cells no longer than so many times their width.
PART, UNEVEN, STRIPS = 0.75, 0.01, 4
ROUNDED = 4  # decimals of a cell of the picture to which positions are told apart


@dataclass(frozen=True)
class Form:
    """How a tensor is turned into (N, channels, *grid).

    Attributes:
        split: the tensor's axes, with None for the batch as an axis of its own.
        batch: the axis of the tensor that holds the batch; None where there is none, for a batch of one.
        windows: how many windows of an image share that axis.
        order: the axes of `split` as batch, channels, positions.
        cells: for each cell of the grid which of the positions it holds; None where they are all, in order.
        channels, grid: sizes.
        heads: channels lie in more than one axis.
    """

    split: tuple[int | None, ...]
    batch: int | None
    windows: int
    order: tuple[int, ...]
    cells: tuple[int, ...] | None
    channels: int
    grid: tuple[int, ...]
    heads: bool = False

    @property
    def plain(self) -> bool:
        """True for (N, C, *grid), which is a map as it is."""
        as_it_is = self.batch == 0 and self.cells is None and self.order == tuple(range(len(self.order)))
        return as_it_is and self.split == (None, self.channels, *self.grid)

    @property
    def channels_last(self) -> bool:
        """True for (N, *grid, C)."""
        return self.split == (None, *self.grid, self.channels) and self.cells is None and self.batch == 0

    @property
    def apart(self) -> int:
        """How many positions are in no cell: class tokens, padding."""
        return self._positions - prod(self.grid)

    @property
    def _positions(self) -> int:
        return prod(n for n in self.split if n is not None) // self.channels

    def relevance(self, ops: Any, r: Array) -> Array:
        """(T, *tensor.shape) as (T, N, channels, *grid); `ops` are the primitives of an engine."""
        if self.plain:
            return r
        whole = 1 if self.batch is None else r.shape[1 + self.batch]
        images = whole if isinstance(whole, str) else whole // self.windows
        r = ops.permute(ops.reshape(r, [images if n is None else n for n in self.split]), self.order)
        r = ops.reshape(r, (images, self.channels, self._positions))
        if self.cells is not None:
            first = self.cells[0]
            if self.cells == tuple(range(first, first + len(self.cells))):
                r = ops.slice(r, -1, first, first + len(self.cells))
            else:
                r = ops.take(r, np.array(self.cells, np.int64), -1)
        return ops.reshape(r, (images, self.channels, *self.grid))

    def activation(self, ops: Any, x: Array) -> Array:
        """(*tensor.shape) as (N, channels, *grid)."""
        if self.plain:
            return x
        return ops.lowered(self.relevance(ops, ops.lifted(x)))

    def describe(self) -> str:
        """In words, where the shape does not say it all."""
        said = []
        if not self.plain:
            said.append(f"map {'x'.join(map(str, self.grid))}")
        if self.windows > 1:
            said.append(f"{self.windows} windows")
        if self.heads:
            said.append("heads joined")
        if self.apart:
            said.append(f"{self.apart} token{'s' if self.apart > 1 else ''} left out")
        return ", ".join(said)


class Maps:
    """Which tensors of a graph are maps, and how.

    Args:
        graph: a canonised graph.
        inputs: the spatial axes of its inputs, where they are known. Else what makes most tensors maps is taken:
            channels first, channels last, or none.
    """

    def __init__(self, graph: Graph, inputs: Mapping[str, Axes] | None = None):
        self.graph = graph
        self._read: dict[Any, Form | str] = {}
        self._positions = self._best(inputs or {})
        self._read = {}

    def _best(self, inputs: Mapping[str, Axes]) -> Positions:
        shapes = {name: self.graph.shape(name) or () for name in self.graph.inputs}
        layouts = [
            {name: inputs.get(name, tuple(range(first, len(s) - last))) for name, s in shapes.items()}
            for first, last in ((2, 0), (1, 1), (1, 0))
        ]
        layouts = [one for i, one in enumerate(layouts) if one not in layouts[:i]]
        best: Positions | None = None
        most = (-1, -1)
        for layout in layouts:
            layout = self._pictures(layout)
            for batch in (2, 1):
                found = Positions(self.graph, layout, batch)
                if found.whole:
                    break
            if len(layouts) == 1:
                return found
            fits = (self._convolved(found), len(found.placed))
            if fits > most:
                best, most = found, fits
        assert best is not None
        return best

    def _convolved(self, positions: Positions) -> int:
        """How many convolutions have the positions of the map where they slide: a film (N, frames, H, W, 2) taken for
        channels first has its frames there."""
        self._positions, self._read = positions, {}
        inputs = [node.inputs[0] for node in self.graph.nodes if node.op_type == "Conv"]
        return sum((form := self.form(name)) is not None and form.plain for name in inputs)

    def _pictures(self, layout: dict[str, Axes]) -> dict[str, Axes]:
        """The inputs whose positions are those of a map: not what holds for all images of an open batch, a mean that
        is subtracted, say, and not the words beside a picture, which have fewer axes."""
        open_batch = any(isinstance((self.graph.shape(name) or (0,))[0], str) for name in layout)
        going = {
            name: axes
            for name, axes in layout.items()
            if not (open_batch and isinstance((self.graph.shape(name) or (0,))[0], int))
        }
        most = max((len(axes) for axes in going.values()), default=0)
        return {name: axes for name, axes in going.items() if len(axes) == most}

    def dead(self, logits: str) -> set[str]:
        """The maps none of whose cells reaches `logits` by itself: what does is apart, a class token."""
        return self._positions.dead(logits)

    def form(self, tensor: str) -> Form | None:
        found = self._found(tensor)
        return found if isinstance(found, Form) else None

    def why_none(self, tensor: str) -> str:
        """Why a tensor is no map, to follow its name."""
        found = self._found(tensor)
        return found if isinstance(found, str) else ""

    def seen(self, tensors: Sequence[str]) -> int:
        """How many of these hold something at positions of the picture."""
        return sum(name in self._positions.placed for name in tensors)

    def _found(self, tensor: str) -> Form | str:
        placed = self._positions.placed.get(tensor)
        if placed is None:
            shape = self.graph.shape(tensor)
            if shape is None:
                return "has a shape that is not known, so there is no map of it"
            if prod(n for n in shape[1:] if isinstance(n, int)) > 1 and len(shape) > 2 and set(shape[2:]) == {1}:
                return "has a single position, so there is no map of it"
            return "has lost its spatial axes: each of its values sees many places, so there is no map of it"
        if placed not in self._read:
            self._read[placed] = self._form(placed.shape, placed.fields)
        return self._read[placed]

    def _form(self, shape: tuple[int, ...], fields: Sequence[Field]) -> Form | str:
        if len(fields) > 1:
            return "is an attention matrix, of places with places, so there is no map of it"
        images, *coordinates = fields[0]
        batch = [i for i, n in enumerate(images.shape) if n > 1]
        count = self._positions.batch
        windows = 1
        split: list[int | None] = list(shape)
        if count == 1:
            where: int | None = next((i for i, n in enumerate(shape) if n == 1 and i == 0), None)
            if where is None:
                split, images = [1, *split], images[None]
                coordinates = [a[None] for a in coordinates]
            axis = 0
        elif len(batch) == 1 and shape[batch[0]] % count == 0:
            where = axis = batch[0]
            windows = shape[axis] // count
            if not np.array_equal(images.ravel(), np.arange(count).repeat(windows)):
                return "has the images of a batch interleaved, so there is no map of it"
            if windows > 1:
                split[axis : axis + 1] = [count, windows]
                coordinates = [_of_one_image(a, axis, count) for a in coordinates]
        else:
            return "has no axis of images, so there is no map of it"
        split[axis] = None
        return self._gridded(split, where, windows, axis, coordinates)

    def _gridded(
        self, split: list[int | None], where: int | None, windows: int, axis: int, coordinates: Sequence[Coordinate]
    ) -> Form | str:
        varying = [i for i in range(len(split)) if i != axis and any(a.shape[i] > 1 for a in coordinates)]
        channels = [i for i in range(len(split)) if i != axis and i not in varying]
        sizes = [split[i] or 1 for i in varying]
        if any(a.shape[axis] > 1 for a in coordinates):
            return "has other places in each image, so there is no map of it"
        order = (axis, *channels, *varying)
        width = prod(split[i] or 1 for i in channels)
        heads = sum((split[i] or 1) > 1 for i in channels) > 1
        if order == tuple(range(len(split))) and _is_grid(coordinates, varying) and prod(sizes) > 1:
            return Form(tuple(split), where, windows, order, None, width, tuple(sizes), heads)
        there = np.stack([_along_only(a, varying, sizes) for a in coordinates], -1)
        there = np.round(there, ROUNDED)
        limits = np.array(self._positions.size)
        inside = ~np.isnan(there).any(-1)
        if not inside.any():
            return "has no place in the picture (a class token), so there is no map of it"
        spread = order == tuple(range(len(split))) and len(varying) == len(limits)
        if not spread:
            inside &= ((there >= -0.5) & (there <= limits - 0.5)).all(-1)
        picked = np.flatnonzero(inside)
        axes = [np.unique(there[picked, d]) for d in range(there.shape[-1])]
        grid = tuple(len(a) for a in axes)
        if prod(grid) < len(picked):
            return "has places more than once, so there is no map of it"
        if prod(grid) > len(picked):
            return "has its places in no grid, so there is no map of it"
        places = [np.searchsorted(a, there[picked, d]) for d, a in enumerate(axes)]
        flat = np.ravel_multi_index(tuple(places), grid)
        if len(np.unique(flat)) < len(flat):
            return "has places more than once, so there is no map of it"
        if len(flat) < 2:
            return "has a single position, so there is no map of it"
        if not spread and (why := _is_part(axes, limits)):
            return why
        cells = picked[np.argsort(flat)]
        whole = len(cells) == len(there) and bool((np.diff(cells) == 1).all())
        kept = None if whole else tuple(map(int, cells))
        return Form(tuple(split), where, windows, order, kept, width, grid, heads)


def _is_grid(coordinates: Sequence[Coordinate], varying: Sequence[int]) -> bool:
    """True where each coordinate grows along an axis of its own, in order, as those of a map with channels first do."""
    return len(coordinates) == len(varying) and all(
        a.size == a.shape[i] > 1 and bool((np.diff(a.ravel()) > 10.0**-ROUNDED).all())
        for a, i in zip(coordinates, varying, strict=True)
    )


def _of_one_image(a: Coordinate, axis: int, count: int) -> Coordinate:
    """Coordinates with the batch split off the axis that it shares with windows, the same in every image."""
    lead, rest = a.shape[:axis], a.shape[axis + 1 :]
    if a.shape[axis] == 1:
        return a.reshape(*lead, 1, 1, *rest)
    a = a.reshape(*lead, count, a.shape[axis] // count, *rest)
    first = a.take([0], axis)
    same = (a == first) | (np.isnan(a) & np.isnan(first))
    return first if same.all() else a


def _is_part(axes: Sequence[np.ndarray], sizes: np.ndarray) -> str:
    """Why cells at these coordinates are no grid over the whole picture; a single one may stand for all of an axis."""
    steps = []
    for a, size in zip(axes, sizes, strict=True):
        if len(a) > 1:
            gaps = np.diff(a)
            steps.append(float(gaps.mean()))
            if np.ptp(gaps) > UNEVEN * steps[-1]:
                return "has its places unevenly spaced, so there is no map of it"
            if not PART <= steps[-1] * len(a) / size <= 1 / PART:
                return "holds a part of the picture only, so there is no map of it"
    if steps and max(steps) > STRIPS * min(steps):
        return "holds a few strips of the picture only, so there is no map of it"
    return ""


def _along_only(a: Coordinate, axes: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """A coordinate along `axes`, flat."""
    squeezed = a.reshape([a.shape[i] for i in axes])
    flat: np.ndarray = np.broadcast_to(squeezed, tuple(sizes)).ravel()
    return flat
