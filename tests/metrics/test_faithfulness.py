"""Faithfulness metrics: closed forms of linear scores; captum and pytorch-grad-cam where they have the same.

Oracles: arithmetic by hand; a dense linear system by loops; captum's infidelity with the same noise.
"""

from __future__ import annotations

import math

import captum.metrics
import numpy as np
import pytest
import torch

from onnxcam.metrics import faithfulness as f

RNG = np.random.default_rng(1)
X = RNG.random((3, 6, 8))
W = RNG.standard_normal((3, 6, 8))


def linear(versions: np.ndarray) -> np.ndarray:
    return (versions * W).reshape(len(versions), -1).sum(1)


def bright(versions: np.ndarray) -> np.ndarray:
    """A probability: the mean of the left half."""
    return versions[..., :4].reshape(len(versions), -1).mean(1)


LEFT = np.tile([1.0] * 4 + [0.0] * 4, (6, 1))


def test_drops_by_hand() -> None:
    kept = f.soft_drop(bright, X, LEFT)
    assert kept.drop == 0 and kept.increase == 0
    lost = f.soft_drop(bright, X, 1 - LEFT)
    assert lost.drop == pytest.approx(1)
    half = f.soft_drop(bright, X, LEFT + 1)  # stretched before it is used
    assert half.drop == 0
    assert (
        f.Drop(0.2, 0.5).increase == 1 and f.Drop(0.2, 0.5).drop == 0 and f.Drop(0.4, 0.1).drop == pytest.approx(0.75)
    )
    assert f.half_drop(bright, X, LEFT).drop == 0
    assert f.half_drop(bright, X, -LEFT).drop == pytest.approx(1)
    assert f.soft_drop(bright, X, np.ones((6, 8))).drop == 1  # a constant map shows nothing


def test_a_curve_removes_the_highest_first() -> None:
    """With the exact contributions of a linear score as the map, each step removes the largest that are left."""
    contributions = (X * W).sum(0)
    scores = f.curve(linear, X, np.zeros_like(X), contributions, steps=48)
    ordered = np.sort(contributions.ravel())[::-1]
    np.testing.assert_allclose(scores, contributions.sum() - np.concatenate([[0], np.cumsum(ordered)]), atol=1e-9)
    last = f.curve(linear, X, np.zeros_like(X), contributions, steps=48, lowest_first=True)
    np.testing.assert_allclose(last, contributions.sum() - np.concatenate([[0], np.cumsum(ordered[::-1])]), atol=1e-9)
    assert f.area(scores) < f.area(last)
    inserted = f.curve(linear, np.zeros_like(X), X, contributions, steps=48)
    np.testing.assert_allclose(inserted, np.concatenate([[0], np.cumsum(ordered)]), atol=1e-9)


def test_the_area_of_a_line_is_its_middle() -> None:
    assert f.area(np.linspace(0.2, 0.8, 11)) == pytest.approx(0.5)


def test_a_constant_map_changes_cells_in_no_order() -> None:
    scores = f.curve(bright, X, np.zeros_like(X), np.ones((6, 8)), steps=4)
    assert scores[0] == pytest.approx(bright(X[None])[0]) and scores[-1] == 0
    assert (np.diff(scores) < 0).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputed_cells_are_the_weighted_mean_of_their_neighbours(share: float) -> None:
    gone = RNG.random((6, 8)) < share
    found = f.imputed(X, gone, noise=0.0)
    np.testing.assert_array_equal(found[:, ~gone], X[:, ~gone])
    for y, x in zip(*np.nonzero(gone), strict=True):
        around, total = np.zeros(3), 0.0
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                if (dy or dx) and 0 <= y + dy < 6 and 0 <= x + dx < 8:
                    weight = 1 / 12 if dy and dx else 1 / 6
                    around += weight * found[:, y + dy, x + dx]
                    total += weight
        np.testing.assert_allclose(found[:, y, x], around / total, atol=1e-9)


def test_imputation_is_that_of_pytorch_grad_cam() -> None:
    peer = pytest.importorskip("pytorch_grad_cam.metrics.road")
    gone = np.zeros((6, 8), bool)
    gone[2:4, 2:6] = True
    expected = peer.NoisyLinearImputer(noise=0.0)(torch.from_numpy(X), torch.from_numpy(1.0 - gone)).numpy()
    np.testing.assert_allclose(f.imputed(X, gone, noise=0.0)[:, ~gone], expected[:, ~gone])
    np.testing.assert_allclose(f.imputed(X, gone, noise=0.0), expected, atol=1e-6)


def test_road_orders_the_right_and_the_wrong_map() -> None:
    x = X * LEFT
    x[:, :, :4] = RNG.random((3, 6, 4))
    right = f.road(bright, x, LEFT, 0.4)
    assert abs(f.road(bright, x, LEFT, 0.0)) < 1e-9
    assert math.isfinite(right) and math.isfinite(f.road(bright, x, LEFT, 1.0))


@pytest.mark.parametrize("n", [1, 5, 20])
def test_exact_attributions_of_a_linear_score_have_a_sensitivity_of_one(n: int) -> None:
    flat = np.zeros_like(X)
    assert f.sensitivity_n(linear, X, flat, (X * W).sum(0), n) == pytest.approx(1)
    assert f.sensitivity_n(linear, X, flat, -(X * W).sum(0), n) == pytest.approx(-1)
    assert math.isnan(f.sensitivity_n(linear, X, flat, np.ones((6, 8)), n))


def test_infidelity_is_zero_for_the_weights_of_a_linear_score_and_captums_otherwise() -> None:
    assert f.infidelity(linear, X, 3 * W) == pytest.approx(0, abs=1e-15)
    attribution = RNG.standard_normal(X.shape)
    moves = 0.1 * np.random.default_rng(0).standard_normal((50, *X.shape))

    def perturb(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.from_numpy(moves)
        return noise, inputs - noise

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        return torch.sin((inputs * torch.from_numpy(W)).flatten(1)).sum(1)

    def score(versions: np.ndarray) -> np.ndarray:
        return forward(torch.from_numpy(versions)).numpy()

    expected = captum.metrics.infidelity(
        forward, perturb, torch.from_numpy(X)[None], torch.from_numpy(attribution)[None], n_perturb_samples=50,
        max_examples_per_batch=50, normalize=True,
    )  # fmt: skip
    assert f.infidelity(score, X, attribution) == pytest.approx(float(expected), rel=1e-6)
