"""Weakly supervised segmentation: the object as the place where a map is high.

The map is enlarged to the picture that the model saw and cut at a threshold: the mean plus one standard deviation, as
in the Relevance-CAM authors' code, or a quantile.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from onnxcam.errors import UsageError
from onnxcam.methods.upsample import upsampled

MEAN_STD = "mean-std"


@dataclass(frozen=True)
class Segment:
    """A mask (h, w) of the picture that the model saw, and the value of the map that it was cut at."""

    mask: np.ndarray
    threshold: float

    @property
    def image(self) -> Image.Image:
        """White where the object is."""
        return Image.fromarray(self.mask.astype(np.uint8) * 255)

    @property
    def bbox(self) -> list[int]:
        """x, y, width, height, as COCO has it; zeros where there is nothing."""
        ys, xs = np.nonzero(self.mask)
        if not len(ys):
            return [0, 0, 0, 0]
        return [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]

    def rle(self) -> dict[str, Any]:
        """COCO's run lengths, not compressed: column by column, zeros first."""
        flat = self.mask.T.ravel().astype(np.int8)
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *edges, flat.size]).tolist()
        return {"size": list(self.mask.shape), "counts": runs if not (flat.size and flat[0]) else [0, *runs]}

    def polygons(self) -> list[list[float]]:
        """Outlines in pixels, x and y in turn, outer ones and holes alike.

        Raises:
            UsageError: contourpy is not installed.
        """
        require_outlines()
        from contourpy import contour_generator

        framed = np.pad(self.mask.astype(np.float64), 1)
        lines = contour_generator(z=framed).lines(0.5)
        # A cell's centre lies half a pixel from its corner, and the frame is one pixel wide.
        return [(np.asarray(line) - 0.5).round(2).ravel().tolist() for line in lines if len(line) > 3]

    def to_json(self) -> dict[str, Any]:
        return {
            "size": list(self.mask.shape),
            "threshold": self.threshold,
            "area": int(self.mask.sum()),
            "bbox": self.bbox,
            "segmentation_rle": self.rle(),
            "segmentation": self.polygons(),
        }


def require_outlines() -> None:
    """Refuse to go on without what outlines are drawn by.

    Raises:
        UsageError: contourpy is not installed.
    """
    if find_spec("contourpy") is None:
        raise UsageError("outlines need contourpy: pip install 'onnxcam[report]'")


def parse(text: str) -> float | None:
    """The quantile that a text means; None for the mean plus one standard deviation.

    Raises:
        UsageError: it means neither.
    """
    if text == MEAN_STD:
        return None
    try:
        value = float(text.removeprefix("q"))
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise UsageError(f"a map is segmented by {MEAN_STD} or a quantile between 0 and 1, q0.8 say, not {text!r}")
    return value


def segment(heat: np.ndarray, size: tuple[int, int], quantile: float | None = None) -> Segment:
    """Where a map (h, w) is above its threshold, at `size` (height, width)."""
    large = upsampled(heat.astype(np.float64), size)
    threshold = float(large.mean() + large.std()) if quantile is None else float(np.quantile(large, quantile))
    return Segment(large > threshold, threshold)
