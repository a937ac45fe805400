"""Resize and Upsample: one matrix per axis.

Every mode is linear in x and separable, y = A_1 ... A_k x with a matrix (output, input) per resized axis (spec 3.7).
The matrices are computed on the host as ONNX Runtime computes its coefficients, coordinates in float32 where a rounding
decides which entry is copied, and kept per geometry. Nearest and linear interpolation are averages. The coefficients
of cubic interpolation have both signs; the gradient uses them as they are, while relevance is shared by their positive
parts, rows scaled to sum to one, a nearby average that cannot explode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

from onnxcam.graph import Node
from onnxcam.operators.kinds import Array, At, Averaging, Operator
from onnxcam.operators.registry import operator


@dataclass(frozen=True)
class Sampling:
    """How a Resize node reads its input: its attributes, defaults of its opset filled in."""

    mode: str = "nearest"
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic_a: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False


def coordinates(mode: str, size: int, out: int, scale: float, roi: tuple[float, float], dtype: type) -> np.ndarray:
    """Where each of `out` cells lies on an axis of `size` cells, not yet clipped to it (ONNX spec, Resize).

    `length_resized` of the formulas is `out`, as in ONNX Runtime, also where `size * scale` is no whole number.
    """
    x: np.ndarray = np.arange(out, dtype=dtype)
    scale = dtype(scale)
    half = (x + dtype(0.5)) / scale - dtype(0.5)
    if mode == "asymmetric":
        return x / scale
    if mode == "align_corners":
        return x * dtype(size - 1) / dtype(out - 1) if out > 1 else x
    if mode == "pytorch_half_pixel":
        return half if out > 1 else x
    if mode == "half_pixel_symmetric":
        offset = dtype(size / 2) * (dtype(1) - dtype(out) / (scale * dtype(size)))
        return (float(offset) + (x.astype(np.float64) + 0.5) / float(scale) - 0.5).astype(dtype)
    if mode == "tf_half_pixel_for_nn":
        return (x + dtype(0.5)) / scale
    if mode == "tf_crop_and_resize":
        start, end, last = dtype(roi[0]), dtype(roi[1]), dtype(size - 1)
        if out == 1:
            return x + dtype(0.5) * (start + end) * last
        return start * last + x * (end - start) * last / dtype(out - 1)
    return half


# What ONNX Runtime takes for a tie of two neighbours, since its coordinates are rounded.
TIE = 1e-6


def _nearest(at: np.ndarray, mode: str, scale: float) -> np.ndarray:
    """The entry that coordinate `at` copies. "simple" is what opsets before 11 do."""
    at = at.astype(np.float64)
    if mode == "simple":
        mode = "ceil" if scale < 1 else "floor"
    return {
        "round_prefer_floor": lambda: np.ceil(at - 0.5 - TIE),
        "round_prefer_ceil": lambda: np.floor(at + 0.5 + TIE),
        "floor": lambda: np.floor(at),
        "ceil": lambda: np.ceil(at),
    }[mode]().astype(np.int64)


def _triangle(distance: np.ndarray) -> np.ndarray:
    return np.clip(1 - np.abs(distance), 0, None)


def _keys(distance: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981)."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


@lru_cache(maxsize=256)
def matrix(sampling: Sampling, size: int, out: int, scale: float, roi: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """Coefficients (out, size) of one axis, float64. Rows of cells outside a crop are zero: they hold a constant."""
    a = np.zeros((out, size))
    rows = np.arange(out)
    rounded = coordinates(sampling.coordinates, size, out, scale, roi, np.float32)
    if sampling.mode == "nearest":
        a[rows, np.clip(_nearest(rounded, sampling.nearest, scale), 0, size - 1)] = 1
    else:
        # These formulas jump nowhere, so they need not repeat the runtime's rounding.
        at = coordinates(sampling.coordinates, size, out, scale, roi, np.float64)
        stretch = max(1 / scale, 1.0) if sampling.antialias else 1.0
        reach = ceil((2 if sampling.mode == "cubic" else 1) * stretch)
        cells = np.floor(at)[:, None].astype(np.int64) + np.arange(1 - reach, reach + 1)
        distance = (cells - at[:, None]) / stretch
        weights = _keys(distance, sampling.cubic_a) if sampling.mode == "cubic" else _triangle(distance)
        if sampling.exclude_outside:
            weights = np.where((cells >= 0) & (cells < size), weights, 0.0)
        total = weights.sum(1, keepdims=True)
        weights = weights / np.where(total == 0, 1.0, total)
        np.add.at(a, (rows[:, None], np.clip(cells, 0, size - 1)), weights)
    if sampling.coordinates == "tf_crop_and_resize":
        a[(rounded < 0) | (rounded > size - 1)] = 0
    return a


def average_of(a: np.ndarray) -> np.ndarray:
    """The positive part of the coefficients, each row scaled to sum to one; a row of zeros stays."""
    positive = np.maximum(a, 0)
    total = positive.sum(1, keepdims=True)
    return positive / np.where(total == 0, 1.0, total)


def _factors(node: Node, at: At) -> list[tuple[int, float, tuple[float, float]]]:
    """For each resized axis, from the end: scale and region of interest."""
    shape = at.shape(0)
    rank = len(shape)
    axes = [a % rank for a in node.attr("axes") or range(rank)]
    roi, scales, sizes = np.zeros(0), None, None
    policy = node.attr("keep_aspect_ratio_policy", "stretch")
    if node.op_type == "Resize" and node.opset >= 11:
        given = at.host(1)
        roi = roi if given is None else np.asarray(given, np.float64)
        if not node.has(3):
            scales = at.host(2)
        elif policy == "stretch":
            # They are the output's, whatever computes them; the batch, an open axis, stays as it is.
            sizes = [size if isinstance(size, int) else 1 for size in (at.output_shape()[a] for a in axes)]
        else:
            sizes = at.ints(3)
    else:
        scales = at.host(1) if node.has(1) else node.attr("scales")
    if sizes:
        # A symbolic axis, the batch, stays as it is.
        lengths = [shape[a] if isinstance(shape[a], int) else size for a, size in zip(axes, sizes, strict=True)]
        factors = np.asarray(sizes, np.float32) / np.asarray(lengths, np.float32)
        if policy != "stretch":
            factors[:] = factors.min() if policy == "not_larger" else factors.max()
    else:
        factors = np.asarray(scales, np.float32)
    n = len(axes)
    regions = [(float(roi[i]), float(roi[n + i])) if roi.size == 2 * n else (0.0, 1.0) for i in range(n)]
    return [(a - rank, float(f), region) for a, f, region in zip(axes, factors, regions, strict=True)]


def _interpolation(node: Node, sampling: Sampling) -> Operator:
    def matrices(at: At, averaged: bool) -> list[tuple[int, Array]]:
        """(axis, coefficients) of each axis that is resampled.

        Whatever the scales, ONNX Runtime copies where no size changes, and with antialias each axis that keeps its.
        """
        found: list[tuple[int, Array]] = []
        if at.shape(0) == at.output_shape():
            return found
        for axis, scale, roi in _factors(node, at):
            size, out = at.shape(0)[axis], at.output_shape()[axis]
            if size == out and (scale == 1 or sampling.antialias):
                continue
            a = matrix(sampling, size, out, scale, roi)
            found.append((axis, at.ops.asarray(average_of(a) if averaged else a)))
        return found

    def forward(at: At, x: Array) -> Array:
        for axis, a in matrices(at, averaged=sampling.mode == "cubic"):
            x = at.ops.along(x, a, axis)
        return x

    def back(at: At, r: Array, averaged: bool) -> Array:
        for axis, a in reversed(matrices(at, averaged)):
            r = at.ops.along(r, at.ops.swap(a), axis)
        return r

    signed = sampling.mode == "cubic"
    return Averaging(
        forward,
        lambda at, r: back(at, r, averaged=signed),
        gradient=(lambda at, r: back(at, r, averaged=False)) if signed else None,
    )


@operator("Upsample", since=7)
def upsample(node: Node) -> Operator:
    """Scales are an attribute at opsets 7 and 8, input 1 after."""
    return _interpolation(node, Sampling(node.attr("mode", "nearest"), "asymmetric", "simple"))


@operator("Resize", since=10)
def resize(node: Node) -> Operator:
    """Scales or sizes may be computed in the graph."""
    if node.opset < 11:
        return _interpolation(node, Sampling(node.attr("mode", "nearest"), "asymmetric", "simple"))
    return _interpolation(
        node,
        Sampling(
            node.attr("mode", "nearest"),
            node.attr("coordinate_transformation_mode", "half_pixel"),
            node.attr("nearest_mode", "round_prefer_floor"),
            float(node.attr("cubic_coeff_a", -0.75)),
            bool(node.attr("exclude_outside", 0)),
            bool(node.attr("antialias", 0)),
        ),
    )
