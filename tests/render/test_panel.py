"""A panel shows all its pictures, whole, in reading order."""

import numpy as np
import pytest
from PIL import Image

from onnxcam.render.panel import panel

COLOURS = [(200, 0, 0), (0, 150, 0), (0, 0, 200), (90, 0, 90), (0, 90, 90)]
SIZES = [(60, 40), (100, 30), (20, 80), (50, 50), (60, 60)]


def tiles():
    return [Image.new("RGB", size, colour) for size, colour in zip(SIZES, COLOURS, strict=True)]


def where(figure, colour):
    rows, columns = np.nonzero((np.asarray(figure) == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, len(rows)


@pytest.mark.parametrize("columns", [None, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("titles", [(), ["a", "b", "c", "d", "a very long title " * 9]])
def test_every_picture_is_there_whole(columns, titles):
    figure = panel(tiles(), titles, columns)
    for size, colour in zip(SIZES, COLOURS, strict=True):
        left, top, right, bottom, count = where(figure, colour)
        assert (right - left, bottom - top) == size and count == size[0] * size[1]


def test_pictures_are_in_reading_order():
    figure = panel(tiles(), columns=2)
    boxes = [where(figure, colour) for colour in COLOURS]
    assert boxes[0][2] <= boxes[1][0] and boxes[0][3] <= boxes[2][1] and boxes[2][3] <= boxes[4][1]


def test_titles_stand_above_their_pictures():
    figure = panel([Image.new("RGB", (100, 60), "red")], ["title"])
    _, top, *_ = where(figure, (255, 0, 0))
    assert (np.asarray(figure)[:top].min(axis=2) < 128).any()


def test_a_panel_needs_pictures_and_a_title_for_each():
    with pytest.raises(ValueError, match="not 0"):
        panel([])
    with pytest.raises(ValueError, match="not 5 and 1"):
        panel(tiles(), ["one"])
