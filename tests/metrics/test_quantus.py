"""The metrics that Quantus has too, on arrays and on a small network: oracle Quantus 0.6.0 (Hedstroem et al. 2023).

Tolerances are rounding in float64, but where Quantus adds a constant of its own against division by zero: said there.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from exporters.torch_common import import_torchvision
from onnxcam.metrics import complexity, faithfulness as f, localisation

import_torchvision()  # Quantus imports torchvision, which wants its ops defined
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    quantus = pytest.importorskip("quantus", reason="Quantus is an oracle: pip install --no-deps quantus==0.6.0")

RNG = np.random.default_rng(3)
HEATS = [RNG.standard_normal((9, 11)), RNG.random((9, 11)), np.eye(9, 11), RNG.integers(-2, 3, (9, 11)).astype(float)]
TRUTHS = [RNG.random((9, 11)) < 0.3, np.ones((9, 11), bool), np.eye(9, 11, 2, dtype=bool)]


def quiet(metric, **options):
    return metric(disable_warnings=True, normalise=False, **options)


@pytest.mark.parametrize("truth", range(len(TRUTHS)))
@pytest.mark.parametrize("heat", range(len(HEATS)))
def test_localisation(heat: int, truth: int) -> None:
    a, s = HEATS[heat][None, None], TRUTHS[truth][None, None]
    positive = np.maximum(a, 0)  # ours is of the positive part; Quantus leaves that to the caller
    (mass,) = quiet(quantus.RelevanceMassAccuracy).evaluate_batch(a_batch=positive, s_batch=s)
    assert localisation.energy_inside(a[0, 0], s[0, 0]) == pytest.approx(mass, rel=1e-12)
    if len(np.unique(a)) == a.size:  # of equal values we take some at random, Quantus the first: not the same
        (rank,) = quiet(quantus.RelevanceRankAccuracy).evaluate_batch(a_batch=a, s_batch=s)
        assert localisation.rank_accuracy(a[0, 0], s[0, 0]) == pytest.approx(rank, rel=1e-12)
    (hit,) = quiet(quantus.PointingGame).evaluate_batch(a_batch=a.reshape(1, -1), s_batch=s.reshape(1, -1))
    ours = localisation.hit(a[0, 0], s[0, 0])
    # Of several highest cells Quantus takes any for a hit, we the share of them.
    assert (ours > 0) == bool(hit) and (ours == hit or (a == a.max()).sum() > 1)


@pytest.mark.parametrize("heat", range(len(HEATS)))
def test_complexity(heat: int) -> None:
    size = np.abs(HEATS[heat])[None]
    (entropy,) = quiet(quantus.Complexity).evaluate_batch(x_batch=None, a_batch=size.copy())
    # Quantus counts in nats, and adds 1e-12 within the logarithm.
    assert complexity.entropy(HEATS[heat]) * np.log(2) == pytest.approx(entropy, abs=1e-9)
    (gini,) = quiet(quantus.Sparseness).evaluate_batch(x_batch=None, a_batch=size.copy())
    assert complexity.sparseness(HEATS[heat]) == pytest.approx(gini, abs=2e-5)  # Quantus adds 1e-7 to each cell


class Grey(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(4 * 6 * 8, 3)
        ).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.double())


def test_pixel_flipping() -> None:
    """The curve of logits, cells set to 0 eleven at a time, the highest first."""
    net = Grey().eval()
    x, heat = RNG.random((1, 1, 8, 10)), RNG.standard_normal((1, 1, 8, 10))
    flipped = quantus.PixelFlipping(
        features_in_step=8,
        normalise=False,
        disable_warnings=True,
        perturb_baseline="black",
        return_auc_per_sample=False,
    )
    (theirs,) = flipped(
        net, x.astype(np.float64), np.array([2]), heat, device="cpu", softmax=False, channel_first=True,
    )  # fmt: skip

    def score(versions: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return net(torch.tensor(versions)).numpy()[:, 2]

    ours = f.curve(score, x[0], np.full_like(x[0], x.min()), heat[0, 0], steps=10)
    np.testing.assert_allclose(ours[1:], theirs, rtol=0, atol=1e-6)  # Quantus hands the network float32


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_road_fills_cells_in_as_quantus_does(share: float) -> None:
    from quantus.functions.perturb_func import noisy_linear_imputation

    x = RNG.random((3, 9, 11))
    gone = RNG.random((9, 11)) < share
    theirs = noisy_linear_imputation(x, np.flatnonzero(gone), noise=0.0).reshape(x.shape)
    np.testing.assert_allclose(f.imputed(x, gone, noise=0.0), theirs, atol=1e-12)
