"""Two objects in one picture, two classes: the table of docs/methods.md, which says where each map lies.

Known answer: the left half is the cat, the right half the cup. Figures are those of the page, to its last digit.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import onnxcam

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
TABLE = {
    name: re.findall(r"([01]\.\d\d) / ([01]\.\d\d)", line)
    for line in PAGE.read_text().splitlines()
    if line.startswith("| `") and line.count(" / ") == 3
    for name in re.findall(r"`([^`]+)`", line.split("|")[1])
}


@pytest.fixture(scope="module")
def model(shipped_model: Path) -> onnxcam.Model:
    found = onnxcam.load(shipped_model)
    found.preprocess = found.preprocess.override(resize="warp")
    return found


def test_the_page_has_the_table() -> None:
    assert len(TABLE) == 10 and all(len(row) == 3 for row in TABLE.values())


@pytest.mark.parametrize("method", TABLE)
def test_a_map_lies_where_the_page_says(model: onnxcam.Model, method: str) -> None:
    e = model.explain(
        PAGE.parent / "images" / "cat-and-cup.jpg", ["-3", "-2", "-1"], ["Egyptian cat", "espresso"], method=method
    )
    for heat, stated in zip(e.maps.values(), TABLE[method], strict=True):
        cat, cup = np.maximum(heat[0], 0)
        half = heat.shape[-1] // 2
        shares = [
            own[:, side].sum() / max(own[:, :half].sum() + own[:, -half:].sum(), 1e-30)
            for own, side in ((cat, slice(None, half)), (cup, slice(-half, None)))
        ]
        np.testing.assert_allclose(shares, [float(s) for s in stated], atol=0.011)
