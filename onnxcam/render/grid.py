"""A comparison as a figure for print: the picture, then maps, methods or classes down and layers across.

Each map has a scale of its own, since methods share no unit. What colour says is said again by a line around the upper
half of each map's range, fine maps smoothed, so that the figure can be read in greyscale.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from onnxcam.errors import UsageError
from onnxcam.files import write_atomically
from onnxcam.render.colour import normalise
from onnxcam.render.overlay import blend, enlarge, upsample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from onnxcam.compare import Comparison, Row

FORMATS = ("png", "pdf", "svg")
SIDE = 1.45  # inches of a square panel; others have its area
OUTLINED = 28  # cells along the shorter side of what a line is drawn around
TITLE, LABEL = 7.5, 8.0  # points
STYLE: Any = {"svg.fonttype": "none", "pdf.fonttype": 42, "font.family": "DejaVu Sans", "font.size": TITLE}


def grid(comparison: Comparison) -> Figure:
    """The figure.

    Raises:
        UsageError: matplotlib is not installed, or there is no picture to draw on.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise UsageError("figures need matplotlib: pip install 'onnxcam[report]'") from None
    view = comparison.explanation.pictures[0].view
    if view is None:
        raise UsageError("there is no picture to draw on: the input was an array")
    photo = enlarge(view)
    rows, columns = len(comparison.rows), len(comparison.columns) + 1
    several = len({row.method for row in comparison.rows}) > 1
    classes = len({row.label for row in comparison.rows}) > 1
    shape = (photo.width / photo.height) ** 0.5
    width, height = SIDE * shape, SIDE / shape
    with rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
        figure = Figure(figsize=(columns * width + 0.9, rows * height + 0.75), layout=layout)
        axes = figure.subplots(rows, columns, squeeze=False)
        shown = ""
        for i, row in enumerate(comparison.rows):
            for axis in axes[i]:
                axis.set_axis_off()
            new = row.label != shown
            shown = row.label
            if new:
                axes[i, 0].imshow(np.asarray(photo))
                axes[i, 0].set_title(f"{_short(row.label)}\n{row.probability:.1%}", fontsize=TITLE)
            for k, cell in enumerate(row.cells):
                axis = axes[i, k + 1]
                if cell.heat is None or cell.heat.ndim != 2:
                    axis.text(0.5, 0.5, "–", ha="center", va="center", transform=axis.transAxes, color="0.5")
                else:
                    _draw(axis, cell.heat, photo)
                if i == 0:
                    name, size = comparison.columns[k]
                    axis.set_title(f"{_short(name)}\n{size}", fontsize=TITLE)
            axes[i, 1].text(
                -0.04, 0.5, _row_label(row, several, classes), rotation=90, ha="right", va="center", fontsize=LABEL,
                transform=axes[i, 1].transAxes,
            )  # fmt: skip
    return figure


def _draw(axis: Axes, heat: np.ndarray, photo: object) -> None:
    axis.imshow(np.asarray(blend(photo, heat)))  # type: ignore[arg-type]
    large = upsample(_coarse(normalise(heat).values), photo.size)  # type: ignore[attr-defined]
    large = large / max(large.max(), 1e-9)
    if (normalise(heat).values > 0).any():
        for colour, wide in (("black", 1.4), ("white", 0.6)):
            axis.contour(large, levels=[0.5], colors=colour, linewidths=wide)


def _coarse(values: np.ndarray) -> np.ndarray:
    """A fine map as means of blocks: a line around every pixel says nothing."""
    step = max(1, min(values.shape) // OUTLINED)
    height, width = (n // step * step for n in values.shape)
    blocks: np.ndarray = values[:height, :width].reshape(height // step, step, width // step, step).mean((1, 3))
    return blocks


def _row_label(row: Row, several: bool, classes: bool) -> str:
    """The method; where it is the same in all rows, the class stands above the picture already."""
    return row.method if several or not classes else ""


def _short(text: str, most: int = 22) -> str:
    """The end of a long name: module paths differ there."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def save(figure: Figure, path: Path, dpi: int = 200) -> Path:
    """Write a figure; it appears whole or not at all.

    Raises:
        UsageError: the suffix names no format, or the place cannot be written to.
    """
    from matplotlib import rc_context

    kind = path.suffix.lower().lstrip(".")
    if kind not in FORMATS:
        raise UsageError(f"figures are written as {', '.join(FORMATS)}, and {path.name} is none of them")

    def write(stream: IO[bytes]) -> None:
        with rc_context(STYLE):
            figure.savefig(stream, format=kind, dpi=dpi)

    writer: Callable[[IO[bytes]], object] = write
    return write_atomically(path, writer)
