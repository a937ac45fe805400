"""Localisation metrics: known answers, edge cases, and loops over cells by definition; boxes against torchvision's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from onnxcam.metrics import complexity, localisation as m

RNG = np.random.default_rng(0)
TRUTH = np.zeros((8, 10), bool)
TRUTH[2:5, 3:8] = True
PERFECT = np.where(TRUTH, 1.0 + 0.1 * RNG.random(TRUTH.shape), 0.0)
METRICS = {
    "iou at 25 %": lambda h, t: m.iou(m.above(h, 0.25), t),
    "iou of the truth's share": lambda h, t: m.iou(m.largest(h, t.mean()), t),
    "hit": m.hit,
    "energy": m.energy_inside,
    "rank": m.rank_accuracy,
}


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_map_scores_one_and_its_opposite_nothing(name: str) -> None:
    assert METRICS[name](PERFECT, TRUTH) == pytest.approx(1)
    assert METRICS[name](np.where(TRUTH, 0.0, 1.0 + RNG.random(TRUTH.shape)), TRUTH) == 0


@pytest.mark.parametrize("name", METRICS)
def test_without_an_object_there_is_nothing_to_find(name: str) -> None:
    assert math.isnan(METRICS[name](PERFECT, np.zeros_like(TRUTH)))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_constant_map_finds_nothing(name: str, value: float) -> None:
    assert METRICS[name](np.full(TRUTH.shape, value), TRUTH) == 0


@pytest.mark.parametrize("name", ["hit", "energy", "rank", "iou of the truth's share"])
def test_an_object_over_the_whole_picture_is_always_found(name: str) -> None:
    assert METRICS[name](RNG.random(TRUTH.shape), np.ones_like(TRUTH)) == pytest.approx(1)


def test_overlap_and_energy_by_their_definitions() -> None:
    heat = RNG.standard_normal(TRUTH.shape)
    low, high = heat.min(), heat.max()
    cells = {(y, x) for y, x in np.ndindex(heat.shape) if (heat[y, x] - low) / (high - low) >= 0.25}
    truth = {(y, x) for y, x in np.ndindex(heat.shape) if TRUTH[y, x]}
    assert m.iou(m.above(heat, 0.25), TRUTH) == pytest.approx(len(cells & truth) / len(cells | truth))
    inside = sum(max(heat[at], 0) for at in truth)
    assert m.energy_inside(heat, TRUTH) == pytest.approx(inside / sum(max(v, 0) for v in heat.ravel()))
    best = sorted(np.ndindex(heat.shape), key=lambda at: -heat[at])[: len(truth)]
    assert m.rank_accuracy(heat, TRUTH) == pytest.approx(len(set(best) & truth) / len(truth))


def test_ties_are_shared_out_over_the_picture() -> None:
    heat = np.zeros((40, 40))
    heat[0, 0] = 1
    mask = m.largest(heat, 0.5)
    assert mask.sum() == 800 and mask[0, 0]
    quarters = [mask[:20, :20], mask[:20, 20:], mask[20:, :20], mask[20:, 20:]]
    assert all(150 < q.sum() < 250 for q in quarters)


@pytest.mark.parametrize(("tolerance", "found"), [(0, 0.0), (1, 0.0), (2, 1.0)])
def test_the_pointing_game_forgives_a_little(tolerance: int, found: float) -> None:
    heat = np.zeros(TRUTH.shape)
    heat[0, 4] = 1  # two cells above the object
    assert m.hit(heat, TRUTH, tolerance) == found


def test_of_several_highest_cells_the_share_counts() -> None:
    heat = np.zeros(TRUTH.shape)
    heat[3, 4] = heat[0, 0] = 1
    assert m.hit(heat, TRUTH) == 0.5


def test_boxes_become_masks_and_masks_boxes() -> None:
    assert (m.box_mask([(3, 2, 5, 3)], TRUTH.shape) == TRUTH).all()
    assert m.box_of(TRUTH) == [3, 2, 5, 3]
    two = TRUTH.copy()
    two[7, 0] = True
    assert m.box_of(two) == [3, 2, 5, 3]
    diagonal = np.eye(4, dtype=bool)
    assert m.box_of(diagonal) is not None and m.box_of(diagonal)[2:] == [1, 1]
    assert m.box_of(np.zeros_like(TRUTH)) is None
    assert m.best_box_iou(PERFECT, [(0, 0, 2, 2), (3, 2, 5, 3)]) == 1
    assert m.best_box_iou(np.ones(TRUTH.shape), [(0, 0, 2, 2)]) == 0
    assert math.isnan(m.best_box_iou(PERFECT, []))


def test_overlap_of_boxes_is_torchvisions() -> None:
    from torchvision.ops import box_iou

    boxes = RNG.uniform(0, 10, (20, 4))
    corners = torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
    expected = box_iou(corners, corners).numpy()
    found = [[m.box_iou(a, b) for b in boxes] for a in boxes]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_entropy_is_scipys() -> None:
    from scipy.stats import entropy

    heat = RNG.standard_normal((5, 6))
    assert complexity.entropy(heat) == pytest.approx(entropy(np.abs(heat).ravel(), base=2))
    assert complexity.entropy(np.ones((4, 8))) == 5
    assert complexity.entropy(np.eye(4)[:1]) == 0


def test_sparseness_is_the_mean_difference_of_pairs() -> None:
    heat = RNG.standard_normal((5, 6))
    size = np.abs(heat).ravel()
    pairs = np.abs(size[:, None] - size[None]).mean()
    assert complexity.sparseness(heat) == pytest.approx(pairs / (2 * size.mean()))
    assert complexity.sparseness(np.ones((3, 3))) == pytest.approx(0)
    assert complexity.sparseness(np.eye(10)[:1]) == pytest.approx(0.9)
    assert complexity.sparseness(np.zeros((3, 3))) == 0
