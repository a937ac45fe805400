"""Does a map lie on the object? Overlap with a mask or boxes, by area, by energy and by the highest cells.

A map may be signed and of any scale. Where it says nothing (it is constant) no cell is above a threshold and nothing is
hit; where the truth is empty there is nothing to find, and the result is NaN, which means leave out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcam.errors import UsageError

Array = np.ndarray
Box = Sequence[float]  # x, y, width, height, in pixels, as COCO has it


def scaled(heat: Array) -> Array:
    """The map stretched to 0..1; zeros where it is constant."""
    heat = np.asarray(heat, np.float64)
    low, high = heat.min(), heat.max()
    return np.zeros_like(heat) if high <= low else (heat - low) / (high - low)


def above(heat: Array, part: float) -> Array:
    """The mask where the stretched map is at least `part` of its maximum; empty where the map is constant."""
    m = scaled(heat)
    mask: Array = (m >= part) & (m > 0)
    return mask


def largest(heat: Array, share: float) -> Array:
    """The mask of the `share` of cells with the highest values; of equal values those that a fixed shuffle puts first,
    so that a tie favours no corner. Empty where the map is constant."""
    flat = np.asarray(heat, np.float64).ravel()
    mask = np.zeros(flat.size, bool)
    if flat.size and flat.max() > flat.min():
        shuffled = np.random.default_rng(0).permutation(flat.size)
        order = shuffled[np.argsort(-flat[shuffled], kind="stable")]
        mask[order[: round(share * flat.size)]] = True
    return mask.reshape(np.shape(heat))


def iou(mask: Array, truth: Array) -> float:
    """Intersection over union of two masks."""
    if not truth.any():
        return float("nan")
    return float((mask & truth).sum() / (mask | truth).sum())


def box_mask(boxes: Sequence[Box], size: tuple[int, int]) -> Array:
    """The union of boxes as a mask of `size` (height, width): the cells whose centres lie inside."""
    ys, xs = (np.arange(n) + 0.5 for n in size)
    mask = np.zeros(size, bool)
    for x, y, width, height in boxes:
        mask |= ((ys >= y) & (ys < y + height))[:, None] & ((xs >= x) & (xs < x + width))[None]
    return mask


def box_of(mask: Array) -> Box | None:
    """The box around the largest connected part of a mask (cells that share a side); None where it is empty.

    Raises:
        UsageError: SciPy is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError:
        raise UsageError("boxes of maps need SciPy: pip install 'onnxcam[evaluate]'") from None
    parts, count = ndimage.label(mask)
    if not count:
        return None
    sizes = np.bincount(parts.ravel())[1:]
    ys, xs = ndimage.find_objects(parts)[int(sizes.argmax())]
    return [xs.start, ys.start, xs.stop - xs.start, ys.stop - ys.start]


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(wide, 0.0) * max(high, 0.0)
    whole = a[2] * a[3] + b[2] * b[3] - shared
    return shared / whole if whole > 0 else 0.0


def best_box_iou(heat: Array, boxes: Sequence[Box], part: float = 0.25) -> float:
    """The box around the largest part of the map above `part` of its maximum, against the box it fits best."""
    if not boxes:
        return float("nan")
    found = box_of(above(heat, part))
    return 0.0 if found is None else max(box_iou(found, box) for box in boxes)


def hit(heat: Array, truth: Array, tolerance: int = 0) -> float:
    """1 where the highest cell lies on the object, or no further from it than `tolerance` cells (the pointing game,
    Zhang et al. 2018, has 15); of several highest cells the share that does."""
    if not truth.any():
        return float("nan")
    heat = np.asarray(heat, np.float64)
    if heat.max() <= heat.min():
        return 0.0
    ys, xs = np.nonzero(heat == heat.max())
    on_y, on_x = np.nonzero(truth)
    near = [np.hypot(on_y - y, on_x - x).min() <= tolerance for y, x in zip(ys, xs, strict=True)]
    return float(np.mean(near))


def energy_inside(heat: Array, truth: Array) -> float:
    """The share of the map's positive part on the object (Wang et al. 2020; as relevance mass accuracy, Arras et al.
    2022); 0 where nothing is positive."""
    if not truth.any():
        return float("nan")
    positive = np.maximum(np.asarray(heat, np.float64), 0)
    total = positive.sum()
    return float(positive[truth].sum() / total) if total > 0 else 0.0


def rank_accuracy(heat: Array, truth: Array) -> float:
    """The share of the K highest cells that lie on the object, K its size (Arras et al. 2022)."""
    if not truth.any():
        return float("nan")
    return float(truth[largest(heat, truth.mean())].sum() / truth.sum())
