"""How much two maps of one picture agree: order, structure, where they are high, where their weight lies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.methods.upsample import upsampled
from onnxcam.metrics.localisation import largest

Array = np.ndarray
TOP = 0.2  # the part of the cells that `top_iou` compares
SSIM_SIDE = 28  # smaller maps are enlarged for `structure`, whose window is seven cells wide


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's, ties sharing their rank; 1 for two constant maps, 0 for one beside another."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float(np.ptp(a) == np.ptp(b))
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: Array) -> Array:
    """Ranks of all cells, ties shared."""
    _, places, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Array = (ends - (counts - 1) / 2)[places]
    return means


def structure(a: Array, b: Array) -> float:
    """Structural similarity (SSIM, Wang et al. 2004) of two maps, each divided by its largest absolute value.

    Raises:
        UsageError: scikit-image is not installed.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        raise UsageError("SSIM needs scikit-image: pip install 'onnxcam[audit]'") from None
    size = [max(n, SSIM_SIDE) for n in a.shape]
    one, other = (upsampled(m / max(np.abs(m).max(), 1e-30), size) for m in (a, b))
    span = 2.0 if min(one.min(), other.min()) < 0 else 1.0
    return float(structural_similarity(one, other, win_size=7, data_range=span))


def top_iou(a: Array, b: Array, share: float = TOP) -> float:
    """Intersection over union of the `share` of cells where each is highest; 1 for two constant maps."""
    first, second = largest(a, share), largest(b, share)
    whole = (first | second).sum()
    return float((first & second).sum() / whole) if whole else 1.0


def shift(a: Array, b: Array) -> float:
    """How far the centre of mass of the positive part moves, as a share of the picture's diagonal; NaN where one map is
    positive nowhere."""
    centres = [centre(m) for m in (a, b)]
    if centres[0] is None or centres[1] is None:
        return float("nan")
    return float(np.hypot(*(centres[0] - centres[1])) / np.sqrt(2))


def centre(heat: Array) -> Array | None:
    """(y, x) of the centre of mass of the positive part, each 0..1; None where nothing is positive."""
    positive = np.maximum(heat, 0)
    total = positive.sum()
    if total <= 0:
        return None
    ys, xs = ((np.arange(n) + 0.5) / n for n in heat.shape)
    return np.array([(positive.sum(1) * ys).sum(), (positive.sum(0) * xs).sum()]) / total


def in_window(heat: Array, window: Sequence[float], wanted: Sequence[float], size: tuple[int, int]) -> Array:
    """A map that lies over `window` of a picture, sampled bilinearly over `wanted`, in `size` (height, width) cells;
    beyond its window it goes on as at its edge. Windows are left, top, right, bottom."""
    if np.allclose(window, wanted, atol=0.5):
        return upsampled(heat, size)
    height, width = heat.shape
    left, top, right, bottom = wanted
    xs = left + (np.arange(size[1]) + 0.5) * (right - left) / size[1]
    ys = top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0]
    rows = _weights((ys - window[1]) / (window[3] - window[1]) * height - 0.5, height)
    columns = _weights((xs - window[0]) / (window[2] - window[0]) * width - 0.5, width)
    return np.asarray(rows @ heat @ columns.T)


def _weights(places: Array, count: int) -> Array:
    """(len(places), count): what each place, in cells, takes of each of them."""
    at = np.clip(places, 0, count - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, count - 1)
    matrix = np.zeros((len(at), count))
    np.add.at(matrix, (np.arange(len(at)), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(len(at)), high), at - low)
    return matrix


def likeness(a: Array, b: Array) -> float:
    """1 - |a - b| / (|a| + |b|) in the Euclidean norm: 1 for equal arrays, 0 for opposite ones, of any shape."""
    whole = np.linalg.norm(a) + np.linalg.norm(b)
    return float(1 - np.linalg.norm(np.asarray(a, np.float64) - b) / whole) if whole > 0 else 1.0
