"""Is a map faithful to the model? What the score does when the picture is changed where the map is high or low.

`Score` maps versions of one input, (count, *input.shape), to the score of one class, (count,): a probability for drops
and curves, a logit where attributions are summed. Masks multiply the input as the model takes it (normalised input
space), or give way to a `flat` input. The axes of a map are the last two of the input, channels before them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.metrics.localisation import largest, scaled

Array = np.ndarray
Score = Callable[[Array], Array]
NEIGHBOURS = {(0, 1): 1 / 6, (1, 0): 1 / 6, (1, 1): 1 / 12, (1, -1): 1 / 12}  # Rong et al. 2022; the others by symmetry


@dataclass(frozen=True)
class Drop:
    """The score of one picture before and behind a mask."""

    before: float
    after: float

    @property
    def drop(self) -> float:
        """max(0, before - after) / before, a part of 1: Average Drop is its mean (Chattopadhay et al. 2018)."""
        return max(self.before - self.after, 0.0) / max(self.before, 1e-30)

    @property
    def increase(self) -> float:
        """1 where the score rises: Average Increase is its mean."""
        return float(self.after > self.before)


def soft_drop(score: Score, x: Array, heat: Array) -> Drop:
    """Behind the map itself, stretched to 0..1 (the paper's)."""
    return _drop(score, x, scaled(heat))


def half_drop(score: Score, x: Array, heat: Array) -> Drop:
    """Behind the half of the picture with the highest values (AD50): the same area for every map, of any scale."""
    return _drop(score, x, largest(heat, 0.5).astype(np.float64))


def _drop(score: Score, x: Array, mask: Array) -> Drop:
    before, after = score(np.stack([x, x * mask.astype(x.dtype)]))
    return Drop(float(before), float(after))


def curve(score: Score, start: Array, end: Array, heat: Array, steps: int = 20, lowest_first: bool = False) -> Array:
    """Scores (steps + 1,) while `start` becomes `end`, the highest cells of the map first.

    Deletion runs from the picture to a flat input, insertion from a blurred picture to the picture (Petsiuk et al.
    2018); pixel flipping is deletion without the area (Bach et al. 2015).
    """
    shares = np.linspace(0, 1, steps + 1)
    rank = -np.asarray(heat, np.float64) if lowest_first else np.asarray(heat, np.float64)
    versions = []
    for share in shares:
        mask = _changed(rank, share)
        versions.append(np.where(mask, end, start))
    return np.asarray(score(np.stack(versions).astype(start.dtype)), np.float64)


def _changed(rank: Array, share: float) -> Array:
    if share >= 1:
        return np.ones(rank.shape, bool)
    flat = rank if rank.max() > rank.min() else np.random.default_rng(0).random(rank.shape)
    return largest(flat, share)


def area(scores: Array) -> float:
    """The area under a curve over 0..1, by trapezoids."""
    return float(np.trapezoid(scores, dx=1 / (len(scores) - 1)))


def blurred(x: Array, sigma: float = 10.0) -> Array:
    """The picture behind a Gaussian of `sigma` cells, to insert into.

    Raises:
        UsageError: SciPy is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError:
        raise UsageError("blurring needs SciPy: pip install 'onnxcam[evaluate]'") from None
    widths = [0.0] * (x.ndim - 2) + [sigma, sigma]
    return np.asarray(ndimage.gaussian_filter(x.astype(np.float64), widths), x.dtype)


def road(score: Score, x: Array, heat: Array, share: float, lowest_first: bool = False, seed: int = 0) -> float:
    """What the score loses when the `share` of cells with the highest values is filled in from its surroundings.

    Filled by noisy linear imputation (ROAD, Rong et al. 2022): each cell the weighted mean of its eight neighbours, all
    solved at once, plus noise of standard deviation 0.01; so that nothing but the information is gone.
    """
    rank = -np.asarray(heat, np.float64) if lowest_first else np.asarray(heat, np.float64)
    before, after = score(np.stack([x, imputed(x, _changed(rank, share), seed=seed)]))
    return float(before - after)


def imputed(x: Array, gone: Array, noise: float = 0.01, seed: int = 0) -> Array:
    """The input (..., H, W) with the cells `gone` (H, W) filled in from those around them.

    Raises:
        UsageError: SciPy is not installed.
    """
    try:
        from scipy.sparse import csr_array
        from scipy.sparse.linalg import spsolve
    except ImportError:
        raise UsageError("ROAD needs SciPy: pip install 'onnxcam[evaluate]'") from None
    out = x.astype(np.float64)
    count = int(gone.sum())
    if not count:
        return x.copy()
    height, width = gone.shape
    number = np.full(gone.shape, -1)
    number[gone] = np.arange(count)
    ys, xs = np.nonzero(gone)
    channels = out.reshape(-1, height, width)
    known, total = np.zeros((count, len(channels))), np.zeros(count)
    rows, columns, values = [], [], []
    for (dy, dx), weight in {**NEIGHBOURS, **{(-a, -b): w for (a, b), w in NEIGHBOURS.items()}}.items():
        ny, nx = ys + dy, xs + dx
        inside = (ny >= 0) & (ny < height) & (nx >= 0) & (nx < width)
        total[inside] += weight
        here = np.flatnonzero(inside)
        also = number[ny[here], nx[here]]
        rows.append(here[also >= 0])
        columns.append(also[also >= 0])
        values.append(np.full(int((also >= 0).sum()), -weight))
        there = here[also < 0]
        known[there] += weight * channels[:, ny[there], nx[there]].T
    rows.append(np.arange(count))
    columns.append(np.arange(count))
    values.append(total)
    matrix = csr_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(count, count))
    filled = np.zeros_like(known)
    if not gone.all():
        filled = np.asarray(spsolve(matrix.tocsc(), known)).reshape(count, -1)
    filled = filled + noise * np.random.default_rng(seed).standard_normal(filled.shape)
    channels[:, ys, xs] = filled.T
    return channels.reshape(x.shape).astype(x.dtype)


def sensitivity_n(score: Score, x: Array, flat: Array, heat: Array, n: int, samples: int = 50, seed: int = 0) -> float:
    """Correlation of the map's sum over n random cells with what the score loses without them (Ancona et al. 2018).

    NaN where one of the two does not vary.
    """
    rng = np.random.default_rng(seed)
    sums, versions = [], []
    for _ in range(samples):
        picked = np.zeros(heat.size, bool)
        picked[rng.choice(heat.size, n, replace=False)] = True
        gone = picked.reshape(heat.shape)
        sums.append(float(np.asarray(heat, np.float64)[gone].sum()))
        versions.append(np.where(gone, flat, x))
    fall = score(x[None])[0] - np.asarray(score(np.stack(versions).astype(x.dtype)), np.float64)
    if np.ptp(fall) == 0 or np.ptp(sums) == 0:
        return float("nan")
    return float(np.corrcoef(sums, fall)[0, 1])


def infidelity(
    score: Score, x: Array, attribution: Array, samples: int = 50, noise: float = 0.1, seed: int = 0
) -> float:
    """Mean of (sum of I times attribution - (score(x) - score(x - I)))^2 over noise I (Yeh et al. 2019).

    `attribution` has the input's shape. `noise` is the standard deviation of I in the input's units. Attributions may
    be of any scale: they are multiplied with what makes the mean smallest, as the paper allows.
    """
    rng = np.random.default_rng(seed)
    moves = noise * rng.standard_normal((samples, *x.shape))
    expected = (moves * attribution).reshape(samples, -1).sum(1)
    fall = score(x[None])[0] - np.asarray(score((x - moves).astype(x.dtype)), np.float64)
    square = float((expected**2).mean())
    scale = float((expected * fall).mean()) / square if square > 0 else 0.0
    return float(((scale * expected - fall) ** 2).mean())
