"""Methods of activations and gradients whose combination is no graph: singular vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from onnxcam.methods.base import Method, raw_of

if TYPE_CHECKING:
    from onnxcam.means import Means
    from onnxcam.runners import Batch, Codes, Runner

Array = np.ndarray


@dataclass(frozen=True)
class OnHost(Method):
    """`reduce(activation (N, C, *spatial), gradient (N, T, C, *spatial))` returns (N, T, *spatial)."""

    reduce: Callable[[Array, Array], Array] = lambda activation, gradient: gradient.sum(2)
    compiles: ClassVar[bool] = False

    def runner(self, means: Means) -> Runner:
        return _Walked(self, means)


@dataclass(frozen=True)
class OfActivations(OnHost):
    """The same for methods that no class, and so no gradient, has a part in."""

    walks: ClassVar[bool] = False
    cost: ClassVar[str] = "1 forward"

    def runner(self, means: Means) -> Runner:
        return _Tapped(self, means)


class _Walked:
    def __init__(self, method: OnHost, means: Means):
        self.method, self.means = method, means
        self.inner = means.walk(raw_of(method))
        self.session = means.taps([layer.tensor for layer in means.job.layers.values()])
        self.providers, self.notes = self.session.providers, list(getattr(self.session, "notes", ()))

    def run(self, feeds: Mapping[str, Array], codes: Codes) -> Batch:
        found = self.inner.run(feeds, codes)
        activations = self.means.activations(self.session.run(feeds))
        maps = {name: self.method.reduce(activations[name], g) for name, g in found.maps.items()}
        return self.means.result(maps, found.targets, found.logits)


class _Tapped:
    def __init__(self, method: OnHost, means: Means):
        self.method, self.means = method, means
        self.forward = means.forward([layer.tensor for layer in means.job.layers.values()])
        self.providers, self.notes = self.forward.providers, self.forward.notes

    def run(self, feeds: Mapping[str, Array], codes: Codes) -> Batch:
        from onnxcam.targets import classes_of

        logits, values = self.forward.run(feeds)
        classes = classes_of(codes, logits)
        maps = {
            name: np.repeat(self.method.reduce(a, a[:, None]), classes.shape[1], axis=1)
            for name, a in self.means.activations(values).items()
        }
        return self.means.result(maps, classes, logits)


def eigen_cam(activation: Array, gradient: Array) -> Array:
    """A v1, v1 the first right singular vector of A (cells, C) (Muhammad and Yeasin 2020); its sign is that of the
    larger sum, as singular vectors have none."""
    return _projected(activation[:, None].astype(np.float64), centre=False)


def eigen_grad_cam(activation: Array, gradient: Array) -> Array:
    """Likewise of G A with every channel's mean taken off (pytorch-grad-cam's EigenGradCAM); the sign is that with
    which it goes along with the sum of the channels."""
    return _projected(activation[:, None].astype(np.float64) * gradient, centre=True)


def _projected(values: Array, centre: bool) -> Array:
    """(N, T, C, *spatial) as (N, T, *spatial)."""
    n, t, c, *spatial = values.shape
    rows = np.moveaxis(values.reshape(n, t, c, -1), 2, 3)  # (N, T, cells, C)
    used = rows - rows.mean(2, keepdims=True) if centre else rows
    vectors = np.linalg.svd(used, full_matrices=False)[2][:, :, 0]
    along = np.einsum("ntsc,ntc->nts", used, vectors)
    toward = np.sum(along * rows.sum(3), axis=2, keepdims=True) if centre else along.sum(2, keepdims=True)
    return np.asarray((along * np.where(toward < 0, -1.0, 1.0)).reshape(n, t, *spatial))
