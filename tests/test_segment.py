"""Masks, run lengths and outlines of the object.

Oracles: the definitions by hand; a mask drawn again from its run lengths and from its outlines by Pillow.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from onnxcam.errors import UsageError
from onnxcam.segment import Segment, parse, segment

HEAT = np.random.default_rng(0).random((6, 8))


def test_the_threshold_is_the_mean_and_a_standard_deviation_of_the_enlarged_map() -> None:
    found = segment(HEAT, (6, 8))
    np.testing.assert_array_equal(found.mask, HEAT.mean() + HEAT.std() < HEAT)
    assert segment(HEAT, (60, 80)).mask.shape == (60, 80)


def test_a_quantile_keeps_its_part() -> None:
    assert abs(segment(HEAT, (120, 160), 0.8).mask.mean() - 0.2) < 1e-3


def test_a_constant_map_has_no_object() -> None:
    found = segment(np.ones((4, 4)), (8, 8))
    assert not found.mask.any() and found.bbox == [0, 0, 0, 0] and found.polygons() == []
    assert found.rle() == {"size": [8, 8], "counts": [64]}


@pytest.mark.parametrize("seed", range(5))
def test_run_lengths_and_outlines_draw_the_mask_again(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = segment(rng.random((5, 7)), (50, 70), 0.7)
    counts = found.rle()["counts"]
    flat = np.repeat(np.arange(len(counts)) % 2, counts).astype(bool)
    np.testing.assert_array_equal(flat.reshape(70, 50).T, found.mask)
    drawn = np.zeros(found.mask.shape, int)
    for outline in found.polygons():
        canvas = Image.new("1", (700, 500))
        ImageDraw.Draw(canvas).polygon([10 * v for v in outline], fill=1)
        drawn = drawn ^ (np.asarray(canvas).reshape(50, 10, 70, 10).mean((1, 3)) > 0.5)
    assert (drawn.astype(bool) != found.mask).mean() < 0.01
    ys, xs = np.nonzero(found.mask)
    assert found.bbox == [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
    assert found.to_json()["area"] == found.mask.sum()


def test_a_mask_that_begins_with_the_object_has_an_empty_first_run() -> None:
    assert Segment(np.ones((2, 3), bool), 0.0).rle()["counts"] == [0, 6]


@pytest.mark.parametrize(("text", "value"), [("mean-std", None), ("q0.8", 0.8), ("0.25", 0.25)])
def test_how_to_segment_is_read(text: str, value: float | None) -> None:
    assert parse(text) == value


@pytest.mark.parametrize("text", ["", "q2", "otsu", "nan", "0"])
def test_how_not_to_segment_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="mean-std or a quantile between 0 and 1"):
        parse(text)
