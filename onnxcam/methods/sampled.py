"""Methods that average gradients over many versions of the input: SmoothGrad, VarGrad, integrated gradients, Smooth
Grad-CAM++.

Noise is drawn once for all images, so that a map does not depend on what else is in the batch; a seed makes it the same
the next time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxcam.methods.base import Method, at_least, raw_of

if TYPE_CHECKING:
    from onnxcam.means import Means
    from onnxcam.runners import Batch, Codes

Array = np.ndarray
# Averages of G, G^2, ... (N, T, C, *spatial), and the activation (N, 1, C, *spatial) -> (N, T, *spatial).
Finish = Callable[[Sequence[Array], Array], Array]


@dataclass(frozen=True)
class Sampled(Method):
    """`finish` makes a map of the averages of as many powers of the gradient as `powers` says."""

    finish: Finish = lambda averages, activation: averages[0].sum(2)
    powers: int = 1
    samples: int = 25
    seed: int = 0

    compiles: ClassVar[bool] = False
    cost: ClassVar[str] = "{samples} x (1 forward, 1 backward)"

    def options(self) -> dict[str, float]:
        return {name: value for name, value in super().options().items() if name != "powers"}

    def validate(self) -> None:
        at_least(self, 1, "samples")

    def versions(self, x: Array) -> Sequence[tuple[float, Callable[[], Array]]]:
        """Weights that sum to 1, and what makes each version of the input (N, ...)."""
        raise NotImplementedError

    def centred(self, activation: Array) -> Array:
        """The activation as `finish` gets it."""
        return activation

    def runner(self, means: Means) -> _Runner:
        return _Runner(self, means)


@dataclass(frozen=True)
class Noisy(Sampled):
    """Versions with Gaussian noise; `noise` is its standard deviation as a part of each image's range."""

    noise: float = 0.15

    def validate(self) -> None:
        super().validate()
        at_least(self, 0, "noise")

    def versions(self, x: Array) -> Sequence[tuple[float, Callable[[], Array]]]:
        axes = tuple(range(1, x.ndim))
        deviation = self.noise * (x.max(axes, keepdims=True) - x.min(axes, keepdims=True)).astype(np.float64)

        def version(k: int) -> Array:
            field = np.random.default_rng([self.seed, k]).standard_normal(x.shape[1:])
            made: Array = (x + deviation * field).astype(x.dtype)
            return made

        return [(1 / self.samples, partial(version, k)) for k in range(self.samples)]


@dataclass(frozen=True)
class Path(Sampled):
    """Versions along the straight line from a flat input of value `baseline`, at the points of Gauss and Legendre."""

    samples: int = 50
    baseline: float = 0.0

    def options(self) -> dict[str, float]:
        return {name: value for name, value in super().options().items() if name != "seed"}

    def versions(self, x: Array) -> Sequence[tuple[float, Callable[[], Array]]]:
        def version(part: float) -> Array:
            made: Array = (self.baseline + part * (x - self.baseline)).astype(x.dtype)
            return made

        places, weights = np.polynomial.legendre.leggauss(self.samples)
        return [(float(w) / 2, partial(version, (1 + float(a)) / 2)) for a, w in zip(places, weights, strict=True)]

    def centred(self, activation: Array) -> Array:
        return activation - self.baseline


class _Runner:
    def __init__(self, method: Sampled, means: Means):
        self.method, self.means = method, means
        self.inner = means.walk(raw_of(method))
        self.session = means.taps([layer.tensor for layer in means.job.layers.values()])
        self.providers, self.notes = self.session.providers, list(getattr(self.session, "notes", ()))

    def run(self, feeds: Mapping[str, Array], codes: Codes) -> Batch:
        method, job = self.method, self.means.job
        base = self.inner.run(feeds, codes)
        activations = self.means.activations(self.session.run(feeds))
        sums: dict[str, list[Array]] = {}
        versions = method.versions(feeds[job.input])
        for k, (weight, make) in enumerate(versions):
            part = self.inner.run({**feeds, job.input: make()}, base.targets)
            for name, gradient in part.maps.items():
                kept = sums.setdefault(name, [np.zeros(gradient.shape) for _ in range(method.powers)])
                power = np.ones(gradient.shape)
                for total in kept:
                    power = power * gradient
                    total += weight * power
            self.means.tick((k + 1) / len(versions))
        maps = {
            name: method.finish(averages, method.centred(activations[name])[:, None]) for name, averages in sums.items()
        }
        return self.means.result(maps, base.targets, base.logits)


def largest(averages: Sequence[Array], activation: Array) -> Array:
    """max over channels of |mean G| (Smilkov et al. 2017)."""
    return np.asarray(np.abs(averages[0]).max(2))


def variance(averages: Sequence[Array], activation: Array) -> Array:
    """sum over channels of the variance of G (Adebayo et al. 2018)."""
    return np.asarray((averages[1] - averages[0] ** 2).sum(2))


def along_path(averages: Sequence[Array], activation: Array) -> Array:
    """sum over channels of mean G times the way from the baseline (Sundararajan et al. 2017)."""
    return np.asarray((averages[0] * activation).sum(2))


def plus_plus(averages: Sequence[Array], activation: Array) -> Array:
    """relu(sum of w_k A_k), w_k = sum of alpha (mean G)+, alpha = mean G^2 / (2 mean G^2 + sum(A_k) mean G^3)
    (Omeiza et al. 2019)."""
    first, second, third = averages
    cells = tuple(range(3, first.ndim))
    alpha = second / (2 * second + activation.sum(cells, keepdims=True) * third + 1e-6)
    weights = (alpha * np.maximum(first, 0)).sum(cells, keepdims=True)
    return np.asarray(np.maximum((weights * activation).sum(2), 0))
