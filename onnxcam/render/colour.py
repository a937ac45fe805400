"""From a map's raw values to colours, without a plotting library.

A map is drawn as one of three kinds: "positive" (0 to its largest value), "signed" (symmetric about 0) or "minmax"
(its smallest to its largest value). `normalise` scales it accordingly, `colours` looks the scaled values up in a
colour map.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from onnxcam.errors import UsageError

Kind = Literal["auto", "positive", "signed", "minmax"]
KINDS = ("auto", "positive", "signed", "minmax")

# From this share of the largest absolute value on, a negative part is worth a second colour; less is hardly seen.
SIGNED_FROM = 0.1


class Scaled(NamedTuple):
    """A map scaled for the eye: `values` in [0, 1], or [-1, 1] for kind "signed"; raw `vmin` and `vmax` are its ends.

    `beyond`: larger raw values exist and are drawn as `vmax`.
    """

    values: np.ndarray
    vmin: float
    vmax: float
    kind: str
    beyond: bool


def normalise(heat: np.ndarray, kind: Kind = "auto", percentile: float = 100.0) -> Scaled:
    """Scale a map of finite values, any shape, for colouring.

    "positive": 0 .. max, what is negative counts as 0. "signed": -m .. m, m the largest absolute value, so that 0
    stays neutral. "minmax": min .. max, as the authors of Relevance-CAM draw it; differences in an almost flat map
    look large then. "auto": "signed" where the smallest value is below -10 % of m, else "positive". `percentile`
    below 100 takes m or the maximum from that percentile of the absolute values, so that a few extreme points do not
    hide the rest.

    A map without differences to show (constant 0, or constant for "minmax") gives zeros, never NaN. Raises UsageError
    for an unknown kind.
    """
    if kind not in KINDS:
        raise UsageError(f"there is no kind of map {kind!r}; there is {', '.join(KINDS)}")
    heat = np.asarray(heat, dtype=np.float64)
    low, high = float(heat.min()), float(heat.max())
    largest = max(abs(low), abs(high))
    if kind == "auto":
        kind = "signed" if low < -SIGNED_FROM * largest else "positive"
    top = float(np.percentile(np.abs(heat), percentile)) if percentile < 100 else largest
    top = top or largest  # a map of mostly zeros keeps its few values
    vmin, vmax = {
        "positive": (0.0, max(min(high, top), 0.0)),
        "signed": (-top, top),
        "minmax": (low, max(min(high, top), low)),
    }[kind]
    beyond = (largest if kind == "signed" else high) > vmax
    # what stands at 0 after scaling, and how much stands at 1
    zero, one = (0.0, top) if kind == "signed" else (vmin, vmax - vmin)
    return Scaled(np.clip(_ratio(heat - zero, one), -1 if kind == "signed" else 0, 1), vmin, vmax, kind, beyond)


def colours(values: np.ndarray, kind: str) -> np.ndarray:
    """RGB 0..255 as float64 (..., 3) for values as `normalise` gives them."""
    points = SIGNED if kind == "signed" else POSITIVE
    at = np.linspace(-1 if kind == "signed" else 0, 1, len(points))
    return np.stack([np.interp(values, at, points[:, channel]) for channel in range(3)], axis=-1)


def _ratio(values: np.ndarray, by: float) -> np.ndarray:
    # Dividing by the largest power of two first keeps subnormal ranges from overflowing.
    if by == 0:
        return np.zeros_like(values)
    mantissa, exponent = np.frexp(by)
    ratio: np.ndarray = np.ldexp(values, -exponent) / mantissa
    return ratio


def _points(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(-1, 3).astype(np.float64)


# 33 points of matplotlib's "inferno" (CC0), which is perceptually uniform and can be read by colour-blind people, up to
# 0.88 of it: the pale end beyond would be swallowed by bright photos.
POSITIVE = _points(
    "000004030210090620110a301b0c41260c51320a5e3f09664a0c6b560f6d61146e6c186e771c6d82206c8d2469992865a42c61"
    "ae305cb93656c33c4fcd4248d64a40de5238e55c30ec6627f1711ef57d15f9890cfb9606fca309fcb115fbbe24f8cc36"
)

# Blue, white, red: both arms fall in OKLab lightness from 1 to 0.48 at the same pace (hues 257 and 27 degrees), so that
# values of the same size look equally strong. White is exactly 0.
SIGNED = _points(
    "085ab81863c3246ecd3078d73d82e04a8de85897ef67a2f576adfa85b7fd96c2ffa6ccffb7d7ffc9e1ffdbebffedf5ffffffff"
    "fff0edffe0dcffd1caffc2b9ffb3a9fea499fa958af5867bf0786ce96a5fe15c52d84e46ce413bc33530b82826ac1a1c"
)
