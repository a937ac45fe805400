"""Sampling at places between the cells: GridSample, DeformConv, RoiAlign. Linear in what is sampled, the places fixed.

Relevance goes to the cells a sample is taken from, by the coefficients of the interpolation, and none to the places:
they say where is looked, as a gate says how much (spec 3.7). The gradient goes to both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil, prod
from typing import Any

import numpy as np

from onnxcam.engines.places import Index
from onnxcam.graph import Node
from onnxcam.operators.geometry import conv_window
from onnxcam.operators.kinds import Array, At, Averaging, Linear, Operator, Share
from onnxcam.operators.registry import operator, refusal

CUBIC_A = -0.75  # of the cubic kernel, in ONNX GridSample and in torch


@dataclass(frozen=True)
class Tap:
    """One of the cells of an axis that a coordinate reads: its number, its coefficient and the slope of that."""

    cell: Array
    weight: Array
    slope: Array


def _reflected(ops: Any, u: Array, low: float, high: float) -> tuple[Array, Array]:
    """`u` reflected at `low` and `high` until it lies between them, and the slope of that."""
    span = high - low
    if span <= 0:
        return ops.zeros_like(u) + low, ops.zeros_like(u)
    turns = (u - low) / (2 * span)
    phase = (turns - ops.floor(turns)) * (2 * span)
    back = phase > span
    return ops.where(back, 2 * span - phase, phase) + low, ops.where(back, -1.0, ops.ones_like(u))


def _keys(ops: Any, f: Array) -> list[tuple[Array, Array]]:
    """Coefficients of the cells -1, 0, 1 and 2 behind the one below, at fraction `f`, and their slopes (Keys 1981)."""

    def near(d: Array) -> tuple[Array, Array]:
        return ((CUBIC_A + 2) * d - (CUBIC_A + 3)) * d * d + 1.0, (3 * (CUBIC_A + 2) * d - 2 * (CUBIC_A + 3)) * d

    def far(d: Array) -> tuple[Array, Array]:
        return CUBIC_A * (((d - 5) * d + 8) * d - 4), CUBIC_A * ((3 * d - 10) * d + 8)

    pairs = [far(f + 1.0), near(f), near(1.0 - f), far(2.0 - f)]
    return [(w, slope if i < 2 else -slope) for i, (w, slope) in enumerate(pairs)]


def axis_taps(ops: Any, u: Array, size: int, mode: str, padding: str, align: bool, averaged: bool = False) -> list[Tap]:
    """The cells that coordinate `u`, in cells, reads on an axis of `size`.

    `averaged` leaves out negative coefficients, so that relevance is shared as an average shares it.
    """
    low, high = (0.0, size - 1.0) if align else (-0.5, size - 0.5)
    turn: Array | float = 1.0
    if mode != "cubic":
        if padding == "border":
            inside = ops.mask(u > 0.0) * ops.mask(u < size - 1.0)
            u, turn = ops.where(u < 0.0, 0.0, ops.where(u > size - 1.0, size - 1.0, u)), inside
        elif padding == "reflection":
            u, turn = _reflected(ops, u, low, high)
    if mode == "nearest":
        cell = ops.round(u)
        found = [(cell, ops.ones_like(u), ops.zeros_like(u))]
    elif mode == "linear":
        below = ops.floor(u)
        f = u - below
        found = [(below, 1.0 - f, -ops.ones_like(u)), (below + 1.0, f, ops.ones_like(u))]
    else:
        below = ops.floor(u)
        found = [(below + (i - 1.0), w, slope) for i, (w, slope) in enumerate(_keys(ops, u - below))]
        if averaged:
            positive = [ops.positive(w) for _, w, _ in found]
            total = sum(positive[1:], positive[0])
            found = [(cell, w / total, slope) for (cell, _, slope), w in zip(found, positive, strict=True)]
    taps = []
    for cell, weight, slope in found:
        if mode == "cubic" and padding == "reflection":
            cell = ops.round(_reflected(ops, cell, low, high)[0])
        inside = ops.mask(cell >= 0.0) * ops.mask(cell <= size - 1.0)
        nearest = ops.where(cell < 0.0, 0.0, ops.where(cell > size - 1.0, size - 1.0, cell))
        counts = inside if padding == "zeros" else 1.0
        taps.append(Tap(nearest, weight * counts, slope * counts * turn))
    return taps


@dataclass(frozen=True)
class Sample:
    """One of the terms that samples are sums of: which cell of the flattened picture, and with what coefficient.

    Attributes:
        index: (N, G, Q), G groups of channels, Q samples.
        weight: the coefficient, (N, G, 1, Q).
        slopes: what it changes by along each axis, likewise.
    """

    index: Index
    weight: Array
    slopes: list[Array]


class Sampler:
    """Samples of a picture x (N, C, *size) at coordinates, one array (N, G, Q) for each axis, in cells: (N, C, Q).

    Channels fall into G groups, each with coordinates of its own.
    """

    def __init__(
        self, at: At, places: Sequence[Array], mode: str = "linear", padding: str = "zeros", align: bool = True,
        averaged: bool = False,
    ):  # fmt: skip
        self.at, self.ops = at, at.ops
        self.images, self.channels, *self.size = at.shape(0)
        self.groups, self.count = places[0].shape[-2:]
        axes = [
            axis_taps(self.ops, u, size, mode, padding, align, averaged)
            for u, size in zip(places, self.size, strict=True)
        ]
        self.samples = [self._sample(taps) for taps in product(*axes)]

    def _sample(self, taps: Sequence[Tap]) -> Sample:
        cell, weights = taps[0].cell, [tap.weight for tap in taps]
        for tap, size in zip(taps[1:], self.size[1:], strict=True):
            cell = cell * float(size) + tap.cell
        slopes = []
        for i, tap in enumerate(taps):
            others = [w for j, w in enumerate(weights) if j != i]
            slopes.append(self._column(_times([tap.slope, *others])))
        return Sample(self.ops.index_of(cell), self._column(_times(weights)), slopes)

    def _column(self, a: Array) -> Array:
        return self.ops.shaped(a, (self.images, self.groups, 1, self.count))

    def _grouped(self) -> tuple[int, ...]:
        return (self.images, self.groups, self.channels // self.groups, self.count)

    def _indices(self, sample: Sample) -> Index:
        """(N, C, Q)."""
        ops, shape = self.ops, self._grouped()
        index = ops.index_shaped(sample.index, (self.images, self.groups, 1, self.count))
        return ops.index_shaped(ops.index_repeated(index, shape), (self.images, self.channels, self.count))

    def cells(self, x: Array) -> Iterator[tuple[Sample, Array]]:
        """Each term with the cells of `x` it reads, (N, G, C/G, Q)."""
        ops = self.ops
        flat = ops.lifted(ops.shaped(x, (self.images, self.channels, prod(self.size))))
        for sample in self.samples:
            read = ops.get_elements(flat, self._indices(sample), -1)
            yield sample, ops.shaped(ops.lowered(read), self._grouped())

    def apply(self, x: Array) -> Array:
        parts = [read * sample.weight for sample, read in self.cells(x)]
        return self.ops.shaped(sum(parts[1:], parts[0]), (self.images, self.channels, self.count))

    def adjoint(self, r: Array) -> Array:
        """(T, N, C, Q) to (T, N, C, *size)."""
        ops, flat = self.ops, (self.images, self.channels, self.count)
        like = ops.shaped(self.at.input(0), (self.images, self.channels, prod(self.size)))
        r = ops.reshape(r, self._grouped())
        parts = [
            ops.put_elements(ops.reshape(r * sample.weight, flat), self._indices(sample), -1, like)
            for sample in self.samples
        ]
        return ops.reshape(sum(parts[1:], parts[0]), self.at.shape(0))

    def to_places(self, r: Array, x: Array) -> list[Array]:
        """The gradient with respect to the coordinates: for each axis (T, N, G, Q)."""
        ops = self.ops
        r = ops.reshape(r, self._grouped())
        found: list[Array] = []
        for sample, read in self.cells(x):
            along = ops.sum(r * read, (-2,))
            for i, slope in enumerate(sample.slopes):
                part = along * ops.shaped(slope, (self.images, self.groups, self.count))
                if i < len(found):
                    found[i] = found[i] + part
                else:
                    found.append(part)
        return found


def _times(factors: Sequence[Array]) -> Array:
    out = factors[0]
    for factor in factors[1:]:
        out = out * factor
    return out


@operator("GridSample", since=16)
def grid_sample(node: Node) -> Operator:
    """Input 1 holds a place for every sample, -1 to 1 over each axis, the last axis first. What of a cubic kernel is
    negative shares no relevance."""
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(node.attr("mode", "linear"), node.attr("mode", "linear"))
    padding, align = node.attr("padding_mode", "zeros"), bool(node.attr("align_corners", 0))

    def scales(at: At) -> list[float]:
        return [(n - 1) / 2 if align else n / 2 for n in at.shape(0)[2:]]

    def sampler(at: At, averaged: bool) -> Sampler:
        ops, size = at.ops, at.shape(0)[2:]
        grid = ops.shaped(at.input(1), (at.shape(1)[0], 1, prod(at.shape(1)[1:-1]), len(size)))
        places = []
        for i, (n, scale) in enumerate(zip(size, scales(at), strict=True)):
            last = len(size) - 1 - i
            u = ops.shaped(ops.slice(grid, -1, last, last + 1), grid.shape[:-1])
            places.append(u * scale + (n - 1) / 2)
        return Sampler(at, places, mode, padding, align, averaged)

    def flat(at: At) -> tuple[int, ...]:
        shape = at.output_shape()
        return (*shape[:2], prod(shape[2:]))

    def back(at: At, r: Array, averaged: bool) -> Array:
        return sampler(at, averaged).adjoint(at.ops.reshape(r, flat(at)))

    def others(at: At, r: Array) -> list[Share]:
        if not at.carries(1):
            return []
        ops = at.ops
        found = sampler(at, averaged=False).to_places(ops.reshape(r, flat(at)), at.input(0))
        columns = (*at.shape(1)[:-1], 1)
        parts = [ops.reshape(g * scale, columns) for g, scale in zip(found, scales(at), strict=True)]
        return [(1, ops.concat(parts[::-1], -1))]

    signed = mode == "cubic"
    return Averaging(
        lambda at, x: at.ops.shaped(sampler(at, signed).apply(x), at.output_shape()),
        lambda at, r: back(at, r, averaged=signed),
        gradient=(lambda at, r: back(at, r, averaged=False)) if signed else None,
        others=others,
    )


@operator("DeformConv", since=19)
def deform_conv(node: Node) -> Operator:
    """A Conv whose kernel reads x at places moved by offsets (input 2), times a mask (input 4): both fixed for
    relevance, both with a gradient."""
    group, groups = node.attr("group", 1), node.attr("offset_group", 1)

    def cells(at: At) -> int:
        return prod(at.shape(1)[2:])

    def outputs(at: At) -> int:
        return prod(at.output_shape()[2:])

    def sampler(at: At) -> Sampler:
        ops, kernel = at.ops, at.shape(1)[2:]
        window = conv_window(node, at.shape(0)[2:], kernel)
        shape = (at.shape(0)[0], groups, cells(at), len(kernel), outputs(at))
        offset = ops.shaped(at.input(2), shape)
        starts, steps = np.indices(kernel).reshape(len(kernel), -1, 1), np.indices(at.output_shape()[2:])
        places = []
        for i, step in enumerate(steps.reshape(len(kernel), 1, -1)):
            grid = starts[i] * window.dilations[i] + step * window.strides[i] - window.begin[i]
            moved = ops.shaped(ops.slice(offset, -2, i, i + 1), (*shape[:3], shape[4])) + ops.asarray(grid)
            places.append(ops.shaped(moved, (*shape[:2], shape[2] * shape[4])))
        return Sampler(at, places)

    def mask(at: At) -> Array | None:
        """(N, G, 1, Q)."""
        if not at.node.has(4):
            return None
        return at.ops.shaped(at.input(4), (at.shape(0)[0], groups, 1, cells(at) * outputs(at)))

    def by_group(at: At) -> tuple[int, ...]:
        """Channels by offset group: what a mask broadcasts against."""
        n, c = at.shape(0)[:2]
        return (n, groups, c // groups, cells(at) * outputs(at))

    def columns(at: At) -> tuple[int, ...]:
        """Channels by group of the Conv: what the weight multiplies, (N, g, C/g * cells, outputs)."""
        n, c = at.shape(0)[:2]
        return (n, group, c // group * cells(at), outputs(at))

    def read(at: At, x: Array) -> Array:
        ops, factor = at.ops, mask(at)
        sampled = ops.shaped(sampler(at).apply(x), by_group(at))
        return ops.shaped(sampled if factor is None else sampled * factor, columns(at))

    def matrix(at: At, w: Array) -> Array:
        return at.ops.shaped(w, (group, at.shape(1)[0] // group, prod(at.shape(1)[1:])))

    def rows(at: At, r: Array) -> Array:
        n, m = at.output_shape()[:2]
        return at.ops.reshape(r, (n, group, m // group, outputs(at)))

    def to_columns(at: At, r: Array, w: Array) -> Array:
        """(T, N, G, C/G, Q)."""
        return at.ops.reshape(at.ops.matmul(at.ops.swap(matrix(at, w)), rows(at, r)), by_group(at))

    def masked(at: At, r: Array) -> Array:
        n, c = at.shape(0)[:2]
        factor = mask(at)
        return at.ops.reshape(r if factor is None else r * factor, (n, c, cells(at) * outputs(at)))

    def apply(at: At, x: Array, w: Array) -> Array:
        return at.ops.shaped(at.ops.matmul(matrix(at, w), read(at, x)), at.output_shape())

    def others(at: At, r: Array) -> list[Share]:
        ops, shares = at.ops, []
        if at.carries(1):
            product_ = ops.matmul(rows(at, r), ops.swap(read(at, at.input(0))))
            shares.append((1, ops.reshape(ops.sum(product_, (-4,)), at.shape(1))))
        if at.carries(2) or at.carries(4):
            to_cells = to_columns(at, r, at.input(1))
            if at.carries(2):
                found = sampler(at).to_places(masked(at, to_cells), at.input(0))
                shape = (at.shape(0)[0], groups, cells(at), 1, outputs(at))
                parts = [ops.reshape(g, shape) for g in found]
                shares.append((2, ops.reshape(ops.concat(parts, -2), at.shape(2))))
            if at.carries(4):
                sampled = ops.shaped(sampler(at).apply(at.input(0)), by_group(at))
                shares.append((4, ops.reshape(ops.sum(to_cells * sampled, (-2,)), at.shape(4))))
        if at.carries(3):
            shares.append((3, ops.sum(r, (1 - r.ndim, *range(2 - len(at.shape(0)), 0)))))
        return shares

    def bias(at: At) -> Array | None:
        return at.ops.shaped(at.input(3), (-1, *(1,) * (len(at.shape(0)) - 2))) if at.node.has(3) else None

    return Linear(
        apply,
        lambda at, r, w: sampler(at).adjoint(masked(at, to_columns(at, r, w))),
        bias=bias,
        others=others,
    )


# -- regions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pooling:
    """How RoiAlign reads one axis: its attributes."""

    scale: float
    samples: int
    half_pixel: bool


@lru_cache(maxsize=64)
def region(pooling: Pooling, start: float, end: float, size: int, out: int) -> np.ndarray:
    """(out, size): what each of `out` bins of a region takes from an axis of `size` cells, on average (ONNX spec)."""
    shift = 0.5 if pooling.half_pixel else 0.0
    begin, stop = start * pooling.scale - shift, end * pooling.scale - shift
    length = stop - begin if pooling.half_pixel else max(stop - begin, 1.0)
    count = pooling.samples or ceil(length / out)
    a = np.zeros((out, size))
    if count < 1:
        return a
    for i, j in product(range(out), range(count)):
        u = begin + (i + (j + 0.5) / count) * length / out
        if u < -1 or u > size:
            continue
        below = min(int(max(u, 0.0)), size - 1)
        f = max(u, 0.0) - below if below < size - 1 else 0.0
        a[i, below] += (1 - f) / count
        if f:
            a[i, below + 1] += f / count
    return a


@operator("RoiAlign", since=10)
def roi_align(node: Node) -> Operator:
    """The average over bins of each region (input 1) of its picture (input 2): two matrix products. Neither gets a
    gradient, as in torchvision."""
    if node.attr("mode", "avg") != "avg":
        raise refusal(node, "RoiAlign that takes the maximum of its samples")
    default = "half_pixel" if node.opset >= 16 else "output_half_pixel"
    pooling = Pooling(
        float(node.attr("spatial_scale", 1.0)),
        int(node.attr("sampling_ratio", 0)),
        node.attr("coordinate_transformation_mode", default) == "half_pixel",
    )
    outs = int(node.attr("output_height", 1)), int(node.attr("output_width", 1))

    def matrices(at: At) -> tuple[Array, Array]:
        """(R, 1, out, size) for each axis."""
        rois: Any = np.asarray(at.host(1), np.float64)
        found = []
        for i, (size, out) in enumerate(zip(at.shape(0)[2:], outs, strict=True)):
            rows = [region(pooling, roi[1 - i], roi[3 - i], size, out) for roi in rois.tolist()]
            found.append(at.ops.asarray(np.stack(rows)[:, None]))
        return found[0], found[1]

    def apply(at: At, x: Array) -> Array:
        ops, (rows, columns) = at.ops, matrices(at)
        x = ops.take(x, np.asarray(at.ints(2), np.int64), 0)
        return ops.matmul(ops.matmul(rows, x), ops.swap(columns))

    def adjoint(at: At, r: Array) -> Array:
        ops, (rows, columns) = at.ops, matrices(at)
        r = ops.matmul(ops.matmul(ops.swap(rows), r), columns)
        return ops.scatter_add(r, np.asarray(at.ints(2), np.int64), -4, at.shape(0)[0])

    return Averaging(apply, adjoint)
